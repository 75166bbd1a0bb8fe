"""Plots of a report: learning curve, skill against baselines, calibration.

PNG bytes out of the report's plain data, drawn without a display. Nothing is computed here.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from models.training.scores import MODEL

DPI = 90


def plot_report(report: dict[str, Any]) -> dict[str, bytes]:
    """File name -> PNG, for what the report holds."""
    files: dict[str, bytes] = {}
    if report["history"]:
        files["plots/learning.png"] = _png(_learning(report["history"]))
    if report["heads"]:
        files["plots/skill.png"] = _png(_skill(report["heads"]))
    if report.get("decoder"):
        files["plots/horizon.png"] = _png(_horizon(report["decoder"]["targets"]))
    if report.get("burn_in"):
        files["plots/burn-in.png"] = plot_burn_in(report["burn_in"])
    calibrated = {name: head for name, head in report["heads"].items() if "calibration" in head}
    if calibrated:
        files["plots/calibration.png"] = _png(_calibration(calibrated))
    return files


def _learning(history: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    for member in sorted({record["member"] for record in history}):
        of = [record for record in history if record["member"] == member]
        epochs = [record["epoch"] for record in of]
        train = [record["train_loss"] for record in of]
        validation = [record["validation"]["loss"] for record in of]
        first = member == 1
        axes.plot(epochs, train, "tab:gray", label="training (dropout on)" if first else None)
        axes.plot(epochs, validation, "tab:blue", label="validation" if first else None)
    axes.set(xlabel="epoch", ylabel="weighted loss", title="Learning curve")
    axes.legend()
    return figure


def _skill(heads: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7, 0.6 + 1.3 * len(heads)), layout="constrained")
    for axes, (name, head) in zip(
        figure.subplots(len(heads), 1, squeeze=False)[:, 0], heads.items(), strict=True
    ):
        metric = next(iter(head["scores"][MODEL]))
        rows = list(reversed(head["scores"].items()))
        for at, (model, scores) in enumerate(rows):
            low, high = scores[metric]["interval"]
            color = "tab:blue" if model == MODEL else "tab:gray"
            axes.plot([low, high], [at, at], color=color)
            axes.plot(scores[metric]["value"], at, "o", color=color)
        axes.set_yticks(range(len(rows)), [model for model, _ in rows])
        axes.margins(y=0.2)
        axes.set_title(f"{name}: {metric} on held-out events, lower is better", fontsize="medium")
    return figure


def _horizon(targets: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(5 * len(targets), 3.4), layout="constrained")
    for axes, (name, target) in zip(
        figure.subplots(1, len(targets), squeeze=False)[0], targets.items(), strict=True
    ):
        for model, values in target["mae"].items():
            steps = [step for step, value in enumerate(values, start=1) if value is not None]
            axes.plot(
                steps,
                [values[step - 1] for step in steps],
                color="tab:blue" if model == MODEL else None,
                label=model,
            )
        axes.set(xlabel="steps ahead", ylabel="mean absolute error", title=name)
        axes.legend()
    return figure


def plot_burn_in(measured: dict[str, Any]) -> bytes:
    """The differences of a burn-in by events since the initial state, as PNG."""
    curves, outputs = measured["curves"], measured["outputs"]
    figure = Figure(figsize=(3.4 * len(outputs), 3.4), layout="constrained")
    for axes, (name, output) in zip(
        figure.subplots(1, len(outputs), squeeze=False)[0], outputs.items(), strict=True
    ):
        for quantile, values in curves["outputs"][name].items():
            label = f"{float(quantile):.0%} of windows"
            axes.plot(curves["events"], [max(value, 1e-6) for value in values], label=label)
        axes.axhline(output["tolerance"], color="tab:gray", linewidth=1, label="tolerance")
        if (events := output["events"]["0.99"]) is not None:
            axes.axvline(events, color="tab:gray", linewidth=1, linestyle=":")
        axes.set(xscale="log", yscale="log", title=name)
        axes.set(xlabel="events since the initial state")
        axes.set(ylabel=f"difference, of the {output['relative_to']}")
        axes.legend(fontsize="small")
    return _png(figure)


def _calibration(heads: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(3.4 * len(heads), 3.4), layout="constrained")
    for axes, (name, head) in zip(
        figure.subplots(1, len(heads), squeeze=False)[0], heads.items(), strict=True
    ):
        predicted = [part["predicted"] for part in head["calibration"]]
        observed = [part["observed"] for part in head["calibration"]]
        top = max(*predicted, *observed, 0.01)
        axes.plot([0, top], [0, top], color="tab:gray", linewidth=1)
        axes.plot(predicted, observed, "o-")
        axes.set(xlabel="predicted", ylabel="observed", title=f"{name}: calibration")
    return figure


def _png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    # Few colours are drawn: a palette keeps the artifact small.
    with Image.open(buffer) as image:
        small = BytesIO()
        image.convert("RGB").quantize(64).save(small, format="PNG", optimize=True)
    return small.getvalue()
