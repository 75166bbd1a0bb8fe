"""Check a server against the V2 (Open Inference) protocol: HTTP, gRPC, Triton's extensions.

A line for each case says whether it passes, fails, or is not supported: its extension is not listed
by the server, or there is no address of gRPC. Requests are sent to one model, in sequences with
random ids. The exit status is 0 if no case fails, 1 if one does, 2 if the server has no such
model or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from contextlib import closing
from importlib.metadata import version


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"expected NAME:VALUE, got {text!r}")
    return name, value.strip()


def _shape(text: str) -> tuple[str, list[int]]:
    name, _, sizes = text.rpartition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not name or not shape:
        raise argparse.ArgumentTypeError(f"expected an input and its shape, got {text!r}")
    return name, shape


def _line(text: str) -> str:
    """A text from the server as one line without control characters."""
    return "".join(each if each.isprintable() else " " for each in " ".join(text.split()))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and return the exit status."""
    parser = argparse.ArgumentParser("python -m carry_client.conformance", description=__doc__)
    add = parser.add_argument
    add("--version", action="version", version=version("carry-client"))
    add("url", help="such as http://127.0.0.1:8000")
    add("--model", required=True, help="a model with numeric inputs")
    add("--grpc", default="", metavar="HOST:PORT", help="address of gRPC")
    shape = "an input to send; default: all inputs, with 1 for each axis of any size"
    add("--shape", type=_shape, action="append", metavar="INPUT:1,16,4", help=shape)
    header = "a header of each request, such as an access key"
    add("--header", type=_header, action="append", metavar="NAME:VALUE", help=header)
    add("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    try:
        from carry_client.conformance.cases import CASES, FAIL
        from carry_client.conformance.server import Server
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'carry-client[conformance]'", file=sys.stderr)
        return 2
    shapes, headers = dict(options.shape or ()), dict(options.header or ())
    try:
        server = Server(options.url, options.model, options.grpc, shapes, headers)
    except Exception as error:  # an unknown server may answer anything
        print(
            f"{options.url}: no metadata of the model {options.model}: "
            f"{type(error).__name__}: {_line(str(error))}",
            file=sys.stderr,
        )
        return 2
    with closing(server):
        known = [each["name"] for each in server.metadata["inputs"]]
        if unknown := shapes.keys() - known:
            got = ", ".join(map(repr, unknown))
            expected = f"expected --shape of the inputs {known}, got {got}"
            print(f"{options.url}: {expected}", file=sys.stderr)
            return 2
        outcomes = [(case, *case.run(server)) for case in CASES]
    counts = Counter(outcome for _, outcome, _ in outcomes)
    if options.json:
        cases = [
            {"case": case.name, "section": case.section, "outcome": outcome, "detail": detail}
            for case, outcome, detail in outcomes
        ]
        print(json.dumps({"counts": counts, "cases": cases}, indent=2))
    else:
        for case, outcome, detail in outcomes:
            print(f"{outcome:13}  {case.name:63}  {_line(detail) or case.section}")
        print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return 1 if counts[FAIL] else 0


if __name__ == "__main__":
    sys.exit(main())
