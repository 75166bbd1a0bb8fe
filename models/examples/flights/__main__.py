"""`python -m models.examples.flights`: train the example from nothing and compare it.

Prepares the departures, trains `spec.yaml` on January to September, chooses the epoch by
October, scores November and December beside three baselines, and writes the artifact with
report and plots to `models/pretrained/flights` (or to the path given). `--show` prints the
report's tables.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import orjson

from models.errors import ModelsError
from models.examples.flights.data import flight_events
from models.spec_file import read_spec
from models.training.commands import REPORT, train_frame

HERE = Path(__file__).parent
SPEC = HERE / "spec.yaml"
OUT = HERE.parents[1] / "pretrained" / "flights"


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(prog="python -m models.examples.flights", description=__doc__)
    parser.add_argument("out", nargs="?", type=Path, default=OUT, help=f"default: {OUT}")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped training")
    parser.add_argument("--show", action="store_true", help="print the report that is there")
    options = parser.parse_args()
    if options.show:
        from models.training.report import report_lines

        print("\n".join(report_lines(orjson.loads((options.out / REPORT).read_bytes()))))
        return
    start = time.monotonic()
    try:
        artifact = train_frame(
            read_spec(SPEC),
            flight_events(),
            options.out,
            resume=options.resume,
            overwrite=True,
            source="flights",
        )
    except ModelsError as error:
        raise SystemExit(f"flights: {error}") from error
    print(
        f"{options.out}: model {artifact.spec.name}, version {artifact.version}, "
        f"after {time.monotonic() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
