"""What must hold in every system state: checked whenever the store writes and a client is answered.

By induction over the actions, a stream's version has the history that was written to the store,
which holds no chunk twice; so it is enough to check what an action changes.
"""

from service.core.delivery import acknowledged_head
from service.core.errors import CarryError
from tests.protocol import histories
from tests.protocol.state import (
    Client,
    ClientScript,
    Command,
    Keys,
    Operation,
    Request,
    Scenario,
    Version,
)

NOT_APPLIED = (
    *("position_ahead", "epoch_mismatch", "state_changed"),
    *("stream_exists", "conflict", "store_unavailable"),
)
"""Error codes that say for certain that the request was not applied."""


class Violation(Exception):
    """An invariant of the protocol does not hold; one sentence."""


def _forbid(violated: object, message: str, *names: object) -> None:
    if violated:
        raise Violation(message.format(*names))


def check_write(command: Command, before: Version) -> None:
    """A write is not too late; a commit continues an existing stream, once, from its history."""
    request, deletes = command.request, command.kind == "delete"
    late = command.outdated
    message = "the stream was deleted or rewound after {}, which is written now"
    _forbid(late and not deletes, message, request)
    _forbid(late, "{} was answered, and is executed now on {}, which came later", request, before)
    is_denied = command.outcome == "not applied"
    _forbid(is_denied, "{} was answered as not applied, and it is written now", request)
    is_created = command.base.stream and not before.stream and not deletes
    _forbid(is_created, "{} expected a stream, which did not exist and is brought back", request)
    if command.kind == "commit":
        operation, held = request.operation, list(before.chunks)
        # without an epoch, a late duplicate of a start replaces what followed the start
        is_replaced = operation.starts_over and not request.named and held != [request.chunk_id]
        is_twice = request.chunk_id in held and not is_replaced
        _forbid(is_twice, "the stream holds {} twice", request)
        is_other = command.base.chunks != before.chunks
        _forbid(is_other, "{} continues {}, and replaces {}", request, command.base, before)


def check_state(version: Version) -> None:
    """A state is that of its model after the events since the position from which it is said to be
    computed: after all of them if it is exact."""
    if version.stream is None:
        return
    events = version.events[version.since or 0 :]
    expected = ([0.0, *histories.advance(version.artifact, 0.0, events)])[-1]
    message = "{} has the state {:o}, and its events lead to {:o}"
    _forbid(version.value != expected, message, version, version.value, int(expected))


def check_history(keys: Keys) -> None:
    """A valid history has the last events of the stream, and states that it had."""
    if not histories.is_valid(keys):
        return
    record, (_, entries, snapshots, _) = keys.state, keys.history
    position = entries[0].start if entries else 0
    for entry in entries:
        _forbid(entry.start != position, "the history of {} has a gap: {}", record, entries)
        position += len(entry.events)
    kept = tuple(event for entry in entries for event in entry.events)
    is_other = kept != record.events[entries[0].start :] if entries else False
    _forbid(is_other, "the history of {} has other events: {}", record, entries)
    for snapshot in snapshots:
        prefix = record.events[: snapshot.head.position]
        _forbid(snapshot.events != prefix, "{} has the snapshot {}", record, snapshot)


def check_stored_reply(keys: Keys) -> None:
    """The reply that is stored beside a state is that of its commit, or of the commit before its
    acknowledgement."""
    is_other = keys.state and keys.reply and keys.reply != keys.state
    if is_other and keys.state.head and keys.reply.head:
        written = keys.reply.head
        is_other = keys.state.head not in (written, acknowledged_head(written))
    _forbid(is_other, "the reply stored beside {} is another commit's, {}", *keys)


def check_acknowledged_chunk(
    scenario: Scenario, request: Request, answer: Version, stored: Version, client: Client
) -> None:
    """An acknowledged chunk is in the surviving history, the answer is that of its own commit,
    and everything that its client relies on is before it."""
    operation, written = request.operation, stored.chunks.get(request.chunk_id)
    _forbid(written is None, "{} is acknowledged, and is not in the history", request)
    message = "{} is answered with the reply of another commit, {}; its own led to {}"
    _forbid(written != answer.head, message, request, answer, written)
    script = scenario.clients[operation.client]
    # an epoch ends by a rewind, but not where the store is rolled back
    is_noticed = operation.guard == "epoch" and not scenario.faults.rollbacks
    if script.alone or operation.guard == "if-match" or is_noticed:
        earlier = script.operations[: operation.index]
        firsts = [other.index + 1 for other in earlier if other.kind == "delete"]
        firsts += [other.index for other in (*earlier, operation) if other.starts_over]
        for other in earlier[max(firsts, default=0) :]:
            is_lost = client.applied[other.index] and (other, 0) not in stored.chunks
            _forbid(
                is_lost, "{} is acknowledged, and the loss of {} is not noticed", request, other
            )


def check_acknowledged_deletion(request: Request, stored: Version, client: Client) -> None:
    """An acknowledged deletion deletes the chunks that its client knew to be applied."""
    operation = request.operation
    for chunk, _ in stored.chunks:
        is_earlier = chunk.client == operation.client and chunk.index < operation.index
        is_kept = is_earlier and client.applied[chunk.index]
        _forbid(is_kept, "{} is acknowledged, and {} is still there", request, chunk)


def check_failure(
    scenario: Scenario, request: Request, error: CarryError, stored: Version, client: Client
) -> None:
    """What a failure says is true: the stream's head, and what was not applied."""
    operation, facts, code, head = request.operation, error.facts, error.code, stored.head
    if "position" in facts:
        truth = (head.epoch.hex(), head.position, head.tag.hex()) if head else (None, 0, None)
        is_false = (facts["epoch"], facts["position"], facts["tag"]) != truth
        _forbid(is_false, "{} says {}, and the stream is {}", code, facts, stored)
    is_applied = request.wrote and _has_written(request, stored)
    message = "{} is answered with {}, and it is applied"
    _forbid(code in NOT_APPLIED and is_applied, message, request, code)
    if operation.kind != "chunk":
        return
    script, is_missing = scenario.clients[operation.client], request.chunk_id not in stored.chunks
    is_certain = code == "already_applied" or (code == "position_behind" and script.alone)
    is_certain = is_certain and not _is_replaced(script, operation, client)
    message = "{} is answered with {}, and is not in the history"
    _forbid(is_certain and is_missing, message, request, code)
    if code == "position_ahead" and script.alone:
        for other in script.operations:
            is_before = other.kind == "chunk" and (other.position or 0) < facts["expected"]
            is_lost = client.applied[other.index] and (other, 0) not in stored.chunks
            is_lost = is_lost and not _is_replaced(script, other, client)
            _forbid(
                is_before and is_lost, "{} is answered with {}, which hides a loss", request, code
            )


def _is_replaced(script: ClientScript, operation: Operation, client: Client) -> bool:
    """Whether the client has started the stream over since."""
    later = script.operations[operation.index + 1 :]
    return any(other.starts_over and client.sent[other.index] for other in later)


def _has_written(request: Request, stored: Version) -> bool:
    """Whether the stream has what an earlier try of the request wrote."""
    if request.operation.kind == "chunk" or request.operation.acknowledges:
        return stored.chunks.get(request.chunk_id) == request.wrote.head
    if request.operation.kind == "delete":
        return True
    return stored.head is not None and stored.head.epoch == request.wrote.head.epoch
