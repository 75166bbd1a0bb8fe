"""The example of sequences: tokens, splits, rows of trees, and the losses it compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from examples.code import comparison
from examples.code.comparison import (
    ROWS,
    SPEC,
    Floats,
    load_or_compute,
    network_losses,
    spec_of,
    splits_of,
    table,
)
from examples.code.data import EVENT, SPLITS, STREAM, read_sequences, read_tokens
from examples.code.trees import features
from models.errors import ModelsError
from models.spec.layers import LstmLayer
from models.spec.layout import output_spec
from models.spec.spec_file import read_spec

SOURCE = """
def first(a):
    # a comment, and an empty line

    if a[0] is None:
        return {"b": 1.5}
"""
LINE = (
    "def NAME ( NAME ) : NEWLINE INDENT if NAME [ NUMBER ] is None : NEWLINE INDENT return "
    "{ STRING : NUMBER } NEWLINE DEDENT DEDENT"
)
TOKENS = LINE.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(40):
        lines = [f"x{number} = [{', '.join('1' * (1 + number % 5))}]\n"] * (1 + number % 7)
        (tmp_path / f"file{number}.py").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_tokens_are_keywords_operators_and_types(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE, encoding="utf-8")
    assert read_tokens(tmp_path / "a.py") == TOKENS


def test_files_stay_in_their_split_and_in_order_when_others_are_added(folder: Path) -> None:
    before = read_sequences("code", folder)
    (folder / "test").mkdir()
    (folder / "test" / "skipped.py").write_text("a = 1\n", encoding="utf-8")
    (folder / "another.py").write_text("a = 1\n", encoding="utf-8")
    after = read_sequences("code", folder)
    assert set(after[STREAM]) - set(before[STREAM]) == {"another.py"}
    assert_frame_equal(after.filter(pl.col(STREAM) != "another.py"), before)
    years = after.group_by(STREAM).agg(pl.col("at").str.head(4).n_unique())
    assert set(years["at"]) == {1}
    for part in after.partition_by(STREAM):
        assert part[EVENT].to_list() == read_tokens(folder / part[STREAM][0])
        assert part["at"].is_sorted()


def test_splits_have_the_events_of_their_days(folder: Path) -> None:
    frame = read_sequences("code", folder)
    splits = splits_of(frame, spec_of("code", frame, 1))
    for split, start in zip(splits, SPLITS, strict=True):
        own = frame.filter(pl.col("at").str.head(4) == start[:4])
        names = [[split.labels[code] for code in codes] for codes in split.codes]
        files = own.partition_by(STREAM, maintain_order=True)
        assert names == [part[EVENT].to_list() for part in files]
        assert len(split.rows(2, "")[0]) == len(split.sequences()) == own.height - len(files)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match="hdfs: expected its sequences"):
        read_sequences("hdfs", tmp_path)


@pytest.mark.parametrize("further", ["", "aggregates", "syntax"])
def test_trees_see_the_events_before_and_no_other(further: str) -> None:
    labels = ("<unknown>", "(", ")", ",")
    rows = features(np.array([1, 3, 2, 1, 2]), labels, 3, further)
    np.testing.assert_array_equal(
        rows[:, :3], [[1, np.nan, np.nan], [3, 1, np.nan], [2, 3, 1], [1, 2, 3]]
    )
    np.testing.assert_array_equal(rows, features(np.array([1, 3, 2, 1, 0]), labels, 3, further))


def test_syntax_has_the_open_brackets_and_the_enclosing_blocks() -> None:
    labels = tuple(dict.fromkeys(TOKENS))
    codes = np.array([labels.index(token) for token in TOKENS])
    rows = features(codes, labels, 0, "syntax")
    at = TOKENS.index("STRING")
    opens, blocks = rows[at, [0, 1]], rows[at, 5:11]
    assert opens.tolist() == [1, 2]
    assert blocks.tolist() == [2, -1, -1, labels.index("if"), labels.index("def"), -1]
    assert rows[at, 11] == labels.index("return")
    assert rows[-1, 13] == labels.index("if")  # after the first DEDENT


def test_losses_of_the_network_are_those_of_each_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(comparison.TRAINING, "code", {"epochs": 1})
    frame = read_sequences("code", folder)
    test = splits_of(frame, spec_of("code", frame, 1))[2]
    losses = network_losses("code", frame, 1, folder / "lstm-1")
    assert len(losses) == len(test.sequences())
    names = frame.filter(pl.col("at") >= SPLITS[2])[STREAM].unique(maintain_order=True)
    for number, name in enumerate(names):
        alone = network_losses("code", frame.filter(pl.col(STREAM) == name), 1, folder / "lstm-1")
        np.testing.assert_allclose(alone, losses[test.sequences() == number], rtol=1e-5)


def test_the_specification_names_what_the_comparison_reads() -> None:
    spec = read_spec(SPEC)
    assert "next.surprise" in [output.name for output in output_spec(spec).outputs]
    assert set(ROWS) <= set(comparison.TRAINING)


def test_the_smaller_sets_have_the_smaller_network(folder: Path) -> None:
    frame = read_sequences("code", folder)
    written = read_spec(SPEC)
    for name, units in (("code", 128), ("sepsis", 64), ("hdfs", 64)):
        spec = spec_of(name, frame, 7)
        assert [layer.units for layer in spec.layers if isinstance(layer, LstmLayer)] == [units] * 2
        assert spec.training is not None
        assert written.training is not None
        assert (spec.name, spec.training.seed) == (name, 7)
        as_written = written.training.model_copy(update={"seed": 7})
        assert (spec.training == as_written) == (name == "code")


def test_losses_are_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute(value: float) -> Floats:
        calls.append(value)
        return np.array([value])

    for _ in range(2):
        assert load_or_compute(tmp_path / "losses.npy", compute, 1.5).tolist() == [1.5]
    assert calls == [1.5]


def test_differences_are_paired_by_sequence() -> None:
    first = np.array([1.0, 1.0, 1.0, 5.0])
    text = table({"a": first, "b": first + 0.5}, np.array([0, 0, 0, 1]))
    assert "| a | 2.0000 |  |" in text
    assert "| b | 2.5000 | +0.5000 (+0.5000 to +0.5000) |" in text
