"""The names of a stream's keys in the store.

    {namespace}{pNNNN}:s:{model}:{stream}     the state
    {namespace}{pNNNN}:r:{model}:{stream}     the last reply
    {namespace}{pNNNN}:probe:{name}           a trial commit of readiness, for a millisecond
    {namespace}:meta                          how the store was set up

The braces around `pNNNN` are literal: Redis Cluster hashes what is between them, so that all
streams of a partition lie in one slot. The partition is CRC-32 of `model/stream` modulo P.
A model's name holds no colon, so a key is read back without doubt. Names are not escaped:
the service admits none that would need it.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Final

from service.core.values import StreamKey

_NAMESPACE: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
_GLOB: Final = re.compile(r"([*?\[\]\\^])")
MAX_PARTITIONS: Final = 65_536


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Maps streams to keys and back.

    Attributes:
        namespace: 1 to 32 of `a-z 0-9 _ -`; several services may share one server.
        partitions: P, 1 to 65,536; fixed when a store is made.
    """

    namespace: str
    partitions: int

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ValueError(f"namespace: expected 1 to 32 of a-z 0-9 _ -, got {self.namespace!r}")
        if not 1 <= self.partitions <= MAX_PARTITIONS:
            raise ValueError(f"partitions: expected 1 to {MAX_PARTITIONS}, got {self.partitions}")

    @property
    def meta(self) -> str:
        """The key that says how the store was set up."""
        return f"{self.namespace}:meta"

    def partition(self, key: StreamKey) -> int:
        """The stream's partition, 0 to P-1; the same on every machine and version."""
        return zlib.crc32(f"{key.model}/{key.stream}".encode()) % self.partitions

    def state(self, key: StreamKey) -> str:
        """The key of the stream's state."""
        return self.pair(key)[0]

    def reply(self, key: StreamKey) -> str:
        """The key of the stream's last reply."""
        return self.pair(key)[1]

    def pair(self, key: StreamKey) -> tuple[str, str]:
        """The keys of the stream's state and of its last reply."""
        model, stream = key
        begin = self.partition_prefix(self.partition(key))
        return f"{begin}:s:{model}:{stream}", f"{begin}:r:{model}:{stream}"

    def partition_prefix(self, partition: int) -> str:
        """How every key of a partition begins, and what it is hashed by."""
        return f"{self.namespace}{{p{partition:04d}}}"

    def probe(self, partition: int, name: str) -> str:
        """A key for a trial commit in the slot of a partition; never that of a stream."""
        return f"{self.partition_prefix(partition)}:probe:{name}"

    def pattern(self, model: str, prefix: str) -> str:
        """The glob that matches the states of a model's streams whose names begin so."""
        escaped = _GLOB.sub(r"\\\1", f":s:{model}:{prefix}")
        return f"{self.namespace}{{p*}}{escaped}*"

    def parse(self, key: str) -> StreamKey | None:
        """The stream whose state key this is, or None for any other key."""
        found = re.fullmatch(r"(.*?)\{p(\d{4,})\}:s:([^:]+):(.+)", key, re.DOTALL)
        if found is None or found[1] != self.namespace:
            return None
        stream = StreamKey(found[3], found[4])
        return stream if self.state(stream) == key else None
