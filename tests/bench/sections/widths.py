"""Chunks of 1, 16 and 128 events, networks of width 64 and 256, JSON and MessagePack."""

from __future__ import annotations

from tests.bench.context import Bench
from tests.bench.networks import UNITS, Bodies, standard_model
from tests.bench.traffic import Media

WIDTHS = (UNITS, 256)
STEPS = (1, 16, 128)
MEDIA: tuple[Media, ...] = ("json", "msgpack")


def run(bench: Bench) -> None:
    """For each runtime and width one server, and every length and media in turns."""
    for units in WIDTHS:
        artifact = (
            bench.artifact
            if units == UNITS
            else standard_model(bench.folder / f"models-{units}", units)
        )
        for kind in bench.carry_kinds(artifact):
            with (
                bench.store() as store,
                bench.drivers() as [driver],
                bench.server(kind, store, artifact) as server,
            ):
                loads = [(steps, media) for steps in STEPS for media in MEDIA]
                for steps, media in loads:
                    bench.ready(
                        driver,
                        f"T{steps}-{media}",
                        server,
                        Bodies.random(steps),
                        artifact=artifact,
                        media=media,
                    )
                for _ in range(bench.options.rounds):
                    for steps, media in loads:
                        name = f"widths/{units}-T{steps}-{media}/{kind}"
                        bench.closed(name, driver, f"T{steps}-{media}", server, store)
