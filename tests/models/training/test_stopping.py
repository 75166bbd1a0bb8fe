"""A training that stops too early says which option to change."""

from __future__ import annotations

from typing import Any

import pytest

from models.spec.training import ResolvedTraining
from models.training.trainer import (
    best_epoch,
    names_warning,
    reason_to_stop,
    stopping_warning,
    updates_warning,
)


def training(**options: Any) -> ResolvedTraining:
    return ResolvedTraining.model_validate(
        {
            "stream": "id",
            "validate_from": "2025-01-01",
            "test_from": "2025-01-02",
            "epochs": 10,
            "patience": 3,
            "window_steps": 4,
            "segment_windows": 1,
            "batch_streams": 4,
            "learning_rate": 0.1,
            **options,
        }
    )


def history(validation: list[float], train: list[float] | None = None) -> list[dict[str, Any]]:
    return [
        {"train_loss": loss, "validation": {"loss": validated}, "seconds": 2.0}
        for validated, loss in zip(validation, train or validation, strict=True)
    ]


FALLING = [10.0 - at for at in range(10)]
FLAT = [10, 5, 3, 2, 1.5, 1.2, 1.1, 1.05, 1.04, 1.03]


@pytest.mark.parametrize(
    ("records", "options", "reason", "warning"),
    [
        (history(FALLING), {}, "epochs", "raise `training.epochs` (now 10)"),
        (history(FLAT), {}, "epochs", None),
        (history([3, 1, 2, 2, 2]), {}, "patience", None),
        (
            history([3, 1, 1.01, 1.02, 1.01], FALLING[:5]),
            {},
            "patience",
            "raise `training.patience` (now 3)",
        ),
        (history([1, 2, 2, 2]), {}, "patience", "lower `training.learning_rate` (now 0.1)"),
        (history(FALLING[:4]), {"time_limit_s": 8}, "time", "`training.time_limit_s` (now 8)"),
        (history(FALLING[:2]), {"time_limit_s": 8, "members": 2}, "time", "time limit"),
        (history(FALLING[:4]), {"time_limit_s": 9}, None, None),
        ([], {}, None, None),
    ],
    ids=lambda value: None,
)
def test_warnings_name_the_option_to_change(
    records: list[dict[str, Any]],
    options: dict[str, Any],
    reason: str | None,
    warning: str | None,
) -> None:
    assert reason_to_stop(records, training(**options)) == reason
    if reason is None:
        return
    text = stopping_warning(records, training(**options))
    assert text is None if warning is None else warning in (text or "")


def test_the_first_of_equal_epochs_is_the_best() -> None:
    assert best_epoch(history([3, 1, 1])) == 2


def test_few_updates_of_the_weights_are_a_warning() -> None:
    text = updates_warning(2, training(epochs=10, batch_streams=64))
    assert text is not None
    assert "updated 20 times, 2 an epoch" in text
    assert "`training.batch_streams` (now 64)" in text
    assert updates_warning(10, training(epochs=10)) is None


def test_names_of_streams_that_no_request_may_have_are_a_warning() -> None:
    text = names_warning(["pump-1", "pump 2", "pump/3"])
    assert text is not None
    assert text.startswith("2 of 3 streams")
    assert "such as 'pump 2'; expected 1 to 256 characters of A-Z" in text
    assert names_warning(["pump-1"]) is None


def test_seeds_are_as_many_as_members_or_more() -> None:
    assert training(members=2).networks == 2
    assert training(members=2, seeds=3).networks == 3
    with pytest.raises(ValueError, match="seeds to be at least members, 2, got 1"):
        training(members=2, seeds=1)
    assert "seeds" not in training().model_dump()
