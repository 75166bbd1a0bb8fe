"""The `sitecustomize` of a server that is measured: counts what it does between two signals.

At each SIGUSR2 it appends a line of JSON to the file COUNTING_MARKS: what the process did since the
last one. Its windows count Python calls and allocations in turn, since counting the one makes the
other; with COUNTING_INSTRUCTIONS, callgrind counts instructions, and writes each window to a file.
"""

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

if "COUNTING_MARKS" in os.environ:
    marks = Path(os.environ.pop("COUNTING_MARKS"))
    instructions = bool(os.environ.get("COUNTING_INSTRUCTIONS"))
    library = ctypes.PyDLL(os.environ["COUNTING_LIBRARY"])
    library.read_allocations.restype = ctypes.c_ulong
    monitoring = getattr(sys, "monitoring", None)  # new in Python 3.12
    calls = allocations_before = windows = 0

    def count_call(code, offset):
        """One more function of Python begins."""
        global calls
        calls += 1

    def mark(number, frame):
        """End a window and begin the next."""
        global calls, allocations_before, windows
        line = {"window": windows}
        if instructions:
            library.mark_instructions()
        elif windows % 2 and monitoring:
            monitoring.set_events(monitoring.PROFILER_ID, 0)
            line["calls"] = calls
        elif windows:
            line["allocations"] = library.read_allocations() - allocations_before
        windows += 1
        with marks.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not instructions and windows % 2 and monitoring:
            calls = 0
            monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.PY_START)
        allocations_before = library.read_allocations()

    if monitoring and not instructions:
        monitoring.use_tool_id(monitoring.PROFILER_ID, "carry-bench")
        monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.PY_START, count_call)
    if not instructions:
        library.count_allocations()
    signal.signal(signal.SIGUSR2, mark)
