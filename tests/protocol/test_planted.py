"""Every planted bug is found, by a story that can be read; the scripts' are on a real server."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files

import pytest

from service.store.redis.redis_store import Script
from tests.protocol.against import Different, compare
from tests.protocol.planted import PLANTED, Lua, Planted
from tests.protocol.search import search
from tests.protocol.story import story
from tests.support.servers import RealServer


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_the_model_finds_it_and_tells_how(bug: Planted) -> None:
    found = search(bug.scenario, bug.rules)
    assert found.broken is not None
    assert bug.told in found.broken
    told = story(found)
    print(told)
    numbers = [int(number) for number in re.findall(r"^ *(\d+)\. ", told, re.MULTILINE)]
    assert numbers == list(range(1, len(found.path) + 1))
    assert f"BROKEN: {found.broken}" in told
    assert told.count("store: ") == len(found.path) - 1


@pytest.mark.parametrize(
    "bug", [bug for bug in PLANTED if bug.lua is not None], ids=lambda bug: bug.name
)
async def test_the_script_with_the_bug_is_not_the_models(
    bug: Planted, valkey: RealServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = search(bug.scenario, depth=8)
    misled = search(bug.scenario, bug.rules)
    with valkey.client() as client:
        await compare(honest.book, [*honest.book.calls], valkey.url, client)
        with pytest.raises(Different):
            await compare(misled.book, [*misled.book.calls], valkey.url, client)
        monkeypatch.setattr(Script, "load", classmethod(plant(bug.lua)))
        await compare(misled.book, [*misled.book.calls], valkey.url, client)
        with pytest.raises(Different):
            await compare(honest.book, [*honest.book.calls], valkey.url, client)


def plant(lua: Lua):
    """A `Script.load` that gives the script with the bug."""

    def load(cls: type[Script], name: str) -> Script:
        text = files("service.store.redis").joinpath("lua", f"{name}.lua").read_text()
        if name == lua.script:
            assert text.count(lua.old) == 1
            text = text.replace(lua.old, lua.new)
        data = text.encode()
        return cls(data, hashlib.sha1(data, usedforsecurity=False).hexdigest())

    return load
