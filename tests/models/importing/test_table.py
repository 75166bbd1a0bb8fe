"""The table of Keras models: each is served exactly, or rejected with an alternative."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import keras
import numpy as np
import pytest

from models.errors import ImportedModelError, ModelsError
from models.importing import verification
from models.importing.packaging import ImportReport
from tests.models.importing.accepted_models import ACCEPTED, STEPS, Accepted, gru, lstm, sequence
from tests.models.importing.exported_models import EXPORTED
from tests.models.importing.rejected_models import REJECTED
from tests.models.importing.saving import import_error, import_here, save_model
from tests.support.service import running

MODELS = {**ACCEPTED, **{name: EXPORTED[name] for name in ("custom-cell", "conditioned")}}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WINDOWED = "window-reset"
"""The model `window`, whose state is reset after each window."""

Import = tuple[Any, ImportReport | ModelsError]


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Import]:
    """Every accepted model: the original and what it was imported as."""
    models: dict[str, Import]
    folder, models = tmp_path_factory.mktemp("keras"), {}
    (folder / "models").mkdir()
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(verification, "LENGTHS_STEPS", (3,))
    for seed, (name, case) in enumerate(MODELS.items()):
        model = case.build()
        path = save_model(model, folder / f"{name}.keras", seed)
        try:
            models[name] = model, import_here(path, folder / "models" / name)
        except ModelsError as error:
            models[name] = model, error
    window = folder / "window.keras"
    reset = import_here(window, folder / "models" / WINDOWED, WINDOWED, reset_every=STEPS)
    models[WINDOWED] = models["window"][0], reset
    monkeypatch.undo()
    return models


@pytest.fixture(scope="module")
def client(
    imported: dict[str, Import], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    """A client of one service of them all."""
    reports = (report for _, report in imported.values() if isinstance(report, ImportReport))
    folder = next(reports).artifact.path.parent
    with (
        running(tmp_path_factory.mktemp("served"), folder) as service,
        httpx.Client(base_url=service.url, timeout=60) as up,
    ):
        yield up


@pytest.mark.parametrize("name", MODELS)
def test_chunks_equal_keras_on_the_whole_sequence(
    name: str, imported: dict[str, Import], client: httpx.Client
) -> None:
    case, (model, report) = MODELS[name], imported[name]
    assert isinstance(report, ImportReport), report
    assert (report.artifact.spec.onnx is not None) == (name in EXPORTED)
    random = np.random.default_rng(len(name))
    rows = random_rows(case, random)
    expected = keras_outputs(case, model, rows)
    assert tuple(output.name for output in report.artifact.outputs.outputs) == case.heads
    for words in case.notes:
        assert any(words in note for note in report.notes), report.notes
    if report.artifact.spec.chunking == "whole":
        body = {"sequences": [{"inputs": rows[0].tolist()}]}
        reply = client.post(f"/v1/models/{name}/predict", json=body).raise_for_status().json()
        outputs = {h: np.asarray(v) for h, v in reply["predictions"][0]["outputs"].items()}
    else:
        whole = report.artifact.spec.chunking == "per_chunk"
        cuts = [] if whole else sorted(random.choice(np.arange(1, STEPS), 3, replace=False))
        outputs = _send_chunks(client, name, np.split(rows[0], cuts))
    sequences = [value for index, value in enumerate(expected) if index not in case.states]
    for head, value in zip(case.heads, sequences, strict=True):
        is_sequence = outputs[head].ndim == value[0].ndim
        got = outputs[head] if is_sequence else outputs[head][-1]
        np.testing.assert_allclose(got, value[0], **CLOSE)
    if case.states:
        stored = client.get(f"/v1/models/{name}/streams/one/state").raise_for_status().json()
        for index, part in case.states.items():
            np.testing.assert_allclose(stored["state"][part], expected[index][0], **CLOSE)


def test_rows_with_unknown_codes_are_rejected(client: httpx.Client) -> None:
    url = "/v1/models/numbers-and-codes"
    columns = client.get(url).raise_for_status().json()["columns"]
    assert [column.get("codes") for column in columns] == [None, None, None, 5, 7]
    rows = [[0.5, 0.5, 0.5, 1, 2], [0.5, 0.5, 0.5, 5, 2]]
    reply = client.post(f"{url}/streams/unknown/chunks", json={"inputs": rows})
    assert reply.status_code == 422
    for words in ("feature_3", "a whole code from 0 to 4", "5"):
        assert words in reply.text


def test_a_window_can_begin_from_the_zero_state_each_time(
    imported: dict[str, Import], client: httpx.Client
) -> None:
    model, rows = imported[WINDOWED][0], np.random.default_rng(9).normal(size=(3 * STEPS, 3))
    outputs = _send_chunks(client, WINDOWED, np.split(rows, [3, STEPS + 5, 2 * STEPS]))["output"]
    windows = rows.reshape(3, STEPS, 3).astype(np.float32)
    np.testing.assert_allclose(outputs[STEPS - 1 :: STEPS], np.asarray(model(windows)), **CLOSE)


@pytest.mark.parametrize("words", REJECTED)
def test_unsupported_models_are_rejected_with_an_alternative(words: str, tmp_path: Path) -> None:
    error = import_error(REJECTED[words](), tmp_path)
    for each in words.split(" | "):
        assert each in error, error


def test_what_follows_a_rejected_layer_is_not_reported(tmp_path: Path) -> None:
    rows = sequence()
    back = lstm(go_backwards=True, return_state=True, name="back")()
    values, *states = back(rows)
    values = gru(name="fine")()(lstm(name="above")()(values, initial_state=states))
    error = import_error(keras.Model(rows, values), tmp_path)
    assert "LSTM 'back': go_backwards=True" in error
    assert "'above'" not in error
    assert "'fine'" not in error


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_weights_without_a_model_are_rejected_with_an_alternative(tmp_path: Path) -> None:
    path = tmp_path / "m.weights.h5"
    ACCEPTED["lstm"].build().save_weights(path)
    with pytest.raises(ImportedModelError, match=r"model\.save\('model\.keras'\)"):
        import_here(path, tmp_path / "out")


def random_rows(case: Accepted, random: np.random.Generator) -> np.ndarray:
    rows = random.normal(size=(1, STEPS, case.features)).astype(np.float32)
    for column, codes in case.codes.items():
        rows[..., column] = random.integers(1, codes, STEPS)
    own = case.of_events or case.features
    rows[..., own:] = rows[:, :1, own:]
    return rows


def keras_outputs(case: Accepted, model: Any, rows: np.ndarray) -> list[np.ndarray]:
    """All outputs on the whole sequence, from the zero state, in Keras' order."""
    for layer in model._flatten_layers():
        if getattr(layer, "stateful", False) and hasattr(layer, "reset_state"):
            layer.reset_state()
    return [np.asarray(value) for value in keras.tree.flatten(model(case.inputs(rows)))]


def _send_chunks(
    client: httpx.Client, name: str, chunks: list[np.ndarray]
) -> dict[str, np.ndarray]:
    """The outputs of one stream, by name."""
    outputs: dict[str, list[np.ndarray]] = {}
    for chunk in chunks:
        url = f"/v1/models/{name}/streams/one/chunks"
        reply = client.post(url, json={"inputs": chunk.tolist()}).raise_for_status().json()
        for head, values in reply["outputs"].items():
            outputs.setdefault(head, []).append(np.asarray(values))
    return {head: np.concatenate(values) for head, values in outputs.items()}
