"""From the members of a batch and their streams' states to outputs and the states after.

Encodes the events of all members together, computes them in as few calls of the runtime as they
take, and looks whether what came is finite. A member that cannot be encoded, or whose numbers are
not finite, is settled here, alone. Nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import structlog

from models.spec.blocks import BlockState
from models.spec.state import State
from service.core.delivery import apply_chunk, stream_facts
from service.core.errors import CarryError, InternalError, InvalidInput, NotFinite
from service.core.values import StreamState
from service.engine.compute import Compute
from service.pipeline.blocks import Advanced, Known, advance_blocks
from service.pipeline.member import Member, Times
from service.pipeline.recorder import Recorder
from service.pipeline.served_model import ServedModel

log = structlog.get_logger(__name__)


class Inference:
    """Of one model.

    Args:
        now_ms: wall clock in epoch milliseconds.
    """

    def __init__(
        self,
        served: ServedModel,
        compute: Compute,
        recorder: Recorder,
        now_ms: Callable[[], int],
    ):
        self._served = served
        self._compute = compute
        self._now_ms = now_ms
        self._on_call = partial(recorder.batch, served.name)
        self._zero = served.state.zero()
        self._blocks = served.blocks

    async def __call__(
        self, members: list[Member], times: Times
    ) -> list[tuple[Member, StreamState]]:
        """The members that could be computed, each with its stream as it is then."""
        encoded = self._encoded(members)
        return await self._infer(encoded, times) if encoded else []

    def _encoded(self, members: list[Member]) -> list[Member]:
        """Encode the members' events under their states; a refusal fails one alone."""
        encoded: list[Member] = []
        states = [member.base.state if member.base else self._zero for member in members]
        items = [(m.chunk.steps, state) for m, state in zip(members, states, strict=True)]
        for member, found in zip(members, self._served.encode_many(items), strict=True):
            if isinstance(found, Exception):
                member.job.resolve(self._encoding_failed(member, found))
            else:
                member.rows, member.ints = found
                encoded.append(member)
        return encoded

    def _encoding_failed(self, member: Member, error: Exception) -> CarryError:
        if isinstance(error, InvalidInput):
            return InvalidInput(error.detail, **error.facts, stream=member.chunk.key.stream)
        if isinstance(error, CarryError):
            return error
        log.error("encoding_failed", model=self._served.name, exc_info=error)
        return InternalError(f"encoding failed: {type(error).__name__}")

    async def _infer(self, members: list[Member], times: Times) -> list[tuple[Member, StreamState]]:
        """Compute the members; each with its stream as it is then, where that is finite."""
        began_s = time.monotonic()
        if self._blocks is None:
            outputs, states, finite = await self._stepped(members)
        else:
            outputs, states, finite = await self._blocks_advanced(self._blocks, members)
        times.infer_s = time.monotonic() - began_s
        now_ms, fingerprint = self._now_ms(), self._served.fingerprint
        computed: list[tuple[Member, StreamState]] = []
        for member, output, state in zip(members, outputs, states, strict=True):
            if not finite and not (np.isfinite(output).all() and np.isfinite(state.floats).all()):
                member.job.resolve(_not_finite(member))
                continue
            member.outputs = output
            new = apply_chunk(
                member.chunk, member.base, state, fingerprint=fingerprint, now_ms=now_ms
            )
            computed.append((member, new))
        return computed

    async def _stepped(self, members: list[Member]) -> Advanced:
        """Every step of every member."""
        floats = [(m.base.state if m.base else self._zero).floats for m in members]
        outputs, after, finite = await self._compute.infer(
            self._served.runtime,
            [member.rows for member in members],
            np.concatenate(floats).reshape(len(floats), -1),
            self._on_call,
        )
        # Copies: views would keep the whole batch's states alive in the cache.
        states = [State(row.copy(), m.ints) for row, m in zip(after, members, strict=True)]
        return Advanced(outputs, states, finite)

    async def _blocks_advanced(self, blocks: BlockState, members: list[Member]) -> Advanced:
        """Every block of every member that is due."""
        known = [
            Known(m.base.state if m.base else self._zero, m.rows, m.ints, m.chunk.final)
            for m in members
        ]
        width = self._served.outputs.size
        return await advance_blocks(
            self._compute, self._served.runtime, blocks, known, width, self._on_call
        )


def _not_finite(member: Member) -> NotFinite:
    head = member.base.head if member.base else None
    return NotFinite(
        f"expected finite outputs and states of stream {member.key.stream!r}, got NaN or infinity",
        **stream_facts(member.key.stream, head),
    )
