"""Commands to a server: their packed bytes, outcomes, and the state of their delivery.

A command keeps what is known of its earlier attempts wherever it is sent next: over a new
connection, or to another node of a cluster. Its future never fails; an error is a result.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Final

import hiredis
import msgspec

from service.core.values import StreamKey
from service.store.redis.outcomes import Outcome

if TYPE_CHECKING:
    from service.store.redis.pipelined_connection import PipelinedConnection

Command = tuple[str | bytes | int, ...]

CALL: Final = b"*%d\r\n%b$%d\r\n%b\r\n"
"""The beginning of a call of a script: how many parts it has, `Script.by_hash`, and the number of
its keys, with its length before it."""

CACHED_NAMES: Final = 4096
"""Most streams whose packed names are cached, for their next commands."""

_SHARED: Final = {
    "commit": ("compare_and_set",),
    **dict.fromkeys(
        ("commit_with_history", "history_write", "topic_commit", "version_commit"),
        ("compare_and_set", "history"),
    ),
}
"""The Lua files with the functions that a script shares with others."""


def pack_command(command: Command) -> bytes:
    """A command as it is sent. The client library packs in Python, at four times the cost."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]
    return packed


def pack_arguments(*arguments: str | bytes | int) -> bytes:
    """Some arguments of a command as they are sent: bulk strings of RESP."""
    return pack_command(arguments).partition(b"\r\n")[2]


@dataclass(frozen=True)
class Script:
    """A Lua script and its SHA-1, which identifies it to EVALSHA."""

    text: bytes
    sha: str

    @classmethod
    def load(cls, name: str) -> Script:
        """Read `lua/{name}.lua` of this package, behind what it shares with other scripts."""
        names = [*_SHARED.get(name, ()), name]
        folder = files("service.store.redis").joinpath("lua")
        text = b"".join([folder.joinpath(f"{each}.lua").read_bytes() for each in names])
        return cls(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())

    @cached_property
    def by_hash(self) -> bytes:
        """The beginning of a call by its hash, as it is sent."""
        return pack_arguments("EVALSHA", self.sha)

    @cached_property
    def by_text(self) -> bytes:
        """The beginning of a call by its text, as it is sent."""
        return pack_arguments("EVAL", self.text)


class PendingCommand(msgspec.Struct, eq=False):
    """A command, or the call of a script, and the state of its delivery.

    Attributes:
        packed: the command as it is sent.
        script: the script that it calls by its hash, which the server may not know (NOSCRIPT).
        streams: the streams that it writes by compare-and-set, so that it depends on earlier
            commands that write them.
        slot: the hash slot of its keys in a cluster.
        is_sent: it was sent at least once since it was last known not to have been executed.
        is_retry: it was sent again after an attempt that may have been executed.
        needs_asking: the next attempt must follow ASKING, on the node that imports the slot.
        is_asking: it is the ASKING command of another command, whose future it shares.
        is_connection_bound: it has a meaning on its present connection only and is never resent.
        is_once: it fails if the connection breaks or cannot be opened.
        redirect_count: how often a node redirected or deferred it.
        redirect_error: the error reply of the last redirect.
        connection: the connection of the last attempt.
        generation: which incarnation of that connection carried it (`PipelinedConnection`).
        sequence: its place among the commands that were written on that connection.
    """

    packed: bytes
    future: asyncio.Future[Outcome]
    script: Script | None = None
    streams: Collection[StreamKey] = ()
    slot: int = 0
    is_sent: bool = False
    is_retry: bool = False
    needs_asking: bool = False
    is_asking: bool = False
    is_connection_bound: bool = False
    is_once: bool = False
    redirect_count: int = 0
    redirect_error: Exception | None = None
    connection: PipelinedConnection | None = None
    generation: int = 0
    sequence: int = 0

    @classmethod
    def of(cls, *command: str | bytes | int, slot: int = 0) -> PendingCommand:
        """Make a command of its name and arguments; inside a running event loop."""
        return cls(pack_command(command), asyncio.get_running_loop().create_future(), slot=slot)

    @classmethod
    def for_script(
        cls,
        script: Script,
        names: Sequence[str],
        arguments: Sequence[str | bytes | int],
        slot: int = 0,
        streams: Collection[StreamKey] = (),
    ) -> PendingCommand:
        """Make the call of a script; inside a running event loop."""
        packed = pack_command(("EVALSHA", script.sha, len(names), *names, *arguments))
        return cls(packed, asyncio.get_running_loop().create_future(), script, streams, slot)

    def send_script(self) -> None:
        """Send the text of the script at the next attempt: the server does not know it."""
        if self.script is not None:
            self.packed = self.packed.replace(self.script.by_hash, self.script.by_text, 1)
            self.script = None

    def mark_not_executed(self) -> None:
        """Record that the server certainly did not execute the last attempt."""
        self.is_sent = self.is_retry

    def resolve(self, outcome: Outcome) -> None:
        """Set the outcome, unless the caller has cancelled the command."""
        if not self.future.done():
            self.future.set_result(outcome)
