"""Planted: a deletion leaves no tombstone.

A creation from a given-up connection that arrives after the deletion brings the stream back.
"""

from tests.faults.script_patch import replace_in_script

replace_in_script(
    "delete",
    "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])",
    "",
)
