"""Assigns topics to consumers: the same on each of them, balanced, and stable when one changes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence


def assign_topics(topics: Sequence[str], members: Iterable[str]) -> dict[str, str]:
    """Assign each topic to a member; empty without members.

    A topic goes to the member with the highest hash of both that has less than its share, the
    number of topics by that of members, rounded up (rendezvous hashing with bounded loads). So a
    member that leaves or joins moves little more than its own share.
    """
    members = sorted(members)
    if not members:
        return {}
    share = -(-len(topics) // len(members))
    loads = dict.fromkeys(members, 0)
    assigned: dict[str, str] = {}
    for topic in topics:
        free = [member for member in members if loads[member] < share]
        chosen = max(free, key=lambda member: _weight(topic, member))
        loads[chosen] += 1
        assigned[topic] = chosen
    return assigned


def _weight(topic: str, member: str) -> bytes:
    return hashlib.blake2b(f"{member}\0{topic}".encode(), digest_size=8).digest()
