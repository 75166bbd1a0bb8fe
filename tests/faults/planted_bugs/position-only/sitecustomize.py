"""Planted: a commit compares the position alone, not epoch and tag.

After a rollback a stream may come to the same position with other events; a worker that remembers
the old state there then goes on from it.
"""

from service.core.values import StreamHead
from service.store import codec
from tests.faults.script_patch import replace_in_script

codec.head_bytes = lambda head: head.position.to_bytes(8, "little")
codec.raw_head = lambda value: StreamHead(b"", b"", int.from_bytes(value[56:64], "little"))
replace_in_script("commit", "string.sub(header, 33, 56)", "string.sub(header, 57, 64)")
replace_in_script("delete", "string.sub(header, 33, 56)", "string.sub(header, 57, 64)")
