"""Writes streams of known kinds and their specifications: `python -m examples.synthetic`."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from examples.synthetic.streams import KINDS, synthetic_frame, synthetic_spec


def main() -> None:
    """Write `KIND.csv` and `KIND.yaml` of every kind."""
    parser = argparse.ArgumentParser(prog="python -m examples.synthetic")
    parser.add_argument("out", nargs="?", type=Path, default=Path("build/examples/synthetic"))
    parser.add_argument("--streams", type=int, default=20)
    parser.add_argument("--events", type=int, default=500, help="events of a stream")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        frame = synthetic_frame(kind, options.streams, options.events, options.seed)
        frame.write_csv(options.out / f"{kind}.csv")
        text = yaml.safe_dump(synthetic_spec(kind), sort_keys=False)
        (options.out / f"{kind}.yaml").write_text(text, encoding="utf-8")
        print(f"carry train {options.out / kind}.yaml {options.out / kind}.csv OUT")


if __name__ == "__main__":
    main()
