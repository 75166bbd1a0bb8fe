"""Baselines for any head: the last value, a running mean per stream, and boosted trees.

All of them see what the network sees, the encoded events up to the one before the target,
and are fitted on training events alone; what they leave open (how fast the running mean
forgets; how many events the trees look back on, how large and how many they are) is chosen
by their loss on the validation events. None of them sees a held-out event before it is
scored.

The two plain ones become probabilities through isotonic regression, quantiles through the
quantiles of their training errors, and densities through a Gaussian of their training
errors. An anomaly's categorical and boolean targets have their training frequencies in all
three baselines. Those of labels are in `models.training.label_baselines`. A head with `top` has
n-grams instead: of one event as the last value, and of the best order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from models.decoding.losses import (
    Floats,
    Scored,
    is_binary,
    score_binary,
    score_classes,
    score_forecast,
    truth_of,
)
from models.errors import SpecError
from models.events.schema import BooleanField, CategoricalField, NumericField
from models.spec.heads import (
    AnomalyHead,
    ClassificationHead,
    DenseHead,
    ForecastHead,
    Head,
    LabelHead,
    has_surprise,
)
from models.spec.layout import event_field, target_categories
from models.spec.model import ModelSpec
from models.training.label_baselines import for_all_classes, label_baselines, label_trees
from models.training.ngrams import Ngrams
from models.training.table import Baseline, Table, gaussian_nats
from models.training.trees import OutOfTimeError, TimeBudget

HALF_LIVES = (None, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Events after which a running mean has forgotten half; None forgets nothing."""
MAX_TREE_CLASSES = 16
"""Boosted trees fit a set of trees per class: beyond this many they are left out."""

LAST, RUNNING, TREES = "last value", "running mean", "boosted trees"
NGRAMS = "n-grams"
ORDERS = (2, 3, 4, 6, 8, 12)
DISCOUNTS = (0.7, 0.9)


def baselines_of(
    table: Table, head: Head, *, trees: bool = True, budget: TimeBudget | None = None
) -> list[Baseline]:
    """All baselines of one head with targets.

    Args:
        trees: whether boosted trees are among them.
        budget: the time that the trees may take; those that would take longer are left out.
    """
    budget = budget or TimeBudget()
    plain = _plain_baselines(table, head)
    if not trees:
        return plain
    try:
        return plain + _tree_baselines(table, head, budget)
    except OutOfTimeError:
        return plain


def _plain_baselines(table: Table, head: Head) -> list[Baseline]:
    match head:
        case ClassificationHead() if is_binary(table.spec, head):
            return _binary(table, head)
        case ClassificationHead() if has_surprise(head):
            return _ngrams(table, head)
        case ClassificationHead():
            return _classes(table, head)
        case ForecastHead() | DenseHead():
            return _forecast(table, head)
        case AnomalyHead():
            return _anomaly(table, head)
        case LabelHead():
            return label_baselines(table, head)
        case _:
            return []


def _tree_baselines(table: Table, head: Head, budget: TimeBudget) -> list[Baseline]:
    match head:
        case ClassificationHead():
            return _classes_trees(table, head, budget)
        case ForecastHead() | DenseHead():
            return [_forecast_trees(table, head, budget)]
        case AnomalyHead():
            return [_anomaly_trees(table, head, budget)]
        case LabelHead():
            return label_trees(table, head, budget)
        case _:
            return []


def _everywhere(table: Table, head: Head) -> Floats:
    rows = np.arange(table.streams.events)
    return truth_of(table.spec, head, table.streams.columns, rows)


def _best(
    table: Table,
    candidates: list[tuple[Floats, dict[str, Any]]],
    fit: Callable[..., Scored],
    metric: str,
) -> tuple[Scored, dict[str, Any]]:
    """Fit each candidate series, choose by validation loss, score on the test events."""
    losses = [
        float(np.nanmean(fit(series, table.validate).losses[metric])) for series, _ in candidates
    ]
    series, settings = candidates[int(np.argmin(losses))]
    return fit(series, table.test), {**settings, "validation": min(losses)}


def _running_candidates(
    table: Table, series: Floats, about: str
) -> list[tuple[Floats, dict[str, Any]]]:
    return [
        (table.running(series, life), {"of": about, "half_life_events": life})
        for life in HALF_LIVES
    ]


