"""Planted: a deletion leaves nothing behind.

A creation whose connection was given up, and that arrives after the stream was deleted, brings it
back.
"""

from tests.faults.planting import replace_in_script

replace_in_script(
    "delete",
    "redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])",
    "",
)
