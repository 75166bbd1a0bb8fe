"""Loads Carry's packages `models` and `service`, whatever modules of these names a project has.

The folders are inside of this package in a wheel, and beside it in a checkout. They are loaded

- as `models` and `service` by `load_own_packages`, in processes that belong to Carry;
- as `carry.models` by `import carry.models`, in a user's program. There every import of `models` in
  Carry's code is one of `carry.models`, so that the name `models` is left to the program.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

_NAMES = ("models", "service")
_HERE = Path(__file__).parent
_ROOT = _HERE if (_HERE / "models").is_dir() else _HERE.parent


def load_own_packages() -> None:
    """Load both packages under their own names; every later import of the names finds them.

    Raises:
        ImportError: a name belongs to another module already, or the package is missing.
    """
    for name in _NAMES:
        loaded = sys.modules.get(name)
        if loaded is None:
            _load(name)
            continue
        file = getattr(loaded, "__file__", None)
        if file is None or Path(file).resolve() != (_ROOT / name / "__init__.py").resolve():
            raise ImportError(
                f"expected Carry's package {name!r} in {_ROOT}, got the module of that name in "
                f"{file or list(loaded.__path__)}, which was imported before; start the command "
                "`carry` as a process of its own",
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


class PrivateModels(MetaPathFinder):
    """Finds `carry.models` and its modules; they import each other under these names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec; None for other modules."""
        if fullname != "carry.models" and not fullname.startswith("carry.models."):
            return None
        spec = PathFinder.find_spec(
            fullname, [str(_ROOT)] if fullname == "carry.models" else path, target
        )
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _PrivateLoader(fullname, spec.loader.path)
        return spec


class _PrivateLoader(SourceFileLoader):
    """Runs a module with an `__import__` of its own: imports in functions use it too."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module; its functions take `__import__` from its `__builtins__`."""
        vars(module)["__builtins__"] = vars(builtins) | {"__import__": _import}
        super().exec_module(module)


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    if level or name.partition(".")[0] != "models":
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = builtins.__import__(f"carry.{name}", globals, locals, fromlist or (), 0)
    return module if fromlist else sys.modules["carry.models"]