def _binary(table: Table, head: ClassificationHead) -> list[Baseline]:
    truth = _everywhere(table, head)
    value = table.encoded(head.target)

    def fit(series: Floats, at: NDArray[np.int64]) -> Scored:
        return score_binary(_isotonic(series, truth, table.train, at), truth[at])

    last, last_settings = _best(table, [(value, {})], fit, "log_loss")
    candidates = _running_candidates(table, truth, "target") + _running_candidates(
        table, value, "value"
    )
    running, running_settings = _best(table, candidates, fit, "log_loss")
    return [Baseline(LAST, last, last_settings), Baseline(RUNNING, running, running_settings)]


def _isotonic(
    series: Floats, truth: Floats, train: NDArray[np.int64], at: NDArray[np.int64]
) -> Floats:
    """Probabilities at `at` from the series one event earlier, fitted on the training targets."""
    labelled = train[~np.isnan(truth[train])]
    rate = float(truth[labelled].mean())
    usable = labelled[~np.isnan(series[labelled - 1])]
    predictor = series[at - 1]
    probability = np.full(len(at), rate)
    if len(usable) >= 2:
        curve = IsotonicRegression(out_of_bounds="clip", increasing="auto")
        curve.fit(series[usable - 1], truth[usable])
        there = ~np.isnan(predictor)
        probability[there] = curve.predict(predictor[there])
    # Isotonic regression may say 0 or 1; one more event of the base rate keeps it finite.
    size = max(1.0, float(np.sqrt(len(usable))))
    return (probability * size + rate) / (size + 1)


def _classes(table: Table, head: ClassificationHead) -> list[Baseline]:
    codes = _everywhere(table, head).astype(np.int64)
    field = event_field(table.spec, head.target)
    count = field.codes if isinstance(field, CategoricalField) else 2
    base = np.bincount(codes[table.train], minlength=count) + 1.0
    base /= base.sum()
    pairs = np.zeros((count, count))
    np.add.at(pairs, (codes[table.train - 1], codes[table.train]), 1.0)
    moves = (pairs + base) / (pairs.sum(axis=1, keepdims=True) + 1.0)
    last = score_classes(moves[codes[table.test - 1]], codes[table.test].astype(np.float64))
    baselines = [Baseline(LAST, last, {})]
    best: tuple[float, float | None, float] | None = None
    means: dict[float | None, Floats] = {}
    for life in HALF_LIVES:
        means[life] = np.stack(
            [table.running((codes == code).astype(np.float64), life) for code in range(count)],
            axis=1,
        )
        for share in (0.02, 0.1, 0.3, 0.6):
            probabilities = (1 - share) * means[life][table.validate - 1] + share * base
            loss = score_classes(probabilities, codes[table.validate].astype(np.float64))
            mean = float(loss.losses["log_loss"].mean())
            if best is None or mean < best[0]:
                best = (mean, life, share)
    if best is not None:
        loss_, life, share = best
        probabilities = (1 - share) * means[life][table.test - 1] + share * base
        scored = score_classes(probabilities, codes[table.test].astype(np.float64))
        settings = {"half_life_events": life, "base_share": share, "validation": loss_}
        baselines.append(Baseline(RUNNING, scored, settings))
    return baselines


def _ngrams(table: Table, head: ClassificationHead) -> list[Baseline]:
    """The categories that followed the last one, and those that followed longer histories."""
    codes = _everywhere(table, head).astype(np.int64)
    spans = table.streams.sessions
    is_trained = np.zeros(len(codes), np.bool_)
    is_trained[table.train] = True
    starts = np.array([start for start, _ in spans])
    is_trained[starts] = is_trained[np.minimum(starts + 1, len(codes) - 1)]
    sequences = [codes[start:stop] for start, stop in spans]
    trained = [
        own[is_trained[start:stop]] for own, (start, stop) in zip(sequences, spans, strict=True)
    ]
    count = target_categories(table.spec, head).codes

    def losses(order: int, discount: float, at: NDArray[np.int64]) -> Floats:
        ngrams = Ngrams(trained, count, order, discount)
        own = np.full(len(codes), np.nan)
        for index in set((np.searchsorted(starts, at, side="right") - 1).tolist()):
            start, stop = spans[index]
            own[start:stop] = ngrams.losses(sequences[index])
        return own[at]

    def choose(name: str, orders: tuple[int, ...]) -> Baseline:
        tried = [
            (float(losses(order, discount, table.validate).mean()), order, discount)
            for order in orders
            for discount in DISCOUNTS
        ]
        loss, order, discount = min(tried)
        settings = {"order": order, "discount": discount, "validation": loss}
        return Baseline(name, Scored({"log_loss": losses(order, discount, table.test)}), settings)

    return [choose(LAST, (1,)), choose(NGRAMS, ORDERS)]


