"""Memory of replies that a connection has not sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UNSENT: Final = "unsent_reply"
"""Key of `UnsentReply` in a request's state, where the server's protocol puts it."""


@dataclass(slots=True)
class UnsentReply:
    """Memory that a connection holds for replies, besides its transport's buffer."""

    kept_bytes: int = 0
