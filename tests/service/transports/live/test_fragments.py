"""Long frames, split on their way to the parser."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from service.transports.live import fragments
from service.transports.live.fragments import Fragmenter

MAX_BYTES = 400


@pytest.fixture(scope="module", autouse=True)
def short_fragments() -> None:
    """Fragments of a few bytes, so that short frames are split."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fragments, "FRAGMENT_BYTES", 16)
        yield


def parsed(pieces: list[bytes]) -> tuple[list[tuple[Opcode, bytes]], bool]:
    """The complete messages and control frames in these bytes, and whether an error ends them."""
    parser = ServerProtocol(state=State.OPEN, max_size=MAX_BYTES, logger=logging.getLogger("x"))
    for piece in pieces:
        parser.receive_data(piece)
    complete: list[tuple[Opcode, bytes]] = []
    opcode, message = Opcode.TEXT, b""
    for frame in parser.events_received():
        if frame.opcode is Opcode.PING:
            complete.append((frame.opcode, bytes(frame.data)))
            continue
        if frame.opcode is not Opcode.CONT:
            opcode, message = frame.opcode, b""
        message += frame.data
        if frame.fin:
            complete.append((opcode, message))
    return complete, parser.close_sent is not None


FRAMES = st.lists(
    st.builds(
        Frame,
        st.sampled_from([Opcode.TEXT, Opcode.BINARY, Opcode.CONT, Opcode.PING]),
        st.integers(0, 450).map(lambda size: bytes(at % 251 for at in range(size))),
        st.booleans(),
        st.sampled_from([False] * 9 + [True]),
    ),
    max_size=6,
)


@settings(max_examples=80)
@given(
    frames=FRAMES,
    masked=st.sampled_from([True] * 9 + [False]),
    size=st.sampled_from([1, 3, 7, 40, 10_000]),
)
def test_the_parser_gets_the_same_messages_and_errors(
    frames: list[Frame], masked: bool, size: int
) -> None:
    with pytest.MonkeyPatch.context() as unchecked:
        unchecked.setattr(Frame, "check", lambda _: None)
        wire = b"".join(frame.serialize(mask=masked) for frame in frames)
    fragmenter = Fragmenter(MAX_BYTES)
    pieces = [fragmenter.split(wire[at : at + size]) for at in range(0, len(wire), size)]
    assert parsed(pieces) == parsed([wire])


def test_no_fragment_is_longer_than_the_limit() -> None:
    wire = Frame(Opcode.BINARY, bytes(100)).serialize(mask=True)
    split = Fragmenter(MAX_BYTES).split(wire)
    parser = ServerProtocol(state=State.OPEN, max_size=MAX_BYTES)
    parser.receive_data(split)
    frames = parser.events_received()
    assert [len(frame.data) for frame in frames] == [16] * 6 + [4]
    assert [frame.fin for frame in frames] == [False] * 6 + [True]
