"""Writes labelled series by the generator GutenTAG, in an environment of its own.

`python generate.py KINDS OUT.csv` needs the package `timeeval-GutenTAG`, and nothing of Carry.
Each series has its own base oscillation, amplitude, offset and noise, and two anomalies in the last
two fifths, both of kinds of one of two disjoint sets:

    development   extremum, mean, platform, variance
    held_out      amplitude, frequency, pattern, pattern-shift, trend

Columns: `series`, `time` (one event each half hour), `value`, `anomaly`.
"""

from __future__ import annotations

import random
import sys
from typing import Any

SERIES, STEPS, ANOMALIES, CLEAN = 40, 4800, 2, 0.6
PERIOD_STEPS = 48
START = "2026-01-01T00:00:00Z"
BASES = ("sine", "square", "sawtooth", "ecg", "random-walk", "cylinder-bell-funnel")
PERIODIC = BASES[:4]
KINDS = {
    "development": ("extremum", "mean", "platform", "variance"),
    "held_out": ("amplitude", "frequency", "pattern", "pattern-shift", "trend"),
}
APPLICABLE = {
    "frequency": PERIODIC,
    "pattern": (*PERIODIC, "cylinder-bell-funnel"),
    "pattern-shift": PERIODIC,
}
"""The base oscillations that a kind can be in, if not all."""
SEEDS = {"development": 1, "held_out": 2}


def configuration(kinds: str) -> list[dict[str, Any]]:
    """GutenTAG's configuration of each series."""
    draw = random.Random(SEEDS[kinds])  # noqa: S311
    series = []
    for number in range(SERIES):
        base = draw.choice(BASES)
        possible = [kind for kind in KINDS[kinds] if base in APPLICABLE.get(kind, BASES)]
        chosen = [draw.choice(possible) for _ in range(ANOMALIES)]
        oscillation = {
            "kind": base,
            "amplitude": draw.uniform(0.5, 20),
            "variance": draw.uniform(0.02, 0.2),
            "offset": draw.uniform(-50, 50),
        }
        if base in PERIODIC:
            oscillation["frequency"] = 100 / PERIOD_STEPS
        elif base == "cylinder-bell-funnel":
            oscillation |= {"avg-pattern-length": PERIOD_STEPS, "variance-pattern-length": 0.2}
        anomalies = []
        for at, kind in enumerate(chosen):
            place = (at + draw.uniform(0.1, 0.6)) / ANOMALIES
            start = int(STEPS * (CLEAN + (1 - CLEAN) * place))
            if kind in APPLICABLE:
                start -= start % PERIOD_STEPS
            anomalies.append(
                {
                    "exact-position": start,
                    "length": _length(draw, kind),
                    "channel": 0,
                    "kinds": [{"kind": kind, **_parameters(draw, kind, oscillation)}],
                }
            )
        series.append(
            {
                "name": f"{kinds}-{number:03d}-{base}",
                "length": STEPS,
                "base-oscillations": [oscillation],
                "anomalies": anomalies,
            }
        )
    return series


def _length(draw: random.Random, kind: str) -> int:
    if kind == "extremum":
        return 1
    # the generator's transition of a trend takes a fifth of it
    unit = PERIOD_STEPS + 2 if kind == "trend" else PERIOD_STEPS
    return unit * draw.randint(1, 3)


def _parameters(draw: random.Random, kind: str, oscillation: dict[str, Any]) -> dict[str, Any]:
    amplitude, sign = oscillation["amplitude"], draw.choice((-1, 1))
    if kind == "extremum":
        return {"min": sign < 0, "local": False}
    if kind == "mean":
        return {"offset": sign * amplitude * draw.uniform(0.5, 1.5)}
    if kind == "platform":
        return {"value": sign * amplitude * draw.uniform(0, 1)}
    if kind == "variance":
        return {"variance": oscillation["variance"] * draw.uniform(2.5, 6)}
    if kind == "amplitude":
        return {"amplitude_factor": draw.choice((0.3, 0.5, 1.6, 2.2))}
    if kind == "frequency":
        return {"frequency_factor": draw.choice((0.5, 2, 3))}
    if kind == "pattern":
        return {"sinusoid_k": 10.0, "square_duty": 0.8, "sawtooth_width": 0.4}
    if kind == "pattern-shift":
        return {"shift_by": 10, "transition_window": 12}
    slope = {"kind": "polynomial", "polynomial": [0, sign * amplitude / PERIOD_STEPS]}
    return {"oscillation": slope}


def main(kinds: str, out: str) -> None:
    """Generate the series of one set of kinds."""
    import pandas as pd
    from gutenTAG import GutenTAG

    generator = GutenTAG(seed=SEEDS[kinds])
    generator.load_config_dict({"timeseries": configuration(kinds)})
    times = pd.date_range(START, periods=STEPS, freq="30min").strftime("%Y-%m-%dT%H:%M:%SZ")
    frames = []
    for data in generator.generate(return_timeseries=True):
        values = data.timeseries
        frame = pd.DataFrame({"time": times, "value": values.iloc[:, 0].to_numpy()})
        frame.insert(0, "series", data.name)
        frame["anomaly"] = values["is_anomaly"].to_numpy()
        frames.append(frame)
    pd.concat(frames).to_csv(out, index=False, float_format="%.6g")


if __name__ == "__main__":
    main(*sys.argv[1:])
