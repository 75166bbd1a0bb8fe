"""Planted: a deletion does not compare.

One from a given-up connection that arrives after its retry deletes a stream created since.
"""

from tests.faults.script_patch import replace_in_script

replace_in_script(
    "delete",
    "if head ~= '' and (expected == '' or string.sub(head, 1, #expected) ~= expected) then",
    "if false then",
)
