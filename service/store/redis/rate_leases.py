"""Token buckets on Redis or Valkey (`RateLeases`): a hash each, changed by a script."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

from service.core.errors import CarryError
from service.store.capabilities import Lease, LeaseRequest
from service.store.keys import KeySpace
from service.store.redis.commands import PendingCommand, Script
from service.store.redis.outcomes import Outcome, read_value
from service.store.redis.router import Router


class RedisRateLeases:
    """`RateLeases` on a single server or a cluster, of one process."""

    def __init__(self, router: Router, keys: KeySpace):
        self._router = router
        self._keys = keys
        self._process = secrets.token_hex(4)
        self._script = Script.load("lease")

    async def lease(
        self, requests: Sequence[LeaseRequest], deadline_s: float = math.inf
    ) -> list[Lease | CarryError]:
        commands: list[PendingCommand] = []
        for bucket, rate_per_s, burst, spent in requests:
            name = self._keys.rate(bucket)
            arguments = (repr(rate_per_s), repr(burst), self._process, repr(spent))
            slot = self._router.slot(name)
            commands.append(PendingCommand.for_script(self._script, [name], arguments, slot))
        return list(map(_lease, await self._router.execute(*commands, deadline_s=deadline_s)))


def _lease(outcome: Outcome) -> Lease | CarryError:
    try:
        tokens, free, processes = read_value(outcome)
    except CarryError as error:
        return error
    return Lease(float(tokens), float(free), processes)
