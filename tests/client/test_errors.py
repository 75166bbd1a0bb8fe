"""One class for each code of the service, with all facts as attributes."""

from __future__ import annotations

import pickle
import re

import pytest

from carry_client import Head, Problem, Stream, errors, read_problem
from carry_client.errors import Forbidden
from service.core.errors import CarryError, leaf_errors
from service.server.errors import RouteNotFound
from tests.service.commands.replay.standin import Standin
from tests.support.pages import ROOT

CODES = list(leaf_errors())


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.code)
def test_every_code_has_a_class_in_the_same_place_of_the_tree(kind: type[CarryError]) -> None:
    problem = read_problem(418, {"code": kind.code, "detail": "d", "retryable": True})
    assert type(problem).__name__ == kind.__name__, "add the class to carry_client/errors.py"
    assert problem.code == kind.code
    parent = next(base for base in kind.__mro__[1:] if base is not CarryError)
    assert isinstance(problem, getattr(errors, parent.__name__) if parent.__name__ else Problem)
    assert (type(problem).__doc__ or "").rstrip(".") == kind.title


def test_no_class_has_a_code_that_the_service_does_not_have() -> None:
    assert RouteNotFound in CODES
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    own = {kind.__name__ for kind in kinds if issubclass(kind, Problem)}
    named = {type(read_problem(418, {"code": kind.code})).__name__ for kind in CODES}
    parents = {base.__name__ for kind in CODES for base in kind.__mro__}
    assert own - named - parents == {"Problem", "NoAnswer"}


def test_members_of_the_error_reference_are_attributes() -> None:
    page = (ROOT / "docs/reference/errors.md").read_text()
    table = page[page.index("| member ") : page.index("A rejected request")]
    rows = table.split("| --- | --- |")[1].strip().splitlines()
    members = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    document = {name: f"the {name}" for name in members} | {
        "status": 409,
        "position": 7,
        "retry_after_s": 0.5,
        "retryable": True,
        "errors": [{"at": "events[0]"}],
    }
    problem = read_problem(409, document)
    for name in members - {"retryable"}:
        expected = document[name] if name != "errors" else ({"at": "events[0]"},)
        assert getattr(problem, name) == expected
    assert problem.is_retryable
    assert problem.head == Head(7, "the epoch", "the tag")


def test_unknown_code_is_a_problem_itself() -> None:
    problem = read_problem(409, {"code": "new_code", "detail": "d"})
    assert type(problem) is Problem
    assert problem.code == "new_code"


def test_problem_can_be_pickled() -> None:
    problem = read_problem(409, {"code": "position_ahead", "detail": "d", "position": 3})
    copy = pickle.loads(pickle.dumps(problem))
    assert (type(copy), copy.code, copy.position) == (errors.PositionAhead, "position_ahead", 3)


def test_stream_exists_error_names_overwrite() -> None:
    document = {"code": "stream_exists", "stream": "s", "position": 3, "detail": "send If-Match"}
    text = str(read_problem(409, document))
    assert "stream 's' exists at position 3" in text
    assert "overwrite=True" in text


def test_a_key_that_may_not_read_the_model_sends_nothing(
    small: Stream, standin: Standin, events: list[dict[str, object]]
) -> None:
    standin.hides_models = True
    with pytest.raises(Forbidden):
        small.send(events[:3])
    assert standin.seen == []
    standin.hides_models = False
    assert small.send(events[:3]).position == 3
