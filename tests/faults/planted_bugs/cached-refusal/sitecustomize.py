"""Planted bug: chunks are evaluated against the cached state of their stream, if there is one.

Another worker may have changed the stream; the rejection then denies what was acknowledged.
"""

from service.pipeline.chunk_load import ChunkLoader

load = ChunkLoader._load


async def evaluate_cached(self, members):
    found = await load(self, members)
    copies = [self._cache.get(member.key) for member in members]
    return [copy or stored for copy, stored in zip(copies, found, strict=True)]


ChunkLoader._load = evaluate_cached
