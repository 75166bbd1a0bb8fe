"""What must hold in every state of the store, and for every item that a commit wrote."""

from functools import lru_cache

from tests.protocol.consumer.state import HTTP_CLIENT, Entry, Item, Store
from tests.protocol.invariants import Violation
from tests.protocol.state import STREAMS, ChunkId, Version


def check_item(item: Item, before: Version, outcome: str) -> None:
    """A chunk that is written continues the stored state."""
    if item.kind == "chunk" and outcome == "done" and item.base != before:
        raise Violation(f"{item} replaces {before}")


@lru_cache(maxsize=1 << 16)
def check_store(store: Store) -> None:
    """The output topic holds the output of each event once, in order and as the sequential run
    computes it; what is acknowledged is committed."""
    for stream in range(len(STREAMS)):
        _check_outputs(store, stream)
    for entry in store.topic[: store.delivered]:
        if entry not in store.pending:
            _check_acknowledged(entry, store.states[entry.stream])


def _check_outputs(store: Store, stream: int) -> None:
    state, value, expected = store.states[stream], 0, []
    for position, chunk_id in enumerate(state.chunks):
        value = value * 8 + chunk_id[0].events[0]
        if chunk_id[0].client != HTTP_CLIENT and chunk_id not in store.loaded:
            expected.append((chunk_id, position, value))
    outputs = [output for output in store.outputs if output.entry.stream == stream]
    actual = [(output.entry.chunk_id, output.position, output.value) for output in outputs]
    if len(state.chunks) > len(set(state.chunks)):
        raise Violation(f"{state} holds an event twice")
    if actual != expected:
        raise Violation(f"the outputs {_names(actual)} are not those of {state}")
    lost = [output.entry for output in outputs if output.entry not in store.topic]
    if lost:
        raise Violation(f"{lost[0]} has an output, and the store lost its entry")
    appended = [store.topic.index(o.entry) for o in outputs if o.entry.operation.position is None]
    if appended != sorted(appended):
        raise Violation(f"the outputs {_names(actual)} are not in the order of their entries")


def _check_acknowledged(entry: Entry, state: Version) -> None:
    position, history = entry.operation.position, list(state.chunks)
    if entry.chunk_id in state.chunks:
        return
    is_taken = position is not None and position < len(history)
    if not is_taken or history[position][0].client != HTTP_CLIENT:
        raise Violation(f"{entry} is acknowledged, and is not in {state}")


def _names(outputs: list[tuple[ChunkId, int, float]]) -> str:
    return "[" + ", ".join(f"{chunk[0]} @{position}" for chunk, position, _ in outputs) + "]"
