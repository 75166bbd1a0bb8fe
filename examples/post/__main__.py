"""`python -m examples.post OUT`: package every model of docs/tutorials/from-the-post.md.

Each `*.yaml` beside this file becomes an artifact under OUT. The one-unit layers get the weights
of `examples.post.weights`, the others fresh ones from a seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from examples.post.weights import known_weights
from models.artifact.artifact import Artifact
from models.artifact.writing import write_artifact
from models.networks.initial_artifact import initialise_artifact
from models.spec.spec_file import read_spec

HERE = Path(__file__).parent
SEED = 1
KNOWN = ("lstm", "gru", "peephole")


def package(name: str, out: Path) -> Artifact:
    """Package the model of one `NAME.yaml` into the directory `out`."""
    spec = read_spec(HERE / f"{name}.yaml")
    if name in KNOWN:
        return write_artifact(out, spec, known_weights(name), overwrite=True)
    return initialise_artifact(spec, out, SEED, overwrite=True)


def main() -> None:
    """Package all of them."""
    parser = argparse.ArgumentParser(prog="python -m examples.post", description=__doc__)
    parser.add_argument("out", type=Path, help="the directory to write them to")
    out = parser.parse_args().out
    for spec in sorted(HERE.glob("*.yaml")):
        artifact = package(spec.stem, out / spec.stem)
        print(f"{out / spec.stem}: model {artifact.spec.name}, version {artifact.version}")


if __name__ == "__main__":
    main()
