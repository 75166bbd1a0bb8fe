"""Planted: a deletion deletes whatever there is.

One whose connection was given up, and that arrives after its retry, deletes what was begun since.
"""

from tests.faults.planting import replace_in_script

replace_in_script(
    "delete",
    "if mark ~= '' and (expected == '' or string.sub(mark, 1, #expected) ~= expected) then",
    "if false then",
)
