"""Reading of a `SPEC.yaml`: errors with line numbers and values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from models.errors import SpecError
from models.spec.spec_file import add_line_number, read_spec
from tests.support.models import SMALL, small_spec

GOOD = """\
# A model of pumps.
name: pumps
events:
  fields:
    - {kind: numeric, name: pressure, mean: 1, std: 2}
    - kind: categorical
      name: mode
layers:
  - {kind: lstm, units: 8}
  - kind: lstm
    units: 4
    name: second
  - {kind: concatenate, inputs: [lstm_1, second]}
heads:
  - {kind: sequence, name: last}
  - kind: forecast
    name: next
    targets: [pressure]
    quantiles: [0.1, 0.9]
training:
  stream: pump
  validate_from: "2025-10-01"
  test_from: "2025-11-01"
  loss_weights: {next: 2.0}
"""


def rejection(tmp_path: Path, text: str | bytes) -> list[str]:
    """The lines of the error message, without the path of the file."""
    path = tmp_path / "SPEC.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SpecError) as caught:
        read_spec(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    return [line.removeprefix(str(path)) for line in lines]


def test_times_need_no_quotes(tmp_path: Path) -> None:
    path = tmp_path / "SPEC.yaml"
    path.write_text(GOOD.replace('"2025-10-01"', "2025-10-01T00:00:00Z").replace('"', ""))
    training = read_spec(path).training
    assert training is not None
    assert training.validate_from == "2025-10-01T00:00:00Z"
    assert training.test_from == "2025-11-01"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("units: 4", "units: 0", ":11: layers.1.units: expected greater than or equal to 1, got 0"),
        ("units: 8", "unit: 8", ":9: layers.0.units: expected a value, got none"),
        ("units: 8", "units: 8, unit: 8", ":9: layers.0.unit: expected no member of this name"),
        ("kind: lstm\n", "kind: rnn\n", ":10: layers.1.kind: expected one of 'lstm', "),
        ("- kind: lstm\n    ", "- ", ":10: layers.1.kind: expected a value, got none"),
        ("units: 4", "units: 4\n    projection: 5", ":12: layers.1.projection: expected at most"),
        ("[lstm_1, second]", "[lstm_2]", ":13: layers.2: layer 'concatenate_1' reads 'lstm_2', "),
        ("concatenate", "add", ":13: layers.2: layer 'add_1': expected inputs of one width to add"),
        ("name: second", "name: lstm_1", ":9: layers.0: layer 'lstm_1': expected a unique name"),
        ("[pressure]", "[mode]", ":16: heads.1: head 'next': expected a numeric target, 'mode'"),
        ("[0.1, 0.9]", "[0.9, 0.1]", ":16: heads.1: expected rising quantiles, got [0.9, 0.1]"),
        ("[0.1, 0.9]", "\n      - 0.1\n      - 2", ":21: heads.1.quantiles.1: expected less than"),
        ("mean: 1", "mean: [a]", ":5: events.fields.0.mean: expected a valid number, got ['a']"),
        ("stream: pump\n", "epochs: 0\n", ":21: training.epochs: expected greater than or equal"),
        (
            GOOD[GOOD.index("- {kind: concatenate") : GOOD.index("  stream: pump")],
            "- {kind: bidirectional, units: 2}\nheads: [{kind: sequence, name: last}]\n"
            "max_chunk_steps: 32\ntraining:\n  window_steps: 64\n",
            ":17: training.window_steps: a window is a chunk of this network",
        ),
        ("{next: 2.0}", "{nex: 2.0}", ":24: training.loss_weights: expected heads among ["),
        ("name: pumps", "name: Pumps", ":2: name: String should match pattern '"),
        ("events:\n", "features: 3\nevents:\n", ":2: spec: expected exactly one of `events`"),
        ("units: 4", "units: 4\n    units: 5", ":12: units: expected a unique key, line"),
        (
            "units: 8",
            "units: 8, units: 8",
            ":9: units: expected a unique key, line 9 has it already",
        ),
        ("units: 8}", "units: 8", ":10: expected YAML, got while parsing a flow mapping"),
        ("name: pumps", "name: !!python/name:os.system x", ":2: expected YAML, got could not"),
    ],
)
def test_errors_have_line_numbers(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1, old
    assert any(line.startswith(message) for line in rejection(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("starts_from: lstm_1}", "starts_from: second}", ":29: decoder.layers.1: layer 'lstm_1'"),
        ("units: 8, starts", "units: 9, starts", ":29: decoder.layers.1: layer 'lstm_1' starts"),
        (", starts_from: lstm_1", "", ":27: decoder.layers: expected at least one layer with"),
        ("kind: dense", "kind: bidirectional", ":28: decoder.layers.0: layer 'bidirectional_1'"),
        ("[pressure]\n", "[mode]\n", ":26: decoder.targets: expected a numeric target, 'mode'"),
        ("[mode]", "[pressure]", ":31: decoder.known: 'pressure' is a target; expected a field"),
        ("[mode]", "[mood]", ":31: decoder.known: expected known among the event fields ['pre"),
    ],
)
def test_errors_in_a_decoder_have_line_numbers(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    decoder = """\
decoder:
  targets: [pressure]
  layers:
    - {kind: dense, units: 3}
    - {kind: lstm, units: 8, starts_from: lstm_1}
  max_horizon: 4
  known: [mode]
