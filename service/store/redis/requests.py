"""Requests to a server: a command or a script call, its outcome, and the state of its delivery.

A request keeps what is known of its earlier attempts wherever it is sent next: over a new
connection, or to another node of a cluster. Its future never fails; an error is a result.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from service.store.redis.outcomes import Outcome

if TYPE_CHECKING:
    from service.store.redis.pipelined_connection import PipelinedConnection

Command = tuple[str | bytes | int, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its SHA-1, which identifies it to EVALSHA."""

    text: bytes
    sha: str

    @classmethod
    def load(cls, name: str) -> Script:
        """Read `lua/{name}.lua` of this package."""
        text = files("service.store.redis").joinpath("lua", f"{name}.lua").read_bytes()
        return cls(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


class StoreRequest(msgspec.Struct, eq=False):
    """One request and the state of its delivery.

    Attributes:
        script: the script that it calls by its hash, which the server may not know (NOSCRIPT).
        slot: the hash slot of its keys in a cluster.
        is_sent: it was sent at least once since it was last known not to have been executed.
        is_retry: it was sent again after an attempt that may have been executed.
        needs_asking: the next attempt must follow ASKING, on the node that imports the slot.
        is_asking: it is the ASKING command of another request, whose future it shares.
        is_connection_bound: it has a meaning on its present connection only and is never resent.
        redirect_count: how often a node redirected or deferred it.
        redirect_error: the error reply of the last redirect.
        connection: the connection of the last attempt.
        generation: which incarnation of that connection carried it (`PipelinedConnection`).
        sequence: its place among the requests that were written on that connection.
    """

    command: Command
    future: asyncio.Future[Outcome | None]
    script: Script | None = None
    slot: int = 0
    is_sent: bool = False
    is_retry: bool = False
    needs_asking: bool = False
    is_asking: bool = False
    is_connection_bound: bool = False
    redirect_count: int = 0
    redirect_error: Exception | None = None
    connection: PipelinedConnection | None = None
    generation: int = 0
    sequence: int = 0

    @classmethod
    def for_command(cls, *command: str | bytes | int, slot: int = 0) -> StoreRequest:
        """Make the request of a plain command; inside a running event loop."""
        return cls(command, asyncio.get_running_loop().create_future(), slot=slot)

    @classmethod
    def for_script(
        cls,
        script: Script,
        keys: list[str],
        arguments: list[str | bytes | int],
        slot: int = 0,
    ) -> StoreRequest:
        """Make the request of a script call; inside a running event loop."""
        command = ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        return cls(command, asyncio.get_running_loop().create_future(), script, slot)

    @property
    def keys(self) -> Command:
        """The keys of a script; empty for other commands."""
        if self.command[0] not in ("EVALSHA", "EVAL"):
            return ()
        return self.command[3 : 3 + int(self.command[2])]

    def send_script(self) -> None:
        """Send the text of the script at the next attempt: the server does not know it."""
        if self.script is not None:
            self.command = ("EVAL", self.script.text, *self.command[2:])
            self.script = None

    def mark_not_executed(self) -> None:
        """Record that the server certainly did not execute the last attempt."""
        self.is_sent = self.is_retry

    def resolve(self, outcome: Outcome) -> None:
        """Set the outcome, unless the caller has cancelled the request."""
        if not self.future.done():
            self.future.set_result(outcome)
