import numpy as np
import pytest

pytest.importorskip("tensorflow")

from models.errors import SpecError
from models.networks.build import StepNetwork
from models.networks.initial_weights import draw_weights
from models.spec.model import ModelSpec, parse_spec
from models.training.data import fitted_spec, streams_of
from models.training.ensemble import merge_members
from tests.support.training import HOUR_MS, latch_frame, latch_spec


def with_layers(layers: list[dict[str, object]]) -> ModelSpec:
    plain = latch_spec().model_dump()
    handed = any("starts_from" in layer or layer["kind"] == "bidirectional" for layer in layers)
    heads = [
        {**head, "input": ""}
        for head in plain["heads"]
        if not (handed and head["kind"] == "anomaly")
    ]
    return parse_spec({**plain, "layers": layers, "heads": heads})


STACKED = [
    {"kind": "lstm", "units": 5},
    {"kind": "dropout", "rate": 0.2},
    {"kind": "gru", "units": 4},
    {"kind": "concatenate", "inputs": ["features", "dropout_1", "gru_1"]},
    {"kind": "dense", "units": 6, "activation": "relu"},
    {"kind": "layer_normalization"},
]


STATE_PASSING = [
    {"kind": "lstm", "units": 5},
    {"kind": "attention", "over": "stream", "units": 3},
    {"kind": "lstm", "units": 5, "starts_from": "lstm_1"},
    {"kind": "attention", "over": "chunk", "units": 3},
]


CONVOLVED = [
    {"kind": "conv1d", "units": 4, "kernel_size": 2, "dilation": 2},
    {"kind": "prelu"},
    {"kind": "simple_rnn", "units": 3},
    {"kind": "affine"},
    {"kind": "slice", "start": 1, "stop": 3},
]


BOTH_WAYS = [
    {"kind": "bidirectional", "units": 3},
    {"kind": "bidirectional", "cell": "gru", "units": 2, "merge": "sum"},
]


NETWORKS = [STACKED, STACKED[:1], STATE_PASSING, BOTH_WAYS, CONVOLVED]


@pytest.mark.parametrize(
    ("count", "layers"),
    [(1, STACKED), *((count, layers) for count in (2, 3) for layers in NETWORKS)],
)
def test_the_merged_network_outputs_the_mean_of_its_members(layers, count):
    streams = streams_of(with_layers(layers), latch_frame())
    spec = fitted_spec(with_layers(layers), streams, 16 * HOUR_MS)
    random = np.random.default_rng(1)
    members = [
        {
            name: value + random.normal(0, 0.2, value.shape).astype(np.float32)
            for name, value in draw_weights(spec, seed).items()
        }
        for seed in range(count)
    ]
    assert spec.events is not None
    rows = streams.encoded(spec.events)[:8].reshape(2, 4, -1)
    lengths = np.array([4, 3], np.int32)
    raw: dict[str, list[np.ndarray]] = {head.name: [] for head in spec.heads}
    for weights in members:
        network = StepNetwork(spec)
        network.set_weights(weights)
        state = np.zeros((2, network.state_size), np.float32)
        for name, value in network.forward(rows, lengths, state).raw.items():
            raw[name].append(value.numpy())
    merged_spec, weights = merge_members(spec, members)
    network = StepNetwork(merged_spec)
    network.set_weights(weights)
    state = np.zeros((2, network.state_size), np.float32)
    for name, value in network.forward(rows, lengths, state).raw.items():
        for row, length in enumerate(lengths):
            mean = np.mean([member[row, :length] for member in raw[name]], axis=0)
            np.testing.assert_allclose(value.numpy()[row, :length], mean, atol=1e-5)
    assert merged_spec.training is not None
    assert merged_spec.training.members == 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([{"kind": "layer_normalization"}, {"kind": "lstm", "units": 3}], "layer_normalization_1"),
        (
            [
                {"kind": "lstm", "units": 3},
                {"kind": "concatenate", "inputs": ["features", "lstm_1"]},
            ],
            "head 'up'",
        ),
    ],
)
def test_networks_that_cannot_be_merged_are_rejected(layers, message):
    streams = streams_of(with_layers(layers), latch_frame())
    spec = fitted_spec(with_layers(layers), streams, 16 * HOUR_MS)
    weights = [draw_weights(spec, seed) for seed in range(2)]
    with pytest.raises(SpecError, match=message):
        merge_members(spec, weights)