def _classes_trees(table: Table, head: ClassificationHead, budget: TimeBudget) -> list[Baseline]:
    """One baseline, or none if there are too many classes."""
    field = event_field(table.spec, head.target)
    count = field.codes if isinstance(field, CategoricalField) else 2
    if count > MAX_TREE_CLASSES or has_surprise(head):
        return []
    truth = _everywhere(table, head)
    model = table.tune_trees("log_loss", truth, budget)
    probability = model.probabilities(table.test)
    if is_binary(table.spec, head):
        scored = score_binary(probability[:, 1], truth[table.test])
    else:
        every = for_all_classes(probability, model.classes, count)
        scored = score_classes(every, truth[table.test])
    return [Baseline(TREES, scored, model.settings)]


def _forecast(table: Table, head: ForecastHead | DenseHead) -> list[Baseline]:
    """Forecasts, scored in the head's units."""
    quantiles = _quantiles(head)
    metric = "pinball" if quantiles else "mae"
    levels = quantiles or (0.5,)
    truth = _everywhere(table, head)
    encoded = np.stack([table.encoded(name) for name in head.targets], axis=1)
    targets = range(len(head.targets))
    # Errors are alike in one space and not in the others, depending on the data: try all.
    alike = np.ones_like(truth)
    spaces: dict[str, tuple[Floats, Floats, Callable[[list[Floats]], Floats]]] = {
        "transformed": (encoded, alike, lambda values: _in_units(table, head, values)),
        "units": (truth, alike, lambda values: np.stack(values, axis=1)),
    }
    if table.deviations.keys() >= set(head.targets):
        own = np.stack([table.deviations[name] for name in head.targets], axis=1)
        spaces["deviations of the stream"] = (truth, own, spaces["units"][2])

    def score(space: str, life: Any, at: NDArray[np.int64]) -> Scored:
        scaled, widths, back = spaces[space]
        values = []
        for target in targets:
            series, width = scaled[:, target], widths[:, target]
            predicted = table.last_known(series) if life == "last" else table.running(series, life)
            errors = series[table.train] - predicted[table.train - 1]
            spread = np.nanquantile(errors / width[table.train], levels)
            middle = float(np.nanmedian(series[table.train]))
            near = np.where(np.isnan(predicted[at - 1]), middle, predicted[at - 1])
            values.append(near[:, None] + spread * width[at, None])
        return score_forecast(quantiles, back(values), truth[at])

    def choose(name: str, lives: tuple[Any, ...]) -> Baseline:
        tried = [
            (float(np.nanmean(score(space, life, table.validate).losses[metric])), space, life)
            for space in spaces
            for life in lives
        ]
        loss, space, life = min(tried, key=lambda item: item[0])
        settings = {"errors_in": space, "validation": loss}
        if life != "last":
            settings["half_life_events"] = life
        return Baseline(name, score(space, life, table.test), settings)

    return [choose(LAST, ("last",)), choose(RUNNING, HALF_LIVES)]


def _forecast_trees(table: Table, head: ForecastHead | DenseHead, budget: TimeBudget) -> Baseline:
    quantiles = _quantiles(head)
    settings: dict[str, Any] = {}
    values = []
    for target, name in enumerate(head.targets):
        own = budget.part(len(head.targets) - target, name)
        model = table.tune_trees("quantile", table.encoded(name), own.part(2) if quantiles else own)
        settings[name] = model.settings
        fitted = [model.refit(level, own) for level in quantiles or (0.5,)]
        predicted = np.stack([each.values(table.test) for each in fitted], axis=1)
        values.append(np.sort(predicted, axis=1))
    truth = _everywhere(table, head)[table.test]
    return Baseline(
        TREES, score_forecast(quantiles, _in_units(table, head, values), truth), settings
    )


def _quantiles(head: ForecastHead | DenseHead) -> tuple[float, ...]:
    return head.quantiles if isinstance(head, ForecastHead) else ()


def _in_units(table: Table, head: ForecastHead | DenseHead, values: list[Floats]) -> Floats:
    """Encoded predictions by target as the head's output: [n, targets, quantiles]."""
    stacked = np.stack(values, axis=1)
    return stacked if isinstance(head, DenseHead) else _units(table.spec, head, stacked)