"""
    assert decoder.count(old) == 1, old
    path = tmp_path / "SPEC.yaml"
    path.write_text(GOOD + decoder)
    assert read_spec(path).decoder is not None
    (line,) = rejection(tmp_path, GOOD + decoder.replace(old, new))
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("[{kind: gru, units: 0}]", ":3: layers.0.units: expected greater than or equal to 1, g"),
        ("[]", ":3: layers: expected 1 or more, got 0"),
    ],
)
def test_too_short_is_reported_only_for_short_lists(
    tmp_path: Path, layers: str, message: str
) -> None:
    """A list whose every element is invalid is not reported as too short."""
    heads = "heads: [{kind: sequence, name: last}]"
    (line,) = rejection(tmp_path, f"name: m\nfeatures: 2\nlayers: {layers}\n{heads}\n")
    assert line.startswith(message)


def test_errors_are_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = GOOD.replace("stream:", "streams:").replace("units: 8", "units: many")
    assert rejection(tmp_path, text) == [
        ":9: layers.0.units: expected a valid integer, unable to parse string as an integer, "
        "got 'many'",
        ":20: training.stream: expected a value, got none",
        ":21: training.streams: expected no member of this name",
    ]


def test_a_long_value_is_truncated(tmp_path: Path) -> None:
    (line,) = rejection(tmp_path, GOOD.replace("units: 8", f"units: {'m' * 500}"))
    assert line.endswith("m...")
    assert len(line) < 200


def test_an_overridden_merge_key_has_the_line_of_the_override(tmp_path: Path) -> None:
    text = GOOD.replace("{kind: lstm, units: 8}", "&first {kind: lstm, units: 8}")
    old = "- kind: lstm\n    units: 4"
    path = tmp_path / "SPEC.yaml"
    path.write_text(text.replace(old, "- <<: *first\n    units: 8"))
    assert [layer.units for layer in read_spec(path).layers[:2]] == [8, 8]
    found = rejection(tmp_path, text.replace(old, "- <<: *first\n    units: -1"))
    assert found == [":11: layers.1.units: expected greater than or equal to 1, got -1"]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("training.test_from: expected a day", ":23: training.test_from: expected a day"),
        ("training.epochs: too few", ":20: training.epochs: too few"),
        ("head 'next' is wrong", ":16: heads.1: head 'next' is wrong"),
        ("model 'pumps' is wrong", ": model 'pumps' is wrong"),
    ],
)
def test_later_errors_have_line_numbers(tmp_path: Path, found: str, message: str) -> None:
    path = tmp_path / "SPEC.yaml"
    path.write_text(GOOD)
    assert str(add_line_number(path, SpecError(found))) == f"{path}{message}"
    path.write_text("name: [")
    assert str(add_line_number(path, SpecError(found))) == f"{path}: {found}"


@pytest.mark.parametrize("content", ["", "7\n", "- 1\n"])
def test_a_file_without_a_mapping_is_rejected(tmp_path: Path, content: str) -> None:
    (line,) = rejection(tmp_path, content)
    assert line.startswith(":1: spec: expected a mapping")


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"name: \x00"])
def test_a_binary_file_is_rejected_by_name(tmp_path: Path, content: bytes) -> None:
    assert rejection(tmp_path, content)[0].startswith(": ")


@pytest.mark.parametrize("kind", ["FIFO", "device", "folder"])
def test_file_that_is_not_regular_is_rejected_before_it_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "SPEC.yaml"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(SpecError, match=r"SPEC\.yaml: expected a regular file$"):
        read_spec(path)
    error = add_line_number(path, SpecError("features: expected 3"))
    assert str(error) == f"{path}: features: expected 3"


HOSTILE = {
    "long": ("name: x\nlayers:\n" + "- {kind: lstm, units: 1}\n" * 20_000, "at most 262144 bytes"),
    "many layers": (
        "name: x\nfeatures: 3\nheads: [{kind: sequence, name: out}]\nlayers:\n"
        + "- {kind: lstm, units: 1}\n" * 200,
        ":4: layers: expected at most 128, got 200",
    ),
    "deep lists": ("name: " + "[" * 1000, ": expected YAML, got values that are nested too deeply"),
    "deep objects": ("{a: " * 3000, ": expected YAML, got values that are nested too deeply"),
    "many values": (
        "name: [" + "1," * 20_000 + "]",
        ":1: expected YAML, got more than 20000 values",
    ),
    "repeated aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        ":1: expected YAML, got more than 20000 values, those of aliases included",
    ),
    "repeated merges": (
        "a0: &a0 {b: 1}\n"
        + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40)),
        ":1: expected YAML, got more than 20000 values, those of aliases included",
    ),
    "a list in itself": ("name: &a [*a]", ":1: expected YAML, got more than 20000 values"),
    "many digits": (
        "name: x\nfeatures: " + "9" * 5000,
        ":2: expected YAML, got int: more than 100",
    ),
    "many bits": ("name: x\nfeatures: 0x" + "f" * 50, ":2: expected YAML, got int: more than 64"),
    "many sexagesimal digits": (
        "name: " + "1:" * 100_000 + "1",
        ":1: expected YAML, got int: more than 100 characters",
    ),
    "a large sexagesimal number": (
        "name: " + "1:" * 49 + "1.5",
        ":1: expected YAML, got float: more than 100 characters",
    ),
    "an empty integer": ("name: !!int ''", ":1: expected YAML, got int: string index out of range"),
    "an empty number": ("name: !!float ''", ":1: expected YAML, got float: string index out of"),
    "no integer": ("name: !!int a", ":1: expected YAML, got int: invalid literal"),
    "no truth": ("name: !!bool a", ":1: expected YAML, got bool: 'a'"),
    "code": ("name: !!python/name:os.system", ":1: expected YAML, got could not determine a con"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_rejected_with_a_reason(tmp_path: Path, name: str) -> None:
    content, reason = HOSTILE[name]
    (line,) = rejection(tmp_path, content)
    assert reason in line


def test_a_valid_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "SPEC.yaml"
    path.write_text(yaml.safe_dump(SMALL, allow_unicode=True), encoding="utf-8")
    assert read_spec(path) == small_spec()
