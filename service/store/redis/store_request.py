"""One request to a server, on its way: what a lane carries and a link routes.

A request keeps what is known of its earlier tries wherever it goes: over a connection that was
made anew, or to another node of a cluster. Its future never fails; an error is its result.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from service.core.errors import CarryError

if TYPE_CHECKING:
    from service.store.redis.pipelined_connection import Lane

Command = tuple[str | bytes | int, ...]


class ReplyLost(Exception):
    """The request was sent, perhaps carried out, and no try was answered in time; or a later
    try was refused, which says nothing about the earlier ones."""


class Answer(NamedTuple):
    """The server's reply.

    Attributes:
        value: as the protocol gives it: bytes, int, None or a list of these.
        repeated: an earlier try of the same request may have been carried out.
        durable: what it wrote is where the settings want it; always so where they want nothing
            beyond the server's memory.
    """

    value: Any
    repeated: bool
    durable: bool = True


Outcome = Answer | ReplyLost | CarryError


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the SHA-1 the server knows it by."""

    text: bytes
    sha: str

    @classmethod
    def load(cls, name: str) -> Script:
        """Read `lua/{name}.lua` of this package."""
        text = files("service.store.redis").joinpath("lua", f"{name}.lua").read_bytes()
        return cls(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way.

    Attributes:
        fallback: what is sent where the server does not know the script.
        slot: of a cluster, that the keys lie in.
        sent: it went out at least once since it was last known not to be carried out.
        repeated: it went out again after a try that may have been carried out.
        asking: the next try goes to the node that the slot is being moved to.
        aside: the word before a request that is `asking`, whose future it shares.
        bound: it means something on its present connection only, and is never sent again.
        hops: how often a node sent it elsewhere or put it off, and `put_off` by what words.
        lane, since, number: the connection of its last try (the first number written on it), and
            the place among what was written there.
    """

    command: Command
    future: asyncio.Future[Outcome]
    fallback: Command | None = None
    slot: int = 0
    sent: bool = False
    repeated: bool = False
    asking: bool = False
    aside: bool = False
    bound: bool = False
    hops: int = 0
    put_off: Exception | None = None
    lane: Lane | None = None
    since: int = 0
    number: int = 0

    @classmethod
    def of(cls, *command: str | bytes | int, slot: int = 0) -> Request:
        """A plain command; inside a running event loop."""
        return cls(command, asyncio.get_running_loop().create_future(), slot=slot)

    @classmethod
    def run(
        cls,
        script: Script,
        keys: list[str],
        arguments: list[str | bytes | int],
        slot: int = 0,
    ) -> Request:
        """A script; inside a running event loop."""
        rest = (len(keys), *keys, *arguments)
        return cls(
            ("EVALSHA", script.sha, *rest),
            asyncio.get_running_loop().create_future(),
            ("EVAL", script.text, *rest),
            slot,
        )

    @property
    def keys(self) -> Command:
        """The keys of a script; empty for other commands."""
        if self.command[0] not in ("EVALSHA", "EVAL"):
            return ()
        return self.command[3 : 3 + int(self.command[2])]

    def not_carried_out(self) -> None:
        """The last try certainly was not."""
        self.sent = self.repeated

    def resolve(self, outcome: Outcome) -> None:
        """Give the outcome to whoever still waits for it."""
        if not self.future.done():
            self.future.set_result(outcome)
