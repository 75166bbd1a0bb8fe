"""Loads Carry's packages with common names, whatever comes first on the import path.

A project with a `models/` or a `service.py` of its own, in the working directory or on PYTHONPATH,
would otherwise be imported in their place.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

_ROOT = Path(__file__).parent.parent


def load_own_packages(*names: str) -> None:
    """Load the packages in the folder of this one; every later import of their names finds them.

    Raises:
        ImportError: a name belongs to another module already, or the package is missing.
    """
    for name in names:
        loaded = sys.modules.get(name)
        if loaded is None:
            _load(name)
            continue
        file = getattr(loaded, "__file__", None)
        if file is None or Path(file).resolve() != (_ROOT / name / "__init__.py").resolve():
            raise ImportError(
                f"expected Carry's package {name!r} in {_ROOT}, got the module of that name in "
                f"{file or list(loaded.__path__)}, which was imported before; use Carry in a "
                "process that does not import it, for example through the command `carry`",
                name=name,
            )


def _load(name: str) -> None:
    spec = PathFinder.find_spec(name, [str(_ROOT)])
    if spec is None or spec.loader is None:
        raise ImportError(
            f"expected the package {name!r} in {_ROOT}; install Carry again", name=name
        )
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
