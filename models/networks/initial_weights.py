"""Initialises the weights of a specification from a seed: pure NumPy, no runtime.

The distributions are Keras' defaults (Glorot uniform kernels and projections, orthogonal recurrent
kernels, a forget gate bias of 1, gains of 1, embeddings uniform within 0.05), drawn from NumPy's
generator; peepholes, slopes and offsets are 0. Every weight has a random generator of its own,
seeded by (seed, name), so that adding a layer changes no other weight. Needs no fitted schema, only
the vocabularies.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from math import prod

import numpy as np
from numpy.typing import NDArray

from models.spec.decoder import DECODER, add_decoder_prefix
from models.spec.layers import BidirectionalLayer, LstmLayer
from models.spec.layout import weight_shapes
from models.spec.model import ModelSpec

EMBEDDING_RANGE = 0.05
FORGET_GATE = 1
"""Which block of units in an LSTM's bias belongs to the forget gate, in the order i, f, c, o."""


def draw_weights(spec: ModelSpec, seed: int) -> Mapping[str, NDArray[np.float32]]:
    """Draw every weight of the network.

    Args:
        spec: the model; its categorical fields need their vocabularies.
        seed: any integer >= 0; the same seed gives the same weights.

    Returns:
        name -> float32 array, the names and shapes of `models.spec.layout.weight_shapes`.
    """
    weights = _draw(spec, seed, "")
    if spec.decoder_network is not None:
        lead = f"{DECODER}."
        weights.update(add_decoder_prefix(_draw(spec.decoder_network, seed, lead)))
    return weights


def _draw(spec: ModelSpec, seed: int, lead: str) -> dict[str, NDArray[np.float32]]:
    """Draw the weights of one network; `lead` is the prefix of the names that seed them."""
    cells = [
        cell
        for layer in spec.layers
        for cell in (layer.directions if isinstance(layer, BidirectionalLayer) else (layer,))
    ]
    lstms = {cell.name: cell.units for cell in cells if isinstance(cell, LstmLayer)}
    weights: dict[str, NDArray[np.float32]] = {}
    for name, shape in weight_shapes(spec).items():
        if name.startswith(f"{DECODER}."):
            continue
        owner, _, kind = name.rpartition(".")
        digest = int.from_bytes(sha256((lead + name).encode()).digest()[:8], "little")
        random = np.random.default_rng([seed, digest])
        if name.startswith("embedding."):
            values = random.uniform(-EMBEDDING_RANGE, EMBEDDING_RANGE, shape)
        elif kind in ("kernel", "projection"):
            # of a convolution, the steps that the kernel reads multiply both
            limit = np.sqrt(6.0 / ((shape[-2] + shape[-1]) * prod(shape[:-2])))
            values = random.uniform(-limit, limit, shape)
        elif kind == "context":
            # a kernel of one column
            limit = np.sqrt(6.0 / (shape[0] + 1))
            values = random.uniform(-limit, limit, shape)
        elif kind == "recurrent_kernel":
            values = _orthogonal(random, shape)
        elif kind.endswith("gamma") or kind in ("moving_variance", "scale"):
            values = np.ones(shape)
        else:
            values = np.zeros(shape)
            if kind == "bias" and owner in lstms:
                units = lstms[owner]
                values[FORGET_GATE * units : (FORGET_GATE + 1) * units] = 1.0
        weights[name] = values.astype(np.float32)
    return weights


def _orthogonal(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Rows of unit length at right angles, [units, gates * units] with gates >= 1.

    Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep linear neural
    networks"; the signs of R's diagonal make the draw uniform.
    """
    rows, columns = shape
    q, r = np.linalg.qr(random.standard_normal((columns, rows)))
    return np.asarray((q * np.sign(np.diagonal(r))).T)
