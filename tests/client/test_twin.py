"""The asynchronous client is the synchronous one; public signatures have exact types."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import carry_client
from carry_client import AsyncCarry, AsyncModel, AsyncStream, Carry, Model, Stream
from tests.client.twin import PACKAGE, async_twin

TWINS = [(Carry, AsyncCarry), (Model, AsyncModel), (Stream, AsyncStream)]


def public(kind: type) -> dict[str, Any]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


def test_asynchronous_client_is_generated_from_the_synchronous_one() -> None:
    generated = async_twin((PACKAGE / "sync.py").read_text())
    message = "run `python -m tests.client.twin`"
    assert (PACKAGE / "aio.py").read_text() == generated, message


@pytest.mark.parametrize(("sync", "twin"), TWINS)
def test_both_have_the_same_names_and_parameters(sync: type, twin: type) -> None:
    ours, theirs = public(sync), public(twin)
    assert list(ours) == list(theirs)
    for name, method in ours.items():
        if inspect.isfunction(method):
            parameters = inspect.signature(method).parameters
            assert list(parameters) == list(inspect.signature(theirs[name]).parameters), name
            is_lazy = name in ("model", "stream", "__init__")
            is_async = inspect.iscoroutinefunction(theirs[name])
            assert is_lazy or is_async or inspect.isasyncgenfunction(theirs[name]), name


@pytest.mark.parametrize("name", carry_client.__all__)
def test_public_names_are_typed_without_any(name: str) -> None:
    value = getattr(carry_client, name)
    if not inspect.isclass(value):
        assert "Any" not in str(getattr(value, "__annotations__", ""))
        return
    assert "Any" not in str(vars(value).get("__annotations__", "")), name
    for member, method in public(value).items():
        function = method.fget if isinstance(method, property) else method
        if inspect.isfunction(function):
            assert "Any" not in str(function.__annotations__), f"{name}.{member}"
            assert function.__doc__, f"{name}.{member} has no docstring"
