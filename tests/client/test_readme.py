"""The client's README as doctests against a live service; its reference is complete."""

from __future__ import annotations

import doctest
import inspect
import re

import pytest

import carry_client
from carry_client import Carry, Model, Progress, Stream, errors
from tests.support.pages import DEFAULT_URL, ROOT, blocks
from tests.support.service import Service

REFERENCE = (ROOT / "docs/reference/python-client.md").read_text()


def test_examples_of_the_readme_give_what_it_shows(
    carry: Carry, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    carry.model("flights").delete_streams("")
    text = "\n".join(text for language, text in blocks("client/README.md") if language == "pycon")
    example = doctest.DocTestParser().get_doctest(
        text.replace(DEFAULT_URL, service.url), {}, "README", "client/README.md", 0
    )
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert results.attempted > 15
    assert results.failed == 0


@pytest.mark.parametrize("kind", [Carry, Model, Stream])
def test_reference_has_every_method_and_parameter(kind: type) -> None:
    section = re.split(r"^## ", REFERENCE, flags=re.MULTILINE)
    (text,) = (each for each in section if each.startswith(f"{kind.__name__}\n"))
    for name, method in vars(kind).items():
        if name.startswith("_") and (kind, name) != (Carry, "__init__"):
            continue
        shown = kind.__name__ if name == "__init__" else name
        assert f"`{shown}" in text, name
        if inspect.isfunction(method):
            names = [each for each in inspect.signature(method).parameters if each[:7] != "return_"]
            assert [each for each in names if each != "self" and each not in text] == [], name


def test_reference_has_every_exported_name() -> None:
    low_level = {"encode_body", "model_path", "read_description", "read_problem"}
    low_level |= {"read_response", "stream_path", "Retry", "POSITION_CODES"}
    for name in set(carry_client.__all__) - low_level:
        assert f"`{name}" in REFERENCE, name
    for name in Progress.__dataclass_fields__:
        assert f"`{name}`" in REFERENCE
    assert set(re.findall(r"`errors\.(\w+)`", REFERENCE)) <= set(vars(errors))
