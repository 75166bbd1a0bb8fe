"""Events that wait for the chunk before them of their stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from service.consumers.events import Event


class WaitingEvents:
    """The waiting events of a topic, in order within each stream."""

    def __init__(self) -> None:
        self._streams: dict[str, deque[Event]] = {}

    def __contains__(self, stream: str) -> bool:
        return stream in self._streams

    def add(self, event: Event) -> bool:
        """Add an event behind those of its stream; returns whether it is the only one."""
        waiting = self._streams.get(event.stream)
        if waiting is None:
            self._streams[event.stream] = deque([event])
            return True
        waiting.append(event)
        return False

    def put_back(self, events: Sequence[Event]) -> None:
        """Put events of one stream back in front of those that wait."""
        if events:
            waiting = self._streams.setdefault(events[0].stream, deque())
            waiting.extendleft(reversed(events))

    def take(self, stream: str, most: int) -> list[Event]:
        """Take the events of a stream's next chunk: consecutive ones, or one that is alone; empty
        if none wait."""
        waiting = self._streams.get(stream)
        if waiting is None:
            return []
        first = waiting.popleft()
        events = [first]
        while waiting and len(events) < most and not first.is_alone:
            following = waiting[0]
            position = None if first.position is None else first.position + len(events)
            if following.position != position or following.is_alone:
                break
            events.append(waiting.popleft())
        if not waiting:
            del self._streams[stream]
        return events

    def take_all(self, stream: str) -> Sequence[Event]:
        """Take all events of a stream."""
        return self._streams.pop(stream, ())

    def clear(self) -> int:
        """Forget all events; returns how many."""
        count = sum(map(len, self._streams.values()))
        self._streams.clear()
        return count