def _anomaly(table: Table, head: AnomalyHead) -> list[Baseline]:
    numeric, shared = _anomaly_targets(table, head)

    def score(means: dict[str, Floats], at: NDArray[np.int64]) -> Scored:
        nats = shared[at].copy()
        for name in numeric:
            value = table.encoded(name)
            nats += _gaussian(value, means[name], table.train, at)
        return Scored({"nll": nats})

    def running(life: float | None) -> dict[str, Floats]:
        return {name: table.running(table.encoded(name), life) for name in numeric}

    last = {name: table.last_known(table.encoded(name)) for name in numeric}
    tried = [
        (float(np.nanmean(score(running(life), table.validate).losses["nll"])), life)
        for life in HALF_LIVES
    ]
    loss, life = min(tried, key=lambda item: item[0])
    return [
        Baseline(LAST, score(last, table.test), {}),
        Baseline(
            RUNNING,
            score(running(life), table.test),
            {"half_life_events": life, "validation": loss},
        ),
    ]


def _anomaly_targets(table: Table, head: AnomalyHead) -> tuple[list[str], Floats]:
    """The numeric targets, and the nats of all others at every row."""
    numeric = [n for n in head.targets if isinstance(event_field(table.spec, n), NumericField)]
    shared = np.zeros(table.streams.events)
    for name in set(head.targets) - set(numeric):
        shared += _frequency_nats(table, name)
    return numeric, shared


def _anomaly_trees(table: Table, head: AnomalyHead, budget: TimeBudget) -> Baseline:
    numeric, shared = _anomaly_targets(table, head)
    nats = shared[table.test].copy()
    settings: dict[str, Any] = {}
    for at, name in enumerate(numeric):
        own = budget.part(len(numeric) - at, name)
        truth = table.encoded(name)
        mean = table.tune_trees("squared_error", truth, own.part(2))
        every = np.flatnonzero(np.append(False, table.streams.has_next[:-1]))
        predicted = np.full(table.streams.events, np.nan)
        predicted[every] = mean.values(every)
        # A second ensemble says how far off the first one is, as log squared error.
        error = np.log(np.square(truth - predicted) + 1e-4)
        spread = table.tune_trees("squared_error", error, own.part(1, "spread"))
        log_deviation = np.full(table.streams.events, np.nan)
        log_deviation[every] = 0.5 * spread.values(every)
        # The training errors that both were fitted on are smaller than those to come.
        usable = table.validate[~np.isnan(truth[table.validate])]
        ratio = np.square(truth - predicted)[usable] / np.exp(2 * log_deviation[usable])
        log_deviation += 0.5 * np.log(ratio.mean())
        nats += gaussian_nats(truth - predicted, log_deviation)[table.test]
        settings[name] = {"mean": mean.settings, "spread": spread.settings}
    return Baseline(TREES, Scored({"nll": nats}), settings)


def _gaussian(
    value: Floats, series: Floats, train: NDArray[np.int64], at: NDArray[np.int64]
) -> Floats:
    """Nats of the values at `at`: mean linear in the series one event earlier, one deviation."""
    usable = train[~np.isnan(value[train]) & ~np.isnan(series[train - 1])]
    middle, before = float(value[usable].mean()), series[usable - 1]
    apart = before - before.mean()
    variance = float(np.mean(np.square(apart)))
    # a constant series says nothing
    slope = float(np.mean(apart * value[usable])) / variance if variance > 0 else 0.0
    offset = middle - slope * float(before.mean())
    deviation = float(np.std(value[usable] - slope * before - offset))
    means = np.where(np.isnan(series[at - 1]), middle, slope * series[at - 1] + offset)
    return gaussian_nats(value[at] - means, np.full(len(at), np.log(max(deviation, 1e-3))))


def _frequency_nats(table: Table, name: str) -> Floats:
    field = event_field(table.spec, name)
    column = table.rows[:, [c.name for c in table.spec.columns].index(name)].astype(np.int64)
    count = field.codes if isinstance(field, CategoricalField) else 2
    present = np.ones(len(column), np.bool_)
    if isinstance(field, BooleanField):
        present = table.streams.columns.present[name]
    codes = column[table.train][present[table.train]]
    share = np.bincount(codes, minlength=count) + 1.0
    return np.where(present, -np.log(share / share.sum())[column], 0.0)


def _units(spec: ModelSpec, head: ForecastHead, values: Floats) -> Floats:
    """Undo standardisation and transform: [n, targets, quantiles]."""
    columns = [in_units(spec, name, values[:, at]) for at, name in enumerate(head.targets)]
    return np.stack(columns, axis=1)


def in_units(spec: ModelSpec, name: str, values: Floats) -> Floats:
    """Undo standardisation and transform of a numeric field's values."""
    field = event_field(spec, name)
    if not isinstance(field, NumericField) or field.mean is None or field.std is None:
        raise SpecError(f"field {name!r}: expected a fitted numeric field")
    value = values * field.std + field.mean
    if field.transform == "signed_log1p":
        value = np.sign(value) * np.expm1(np.abs(value))
    return value
