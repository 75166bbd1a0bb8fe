"""Planted: a commit creates a stream where one was expected and is gone.

A worker that remembers a stream that was deleted, or that expired, brings it back.
"""

from tests.faults.script_patch import replace_in_script

replace_in_script("commit", "if expected ~= '' then", "if false then")
