"""Boosted trees (LightGBM) that predict the next category from the last ones.

A row has, as of the event before the predicted one, the last events, and one of

    aggregates    of the most frequent categories how often each has occurred and how many events
                  ago it last did, and the place in the sequence
    syntax        of Python: the open brackets, the blocks that enclose the line, the line so far;
                  what a programmer would compute by hand in place of a state
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

AGGREGATED = 64
"""Categories that have aggregates: the most frequent ones."""
SMOOTHING = 1e-4
"""Share of a uniform distribution over all categories in the prediction."""
OPEN, CLOSED = ("(", "[", "{"), (")", "]", "}")
ENCLOSING = 3
"""Innermost brackets, and innermost blocks, whose kind is a feature."""
Floats: TypeAlias = NDArray[np.float32]
Codes: TypeAlias = NDArray[np.int64]


def features(codes: Codes, labels: Sequence[str], lags: int, further: str = "") -> Floats:
    """What is known before each event of one sequence but the first, [events - 1, columns].

    Args:
        codes: of the events; lower ones are more frequent.
        labels: of the codes.
        lags: number of last events, the first columns.
        further: `aggregates`, `syntax` or nothing.
    """
    known = len(codes) - 1
    columns = [
        np.concatenate([np.full(min(lag, known), np.nan), codes[: max(known - lag, 0)]])
        for lag in range(lags)
    ]
    if further == "aggregates":
        is_each = codes[:-1, None] == np.arange(min(AGGREGATED, len(labels)))
        at = np.arange(known)
        last = np.maximum.accumulate(np.where(is_each, at[:, None], -np.inf), axis=0)
        columns += [at, *is_each.cumsum(axis=0).T, *(at[:, None] - last).T]
    elif further == "syntax":
        columns += list(_syntax(codes[:-1].tolist(), labels).T)
    return np.stack([np.asarray(column, np.float32) for column in columns], axis=1)


def _syntax(codes: Sequence[int], labels: Sequence[str]) -> Floats:
    """Numbers and kinds of open brackets and enclosing blocks after each token, and its line."""
    brackets: list[list[int]] = []  # kind, where it was opened, commas since then
    blocks: list[int] = []  # first token of the line that opened each
    line: list[int] = []
    opened = closed = -1  # first token of the last line; of the block that was closed last
    rows = []
    for at, code in enumerate(codes):
        text = labels[code]
        if text == "INDENT":
            blocks.append(opened)
        elif text == "DEDENT":
            closed = blocks.pop() if blocks else -1
        elif text == "NEWLINE":
            opened, line = line[0] if line else -1, []
        else:
            line.append(code)
            if text in OPEN:
                brackets.append([OPEN.index(text), at, 0])
            elif text in CLOSED and brackets:
                brackets.pop()
            elif text == "," and brackets:
                brackets[-1][2] += 1
        inner = brackets[-1] if brackets else [-1, at, 0]
        rows.append(
            [
                *(len(brackets), len(blocks), len(line), at - inner[1], inner[2]),
                *_innermost([kind for kind, *_ in brackets]),
                *_innermost(blocks),
                *(line[0] if line else -1, opened, closed),
            ]
        )
    return np.array(rows, np.float32)


def _innermost(kinds: Sequence[int]) -> list[int]:
    return [*reversed(kinds[-ENCLOSING:]), *[-1] * ENCLOSING][:ENCLOSING]


def train_trees(
    path: Path,
    train: tuple[Floats, Codes],
    select: tuple[Floats, Codes],
    classes: int,
    categorical: int = 0,
    **options: Any,
) -> None:
    """Train boosted trees on rows and codes, and write them to a file.

    Args:
        path: of the file.
        train: what they are fitted to.
        select: rows and codes that stop the boosting.
        classes: number of categories.
        categorical: number of columns, from the first on, that are categories and no numbers.
        options: of LightGBM, beside those of all sets.
    """
    import lightgbm

    known = np.isin(select[1], train[1])
    all_options = {
        "objective": "multiclass",
        "num_class": classes,
        "learning_rate": 0.1,
        "num_leaves": 15,
        "num_iterations": 300,
        "feature_fraction": 0.5,
        "min_data_in_leaf": 20,
        # categories are rare: without these, single leaves give all but zero
        "min_sum_hessian_in_leaf": 1.0,
        "lambda_l2": 5.0,
        "seed": 1,
        "num_threads": 1,
        "verbose": -1,
    }
    data = lightgbm.Dataset(*train, categorical_feature=list(range(categorical)) or "auto")
    valid = lightgbm.Dataset(select[0][known], select[1][known], reference=data)
    stop = lightgbm.early_stopping(10, verbose=False)
    booster = lightgbm.train(all_options | options, data, valid_sets=[valid], callbacks=[stop])
    booster.save_model(path)
    loss = booster.best_score["valid_0"]["multi_logloss"]
    print(f"{path.stem}: {booster.best_iteration} trees a category, {loss:.4f} on the second split")


def tree_losses(path: Path, rows: Floats, codes: Codes) -> NDArray[np.float64]:
    """-log p of every row under the trees of a file, [rows]."""
    import lightgbm

    predicted = np.asarray(lightgbm.Booster(model_file=path).predict(rows, num_threads=1))
    true = predicted[np.arange(len(codes)), codes]
    return np.asarray(-np.log((1 - SMOOTHING) * true + SMOOTHING / predicted.shape[1]))
