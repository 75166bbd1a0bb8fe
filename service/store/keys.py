"""Names of streams in the store.

    {namespace}{pNNNN}:s:{model}:{stream}     the state
    {namespace}{pNNNN}:r:{model}:{stream}     the last reply
    {namespace}{pNNNN}:h:{model}:{stream}     the recent events of its history, a list
    {namespace}{pNNNN}:v:{model}:{stream}     its snapshots and its states for other versions of the
                                              model, a hash (`lua/history.lua`)
    {namespace}{pNNNN}:a:{model}              the index of the partition's open alarms of a model, a
                                              sorted set of streams (`lua/compare_and_set.lua`)
    {namespace}{pNNNN}:probe:{name}           trial commit of the readiness check, TTL of 1 ms
    {namespace}:meta                          format and number of partitions of the store
    {namespace}:token-key                     the key that signs state tokens, 32 random bytes
    {namespace}:keys                          a hash of the access keys' records by id (see
                                              `service.access.keys`), and their version
    {namespace}:usage:{id}                    a hash of the streams that an access key with a quota
                                              has created, and of their bytes
    {namespace}:rate:{id}:{limit}             a hash of a token bucket that limits an access key
    {namespace}:models                        a hash of the records of models with several versions
                                              (`service.pipeline.model_aliases`), and their version
    {namespace}:models:loaded                 a hash of the versions that each process has loaded
    {namespace}:topics                        a hash of the topics that consumer groups read and
                                              write (`service.store.topics.TopicRegistration`)

The braces around `pNNNN` are literal, a hash tag of Redis Cluster: all streams of a partition are
stored in one slot. The partition is CRC-32 of `model/stream` modulo P. A model's name contains no
colon, so a key can be parsed unambiguously. Names are not escaped: the service accepts none that
would need it.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from service.core.values import StreamKey

_GLOB: Final = re.compile(r"([*?\[\]\\^])")
MAX_PARTITIONS: Final = 65_536


@dataclass(frozen=True, slots=True)
class KeySpace:
    """Maps streams to keys and back.

    Attributes:
        namespace: 1 to 32 of `a-z 0-9 _ -`; several services may share one server.
        partitions: P, 1 to 65,536; fixed when a store is created.
    """

    namespace: str
    partitions: int

    @property
    def meta(self) -> str:
        """The key of the store's format and number of partitions."""
        return f"{self.namespace}:meta"

    @property
    def token_key(self) -> str:
        """The key of the secret that signs state tokens."""
        return f"{self.namespace}:token-key"

    @property
    def access_keys(self) -> str:
        """The key of the access keys' records."""
        return f"{self.namespace}:keys"

    @property
    def models(self) -> str:
        """The key of the records of models with several versions."""
        return f"{self.namespace}:models"

    @property
    def loaded_models(self) -> str:
        """The key of the versions that each process has loaded."""
        return f"{self.namespace}:models:loaded"

    @property
    def topics(self) -> str:
        """The key of the registrations of the topics that consumers read."""
        return f"{self.namespace}:topics"

    def stream_usage(self, key_id: str) -> str:
        """The key of the streams that an access key with a quota has created."""
        return f"{self.namespace}:usage:{key_id}"

    def rate(self, bucket: str) -> str:
        """The key of a token bucket of an access key."""
        return f"{self.namespace}:rate:{bucket}"

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
        model, stream = key.model, key.stream
        prefix = _partition_prefix(self.namespace, self.partition(key))
        return f"{prefix}:s:{model}:{stream}", f"{prefix}:r:{model}:{stream}"

    def all_of(self, key: StreamKey) -> list[str]:
        """The keys of the stream's state, of its last reply, and the two of its history."""
        prefix = _partition_prefix(self.namespace, self.partition(key))
        return [f"{prefix}:{kind}:{key.model}:{key.stream}" for kind in "srhv"]

    def alarm_index(self, partition: int, model: str) -> str:
        """The key of the index of a partition's open alarms of a model."""
        return f"{self.partition_prefix(partition)}:a:{model}"

    def partition_prefix(self, partition: int) -> str:
        """The prefix of all keys of a partition, with the hash tag."""
        return _partition_prefix(self.namespace, partition)

    def probe(self, partition: int, name: str) -> str:
        """A key for a trial commit in the slot of a partition; never a stream's key."""
        return f"{self.partition_prefix(partition)}:probe:{name}"

    def pattern(self, model: str | None, prefix: str) -> str:
        """The glob pattern of the state keys of streams with a name prefix, of a model or of all.

        For all models it also matches names that have the prefix behind a colon.
        """
        escaped = [_GLOB.sub(r"\\\1", text) for text in (model or "", prefix)]
        return f"{self.namespace}{{p*}}:s:{escaped[0] if model else '*'}:{escaped[1]}*"

    def parse(self, key: str) -> StreamKey | None:
        """Parse a state key; None for any other key."""
        match = re.fullmatch(r"(.*?)\{p(\d{4,})\}:s:([^:]+):(.+)", key, re.DOTALL)
        if match is None or match[1] != self.namespace:
            return None
        stream = StreamKey(match[3], match[4])
        return stream if self.state(stream) == key else None


def join_name(key: StreamKey) -> str:
    """The model and the stream in one string; no name of a model contains a colon."""
    return f"{key.model}:{key.stream}"


def split_name(name: str) -> StreamKey:
    """The inverse of `join_name`."""
    model, _, stream = name.partition(":")
    return StreamKey(model, stream)


@lru_cache(maxsize=MAX_PARTITIONS)
def _partition_prefix(namespace: str, partition: int) -> str:
    return f"{namespace}{{p{partition:04d}}}"
