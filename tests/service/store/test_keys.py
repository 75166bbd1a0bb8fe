"""Key names: documented, stable, and parsed unambiguously."""

from __future__ import annotations

import fnmatch
import re

from hypothesis import given
from hypothesis import strategies as st

from service.core.values import StreamKey
from service.store.keys import KeySpace

SPACE = KeySpace("carry", 1024)
MODELS = st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True)
NAMES = st.from_regex(r"[A-Za-z0-9._:@-]{1,60}", fullmatch=True)
KEYS = st.builds(StreamKey, MODELS, NAMES)


def test_key_names_match_their_documentation() -> None:
    # CRC-32 of "flights/JFK-AA" is 0x64e583aa; stable across versions and machines.
    stream = StreamKey("flights", "JFK-AA")
    assert SPACE.partition(stream) == 0x64E583AA % 1024
    assert SPACE.state(stream) == "carry{p0938}:s:flights:JFK-AA"
    assert SPACE.reply(stream) == "carry{p0938}:r:flights:JFK-AA"
    assert SPACE.meta == "carry:meta"


@given(KEYS, st.integers(1, 65_536))
def test_a_key_round_trips(stream: StreamKey, partitions: int) -> None:
    space = KeySpace("a-b_c", partitions)
    assert space.parse(space.state(stream)) == stream
    assert space.pair(stream) == (space.state(stream), space.reply(stream))
    assert space.parse(space.reply(stream)) is None
    assert 0 <= space.partition(stream) < partitions
    (number,) = re.findall(r"\{p(\d{4,})\}", space.state(stream))
    assert int(number) == space.partition(stream)


@given(KEYS, KEYS)
def test_two_streams_never_share_a_key(one: StreamKey, other: StreamKey) -> None:
    assert (SPACE.state(one) == SPACE.state(other)) == (one == other)


@given(KEYS)
def test_foreign_keys_are_not_parsed(stream: StreamKey) -> None:
    key = SPACE.state(stream)
    other = f"{{p{(SPACE.partition(stream) + 1) % 1024:04d}}}"
    for foreign in (
        "x" + key,
        key.replace("carry", "other", 1),
        re.sub(r"\{p\d+\}", other, key, count=1),
        SPACE.meta,
        "",
    ):
        assert SPACE.parse(foreign) is None


@given(MODELS, NAMES, NAMES)
def test_a_pattern_matches_only_the_prefix(model: str, name: str, prefix: str) -> None:
    # No name contains a glob character, so Python's globs match like the server's.
    key = SPACE.state(StreamKey(model, name))
    matched = fnmatch.fnmatchcase(key, SPACE.pattern(model, prefix))
    assert matched == name.startswith(prefix)


def test_partitions_are_balanced() -> None:
    counts = [0] * 16
    for number in range(16_000):
        counts[KeySpace("carry", 16).partition(StreamKey("m", f"stream-{number}"))] += 1
    assert min(counts) > 850
    assert max(counts) < 1150
