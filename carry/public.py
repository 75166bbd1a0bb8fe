"""Functions of the Python API: errors that name the missing extra, and documented arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

EXTRAS = {
    **dict.fromkeys(("backfill", "score", "streams"), "backfill"),
    **dict.fromkeys(("log_model", "models", "pull_model"), "mlflow"),
    "replay": "replay",
    **dict.fromkeys(
        (
            *("init", "train", "evaluate", "compare", "plot", "import", "graph"),
            *("train_frame", "initialise_artifact", "import_keras_model"),
        ),
        "tensorflow,train",
    ),
}
"""The extras with the packages that a command or a function needs."""

_OF_PACKAGES = {
    "deltalake": "delta",
    "pyarrow": "iceberg",
    "pyiceberg": "iceberg",
    "ray": "ray",
}
"""The extra of a package that only some options of a command need."""


def describe_missing(error: ModuleNotFoundError, user: str, extra: str) -> str:
    """The error's text, with the extra that `user`, a command or function, needs."""
    extra = _OF_PACKAGES.get((error.name or "").partition(".")[0], extra)
    return (
        f"{error}; `{user}` needs `carry[{extra}]`: pip install 'carry[{extra}]' "
        "(in a clone: scripts/setup dev)"
    )


@contextmanager
def naming_extra(name: str) -> Iterator[None]:
    """Adds the extra that `carry.NAME` needs to a ModuleNotFoundError; also a decorator."""
    try:
        yield
    except ModuleNotFoundError as error:
        if name not in EXTRAS:
            raise
        text = describe_missing(error, f"carry.{name}", EXTRAS[name])
        raise ModuleNotFoundError(text, name=error.name, path=error.path) from error


def add_arguments(function: Callable[..., Any]) -> None:
    """Document the arguments of a command's function by the help texts and types of its options."""
    hints = get_type_hints(function, include_extras=True)
    lines = [
        f"    {name}: {option.help}\n"
        for name, hint in hints.items()
        for option in getattr(hint, "__metadata__", ())
    ]
    text, *rest = re.split(r"(?m)^(?=Returns:|Raises:)", inspect.getdoc(function) or "", maxsplit=1)
    function.__doc__ = "".join([text, "Args:\n", *lines, "\n", *rest])
    signature, types = inspect.signature(function), get_type_hints(function)
    arguments = [
        each.replace(annotation=types[each.name]) for each in signature.parameters.values()
    ]
    vars(function)["__signature__"] = signature.replace(
        parameters=arguments, return_annotation=types["return"]
    )
