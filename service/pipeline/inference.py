"""From the items of a batch and their streams' states to outputs and the states after.

Encodes the events of all items together, computes them in as few calls of the runtime as they
take, and looks whether what came is finite. An item that cannot be encoded, or whose numbers are
not finite, is settled here, alone. Nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import structlog

from models.spec.blocks import BlockStateLayout
from models.spec.state import State
from service.core.delivery import apply_chunk, stream_facts
from service.core.errors import CarryError, InternalError, InvalidInput, NotFinite
from service.core.values import StreamState
from service.engine.compute import Compute
from service.pipeline.batch_item import BatchItem, StageTimes
from service.pipeline.blocks import BatchOutput, BlockInput, infer_blocks
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
        self._on_call = partial(recorder.record_runtime_call, served.name)
        self._zero = served.state.zero()
        self._blocks = served.blocks

    async def __call__(
        self, items: list[BatchItem], times: StageTimes
    ) -> list[tuple[BatchItem, StreamState]]:
        """The items that could be computed, each with its stream as it is then."""
        encoded = self._encoded(items)
        return await self._infer(encoded, times) if encoded else []

    def _encoded(self, items: list[BatchItem]) -> list[BatchItem]:
        """Encode the items' events under their states; a refusal fails one alone."""
        encoded: list[BatchItem] = []
        states = [item.base.state if item.base else self._zero for item in items]
        pairs = [(m.chunk.steps, state) for m, state in zip(items, states, strict=True)]
        for item, found in zip(items, self._served.encode_many(pairs), strict=True):
            if isinstance(found, Exception):
                item.job.resolve(self._encoding_failed(item, found))
            else:
                item.rows, item.ints = found
                encoded.append(item)
        return encoded

    def _encoding_failed(self, item: BatchItem, error: Exception) -> CarryError:
        if isinstance(error, InvalidInput):
            return InvalidInput(error.detail, **error.facts, stream=item.chunk.key.stream)
        if isinstance(error, CarryError):
            return error
        log.error("encoding_failed", model=self._served.name, exc_info=error)
        return InternalError(f"encoding failed: {type(error).__name__}")

    async def _infer(
        self, items: list[BatchItem], times: StageTimes
    ) -> list[tuple[BatchItem, StreamState]]:
        """Compute the items; each with its stream as it is then, where that is finite."""
        began_s = time.monotonic()
        if self._blocks is None:
            outputs, states, finite = await self._stepped(items)
        else:
            outputs, states, finite = await self._blocks_advanced(self._blocks, items)
        times.infer_s = time.monotonic() - began_s
        now_ms, fingerprint = self._now_ms(), self._served.fingerprint
        computed: list[tuple[BatchItem, StreamState]] = []
        for item, output, state in zip(items, outputs, states, strict=True):
            if not finite and not (np.isfinite(output).all() and np.isfinite(state.floats).all()):
                item.job.resolve(_not_finite(item))
                continue
            item.outputs = output
            new = apply_chunk(item.chunk, item.base, state, fingerprint=fingerprint, now_ms=now_ms)
            computed.append((item, new))
        return computed

    async def _stepped(self, items: list[BatchItem]) -> BatchOutput:
        """Every step of every item."""
        floats = [(m.base.state if m.base else self._zero).floats for m in items]
        outputs, after, finite = await self._compute.infer(
            self._served.runtime,
            [item.rows for item in items],
            np.concatenate(floats).reshape(len(floats), -1),
            self._on_call,
        )
        # Copies: views would keep the whole batch's states alive in the cache.
        states = [State(row.copy(), m.ints) for row, m in zip(after, items, strict=True)]
        return BatchOutput(outputs, states, finite)

    async def _blocks_advanced(
        self, blocks: BlockStateLayout, items: list[BatchItem]
    ) -> BatchOutput:
        """Every block of every item that is due."""
        known = [
            BlockInput(m.base.state if m.base else self._zero, m.rows, m.ints, m.chunk.final)
            for m in items
        ]
        width = self._served.outputs.size
        return await infer_blocks(
            self._compute, self._served.runtime, blocks, known, width, self._on_call
        )


def _not_finite(item: BatchItem) -> NotFinite:
    head = item.base.head if item.base else None
    return NotFinite(
        f"expected finite outputs and states of stream {item.key.stream!r}, got NaN or infinity",
        **stream_facts(item.key.stream, head),
    )
