"""The share of normal events whose tail probability is small, pooled and by stream.

Of normal events, a share p has a tail probability below p, if it keeps what it says. Single streams
may differ from that by far while the pooled share is right, so each stream has its share too.

Small probabilities come in groups, which makes shares less certain than of independent events: the
variance of the counts in blocks of time, relative to that of independent ones, divides the number
of events (the design effect of Kish, 1965) in Wilson's interval. The pooled interval contains that,
and the one from resampling streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.detection.scoring import FAR_ABOVE, WORST, draw_streams, middle_95

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

LEVELS: Final = (0.01, 0.001)
BLOCKS: Final = 20
"""Blocks of time of each stream, to measure how much small probabilities come in groups."""
NORMAL_95: Final = 1.959964
MATERIAL: Final = 1.5
"""A pooled share that differs by less than this factor is as expected."""


def tail_shares(
    probability: Floats,
    streams: Sequence[tuple[str, NDArray[np.int64]]],
    seed: int = 0,
    of: str = "normal events",
) -> dict[str, Any] | None:
    """The shares of events below each of `LEVELS`; None without an event.

    Args:
        probability: [rows], tail probabilities.
        streams: the name of each stream, and which rows are its normal events.
        of: what these events are called.

    Returns:
        `of`, `events`, `streams`, and `levels`: for each, `level`, `share` and `interval` of all
        events; `median` of the streams' shares; `far_above`, the share of the streams with a share
        more than `FAR_ABOVE` times the level and an interval above the level; and `worst`, up to
        `WORST` streams with the largest shares (`stream`, `share`, `interval`, `events`).
    """
    parts = [(name, probability[rows]) for name, rows in streams]
    parts = [(name, own) for name, own in parts if len(own)]
    if not parts:
        return None
    sizes = np.array([len(own) for _, own in parts], np.float64)
    return {
        "of": of,
        "events": int(sizes.sum()),
        "streams": len(parts),
        "levels": [
            _level(
                [name for name, _ in parts], [own < level for _, own in parts], sizes, level, seed
            )
            for level in LEVELS
        ],
    }


def _level(
    names: list[str], below: list[Bools], sizes: Floats, level: float, seed: int
) -> dict[str, Any]:
    counts = np.array([own.sum() for own in below], np.float64)
    effect = _design_effect(below)
    intervals = [_wilson(*each, effect) for each in zip(counts, sizes, strict=True)]
    weights = draw_streams(len(names), seed)
    drawn = middle_95((weights @ counts) / (weights @ sizes)) or []
    whole = _wilson(counts.sum(), sizes.sum(), effect)
    shares = counts / sizes
    is_far = [
        share > FAR_ABOVE * level and low > level
        for share, (low, _) in zip(shares, intervals, strict=True)
    ]
    return {
        "level": level,
        "share": float(counts.sum() / sizes.sum()),
        "interval": [min(whole + drawn), max(whole + drawn)],
        "median": float(np.median(shares)),
        "far_above": float(np.mean(is_far)),
        "worst": [
            {
                "stream": names[at],
                "share": float(shares[at]),
                "interval": intervals[at],
                "events": int(sizes[at]),
            }
            for at in np.argsort(-shares, kind="stable")[:WORST].tolist()
        ],
    }


def _design_effect(below: list[Bools]) -> float:
    """The variance of counts in blocks over that of independent events, at least 1."""
    measured = expected = 0.0
    for own in below:
        if len(own) >= 2 * BLOCKS:
            counts = [block.sum() for block in np.array_split(own, BLOCKS)]
            measured += float(np.var(counts, ddof=1))
            expected += float(np.mean(counts) * (1.0 - own.mean()))
    return max(1.0, measured / expected) if expected else 1.0


def _wilson(count: float, size: float, effect: float) -> list[float]:
    """Wilson's 95% interval of a share, of as many independent events as `effect` leaves."""
    share, size = count / size, max(size / effect, 1.0)
    square = NORMAL_95**2 / size
    middle = (share + square / 2) / (1.0 + square)
    half = np.sqrt(square * share * (1.0 - share) + square**2 / 4) / (1.0 + square)
    return [float(max(0.0, middle - half)), float(min(1.0, middle + half))]


def tail_warnings(shares: dict[str, Any]) -> list[str]:
    """The shares of `tail_shares` that differ from the expected ones, as sentences."""
    found = []
    for each in shares["levels"]:
        level, share, (low, high) = each["level"], each["share"], each["interval"]
        is_inside = low <= level <= high or level / MATERIAL < share < level * MATERIAL
        if not is_inside:
            found.append(
                f"the tail probability of {share:.2%} of the {shares['of']} is below {level:g} "
                f"({low:.2%} to {high:.2%}): it is too {'small' if share > level else 'large'}"
            )
        if each["far_above"] > 0:
            worst = each["worst"][0]
            found.append(
                f"{each['far_above']:.0%} of the streams have more than {FAR_ABOVE:g} times as "
                f"many {shares['of']} below {level:g} as that says; the most has "
                f"{worst['stream']}, {worst['share'] / level:.0f} times as many"
            )
    return found


def tail_lines(shares: dict[str, Any]) -> list[str]:
    """The shares of `tail_shares` as lines, one for each level."""
    lines = []
    for each in shares["levels"]:
        low, high = each["interval"]
        worst = each["worst"][0]
        lines.append(
            f"below {each['level']:g}: {each['share']:.5f} ({low:.5f} to {high:.5f}) of "
            f"{shares['events']:,} {shares['of']}; median stream {each['median']:.5f}, worst "
            f"{worst['share']:.5f} ({worst['stream']})"
        )
    return lines
