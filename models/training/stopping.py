"""When a training stops, and whether that was too early.

A loss "still falls" if it fell by more than a twentieth of all its fall within the last fifth of
the epochs.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from models.spec.training import ResolvedTraining

Reason = Literal["epochs", "patience", "time"]
FALLING_SHARE = 0.05


def best_epoch(history: list[dict[str, Any]]) -> int:
    """The first epoch, from 1, with the least validation loss."""
    losses = [record["validation"]["loss"] for record in history]
    return int(np.argmin(losses)) + 1


def reason_to_stop(history: list[dict[str, Any]], training: ResolvedTraining) -> Reason | None:
    """Why one member's training stops after these epochs; None if it goes on."""
    if not history:
        return None
    if len(history) >= training.epochs:
        return "epochs"
    if len(history) - best_epoch(history) >= training.patience:
        return "patience"
    limit_s = training.time_limit_s
    spent_s = sum(record["seconds"] for record in history)
    if limit_s is not None and spent_s >= limit_s / training.members:
        return "time"
    return None


def stopping_warning(history: list[dict[str, Any]], training: ResolvedTraining) -> str | None:
    """A line about a training that stopped too early, with the option to change; or None."""
    validation = [float(record["validation"]["loss"]) for record in history]
    losses = [float(record["train_loss"]) for record in history]
    stopped = f"training stopped after epoch {len(history)} of {training.epochs}"
    match reason_to_stop(history, training):
        case "time":
            return (
                f"{stopped} at its time limit, before the learning rate had fallen: raise "
                f"`training.time_limit_s` (now {training.time_limit_s:g}), or set fewer `epochs`"
            )
        case "epochs" if _still_falls(validation):
            return (
                f"{stopped} while the validation loss still fell: raise `training.epochs` "
                f"(now {training.epochs})"
            )
        case "patience" if best_epoch(history) == 1:
            return (
                f"{stopped}, and no epoch was better than the first: lower "
                f"`training.learning_rate` (now {training.learning_rate:g}), or raise "
                f"`training.patience` (now {training.patience})"
            )
        case "patience" if _still_falls(losses) and not _has_risen(validation):
            return (
                f"{stopped} while the training loss still fell and the validation loss did not "
                f"rise: raise `training.patience` (now {training.patience})"
            )
    return None


def _still_falls(losses: list[float]) -> bool:
    recent = max(1, len(losses) // 5)
    if len(losses) <= recent:
        return False
    minimum = min(losses)
    return min(losses[:-recent]) - minimum > FALLING_SHARE * (losses[0] - minimum)


def _has_risen(losses: list[float]) -> bool:
    minimum = min(losses)
    return losses[-1] - minimum > FALLING_SHARE * (losses[0] - minimum)
