"""`make load`: run the locustfile, whose exit status is the verdict.

    python -m tests.load [--url http://127.0.0.1:8000] [--scenario steady ...] [--users N] ...

Takes the options of Locust's command line and those of `locustfile.py`.
"""

import sys
from importlib import import_module
from pathlib import Path

from locust.main import main

if __name__ == "__main__":
    locustfile = str(Path(__file__).with_name("locustfile.py"))
    sys.argv = [
        *("make load", "--locustfile", locustfile, "--headless", "--only-summary"),
        *("--loglevel", "WARNING", *sys.argv[1:]),
    ]
    if {"-h", "--help"} & set(sys.argv):
        # Locust prints its help before it reads the locustfile, whose options would be missing
        import_module("tests.load.locustfile")
    main()
