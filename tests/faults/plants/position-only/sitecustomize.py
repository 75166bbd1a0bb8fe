"""Planted: a commit compares the position alone, not epoch and tag.

After a rollback a stream may come to the same position with other events; a worker that remembers
the old state there then goes on from it.
"""

from service.domain import Mark
from service.state import codec
from tests.faults.planting import replace_in_script

codec.mark_bytes = lambda mark: mark.position.to_bytes(8, "little")
codec.raw_mark = lambda value: Mark(b"", b"", int.from_bytes(value[56:64], "little"))
replace_in_script("commit", "string.sub(header, 33, 56)", "string.sub(header, 57, 64)")
replace_in_script("delete", "string.sub(header, 33, 56)", "string.sub(header, 57, 64)")
