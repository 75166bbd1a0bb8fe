"""Middle stages of a batch: encode the events, run the network, check that results are finite.

The items of a batch are encoded together and computed in as few runtime calls as possible. An item
that cannot be encoded, or whose results are not finite, is resolved here, without effect on the
others. If any of them has a reset, all are computed in segments (`segments`). Nothing is stored.
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
from service.core.values import FloatRows
from service.engine.compute import Compute
from service.pipeline.batch_item import BatchItem, Computed, StageTimes
from service.pipeline.blocks import BatchOutput, BlockInput, infer_blocks
from service.pipeline.recorder import Recorder
from service.pipeline.segments import infer_segments
from service.pipeline.served_model import Segment, ServedModel

log = structlog.get_logger(__name__)


class Inference:
    """Encodes and computes the chunks of one model.

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
        self._initial = served.initial
        self._runtime_state = served.runtime_state
        self._blocks = served.blocks
        self._resets_by_itself = served.artifact.spec.resets.is_active

    async def __call__(self, items: list[BatchItem], times: StageTimes) -> list[Computed]:
        """Compute the items; returns those that succeeded, with their streams after the chunk."""
        if self._resets_by_itself or any(m.chunk.steps.resets for m in items):
            encoded = self._encode_segments(items)
        else:
            encoded = self._encode(items)
        return await self._infer(encoded, times) if encoded else []

    def _encode_segments(self, items: list[BatchItem]) -> list[BatchItem]:
        """Encode the items' events as `_encode`, those with resets in segments."""
        served = self._served
        whole: list[BatchItem] = []
        cut: list[BatchItem] = []
        for item in items:
            steps, base = item.chunk.steps, item.base
            state, position = (base.state, base.head.position) if base else (self._initial, 0)
            try:
                resets = served.find_resets(steps, state, position)
                if resets:
                    item.segments = served.encode_segments(steps, state, resets)
            except Exception as error:
                item.job.resolve(self._encoding_error(item, error))
                continue
            (cut if resets else whole).append(item)
        encoded = self._encode(whole)
        if cut:
            for item in encoded:
                state = item.base.state if item.base else self._initial
                item.segments = [Segment(state, item.rows, item.ints)]
        return encoded + cut

    def _encode(self, items: list[BatchItem]) -> list[BatchItem]:
        """Encode the items' events, given their states; an error fails its item only."""
        encoded: list[BatchItem] = []
        pairs = [(m.chunk.steps, m.base.state if m.base else self._initial) for m in items]
        for item, result in zip(items, self._served.encode_many(pairs), strict=True):
            if isinstance(result, Exception):
                item.job.resolve(self._encoding_error(item, result))
            else:
                item.rows, item.ints = result
                encoded.append(item)
        return encoded

    def _encoding_error(self, item: BatchItem, error: Exception) -> CarryError:
        if isinstance(error, InvalidInput):
            return InvalidInput(error.detail, **error.facts, stream=item.chunk.key.stream)
        if isinstance(error, CarryError):
            return error
        log.error("encoding_failed", model=self._served.name, exc_info=error)
        return InternalError(f"encoding failed: {type(error).__name__}")

    async def _infer(self, items: list[BatchItem], times: StageTimes) -> list[Computed]:
        """Run the network on encoded items; returns those with finite results."""
        times.infer_began_s = began_s = time.monotonic()
        if items[0].segments:
            outputs, states, finite = await infer_segments(
                self._compute, self._served, [m.segments for m in items], self._on_call
            )
        elif self._blocks is None:
            outputs, states, finite = await self._infer_steps(items)
        else:
            outputs, states, finite = await self._infer_blocks(self._blocks, items)
        times.infer_s = time.monotonic() - began_s
        now_ms, fingerprint = self._now_ms(), self._served.fingerprint
        computed: list[Computed] = []
        for item, output, state in zip(items, outputs, states, strict=True):
            if not finite and not self._is_finite(output, state):
                item.job.resolve(_not_finite(item))
                continue
            item.outputs = output
            new = apply_chunk(item.chunk, item.base, state, fingerprint=fingerprint, now_ms=now_ms)
            computed.append((item, new))
        return computed

    def _is_finite(self, output: FloatRows, state: State) -> bool:
        return bool(np.isfinite(output).all()) and self._served.state.is_finite(state)

    async def _infer_steps(self, items: list[BatchItem]) -> BatchOutput:
        """Compute every step of every item."""
        pack = self._runtime_state.pack
        before = [pack(m.base.state if m.base else self._initial) for m in items]
        outputs, after, finite = await self._compute.infer(
            self._served.runtime,
            [item.rows for item in items],
            np.concatenate(before).reshape(len(before), -1),
            self._on_call,
        )
        # copies, since views would keep the states of the whole batch alive in the cache
        unpack = self._runtime_state.unpack
        states = [unpack(row, m.ints) for row, m in zip(after, items, strict=True)]
        return BatchOutput(outputs, states, finite)

    async def _infer_blocks(self, blocks: BlockStateLayout, items: list[BatchItem]) -> BatchOutput:
        """Compute every block of every item whose window is complete."""
        inputs = [
            BlockInput(m.base.state if m.base else self._initial, m.rows, m.ints, m.chunk.final)
            for m in items
        ]
        width = self._served.outputs.size
        return await infer_blocks(
            self._compute, self._served.runtime, blocks, inputs, width, self._on_call
        )


def _not_finite(item: BatchItem) -> NotFinite:
    head = item.base.head if item.base else None
    return NotFinite(
        f"expected finite outputs and states of stream {item.key.stream!r}, got NaN or infinity",
        **stream_facts(item.key.stream, head),
    )
