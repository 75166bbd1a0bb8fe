"""Locates data files of installed packages without importing the packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from models.errors import ModelsError


def package_folder(package: str, extras: str = "'.[train]'") -> Path:
    """The directory of an installed package.

    Nothing of it is imported: some of these packages need modules that newer Pythons lack, and
    all that is wanted are their data.

    Raises:
        ModelsError: it is not installed; the message names `extras` to install.
    """
    module = find_spec(package)
    if module is None or not module.submodule_search_locations:
        raise ModelsError(
            f"expected the package `{package}` for its data: pip install ./client {extras}"
        )
    return Path(next(iter(module.submodule_search_locations)))
