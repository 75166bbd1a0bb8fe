"""Writer of replies: from the values of the pipeline to documents, for one model.

A document holds NumPy arrays, which `media.dumps` encodes. This module does not access the store.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.artifact.artifact import Artifact
from models.spec.layout import category_names
from models.spec.state import State
from service.codec import reply_types
from service.codec.media import Media
from service.core.errors import InvalidInput
from service.core.values import (
    NO_STREAM,
    AnsweringVersion,
    FloatRows,
    ForecastReply,
    ForecastRequest,
    Prediction,
    Reply,
    Timing,
)


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """The optional parts of a reply, named as in Keras.

    Attributes:
        return_sequences: the outputs of every step; otherwise of the last one alone, without
            the axis of time.
        return_state: the state after the chunk as well.
        return_attention: the weights of attention over the chunk as well.
    """

    return_sequences: bool = True
    return_state: bool = False
    return_attention: bool = False


EVERY_STEP = ReplyOptions()


class ServerTiming:
    """Writes the values of Server-Timing: milliseconds of a chunk by stage."""

    def __init__(self) -> None:
        self._timing: Timing | None = None
        self._text = b""

    def value(self, reply: Reply) -> bytes:
        """The value for one chunk; what the chunks of a batch share is written once."""
        timing = reply.timing
        if timing is not self._timing:
            times_s = timing.load_s, timing.infer_s, timing.commit_s
            text = b"load;dur=%.3f, infer;dur=%.3f, commit;dur=%.3f"
            self._timing, self._text = timing, text % tuple([1000 * time_s for time_s in times_s])
        return b"queue;dur=%.3f, %b" % (reply.queue_s * 1000, self._text)


server_timing: Final = ServerTiming().value
"""The value of Server-Timing; for use from one thread."""


class ReplyWriter:
    """Writes the replies of one model."""

    def __init__(self, artifact: Artifact):
        self._artifact = artifact
        self._name = artifact.spec.name
        self._version = artifact.version
        decoder = artifact.spec.decoder
        self._targets = () if decoder is None else decoder.targets
        self._levels = [] if decoder is None else list(decoder.head.quantiles)
        outputs = artifact.outputs.outputs
        one_axis = len(outputs) == 1 and len(outputs[0].shape) == 1
        is_usual = one_axis and outputs[0].per == "step" and not artifact.outputs.attention
        self._only = outputs[0].name if is_usual else None
        self._once = frozenset(output.name for output in outputs if output.per == "chunk")
        has_others = any(each.shape or each.categories_of for each in outputs) or self._once
        are_numbers = not (has_others or artifact.outputs.attention)
        self._numbers = tuple(artifact.outputs.slices) if are_numbers else ()
        self._categories = {
            output.name: category_names(artifact.spec, output)
            for output in outputs
            if output.categories_of
        }

    def reply(self, reply: Reply, options: ReplyOptions) -> reply_types.ChunkReply:
        """The reply to a chunk."""
        head, version = reply.head, reply.version
        document: reply_types.ChunkReply = {
            "model": self._name,
            "version": self._version if version is None else version.version,
            "stream": reply.key.stream,
            "epoch": head.epoch.hex(),
            "position": head.position,
            "tag": head.tag.hex(),
            "outputs": self.outputs(reply.outputs, options),
            "replayed": reply.replayed,
        }
        if reply.dry_run:
            document["dry_run"] = True
            if head is NO_STREAM:
                document["epoch"] = document["tag"] = None
        if reply.created:
            document["created"] = True
        if reply.output_position is not None:
            document["output_position"] = reply.output_position
        if reply.warm is not None:
            document["warm"] = {"events": reply.warm.events, "of": reply.warm.of}
        if options.return_state:
            document["state"] = self.state(reply.state, version)
        if options.return_attention:
            document["attention"] = self.attention(reply.outputs)
        return document

    def prediction(
        self, prediction: Prediction, options: ReplyOptions, media: Media
    ) -> reply_types.PredictionOfOne:
        """The prediction of one sequence."""
        document: reply_types.PredictionOfOne = {
            "outputs": self.outputs(prediction.outputs, options)
        }
        if (token := prediction.token) is not None:
            text: Any = b64encode(token).decode() if media is Media.JSON else token
            document["state_token"] = text
        if options.return_state:
            document["state"] = self.state(prediction.state, prediction.version)
        if options.return_attention:
            document["attention"] = self.attention(prediction.outputs)
        return document

    def outputs(self, rows: FloatRows, options: ReplyOptions) -> dict[str, Any]:
        """Named outputs [T, ...] of packed rows [T, O], or [...] of the last step alone (None
        if there is no step); [...] of an output that holds once for the whole chunk; names instead
        of codes."""
        if not len(rows) and not options.return_sequences:
            # in blocks a chunk may bring no output, and so no last one
            return dict.fromkeys(self._artifact.outputs.slices)
        shown_rows = rows if options.return_sequences else rows[-1]
        if self._only is not None:
            # the packed rows are its values as they are
            return {self._only: np.ascontiguousarray(shown_rows)}
        if self._numbers and options.return_sequences:
            columns = np.ascontiguousarray(shown_rows.T)
            return {name: columns[at] for at, name in enumerate(self._numbers)}
        named = self._artifact.outputs.by_name(shown_rows)
        if self._once and options.return_sequences:
            named = {n: values[-1] if n in self._once else values for n, values in named.items()}
        document = _writable(named)
        for name, categories in self._categories.items():
            document[name] = categories[document[name].astype(np.intp)].tolist()
        return document

    def attention(self, rows: FloatRows) -> dict[str, Any]:
        """Attention weights of each step [T], by layer that attends over the chunk."""
        return _writable(self._artifact.outputs.attention_by_name(rows))

    def check_options(self, options: ReplyOptions) -> None:
        """Reject options that the model does not support.

        Raises:
            InvalidInput
        """
        if options.return_attention and not self._artifact.outputs.attention:
            expected = "a model with attention over the chunk"
            raise InvalidInput(
                f"?return_attention: expected {expected}, model {self._name!r} has none",
                at="?return_attention",
                expected=expected,
                got="true",
            )

    def state(self, state: State, version: AnsweringVersion | None = None) -> dict[str, Any]:
        """A state by name, in the layout of the version that wrote it."""
        layout = self._artifact.state if version is None else version.state
        return _writable(layout.by_name(state))

    def forecast(self, reply: ForecastReply, request: ForecastRequest) -> reply_types.ForecastReply:
        """The reply to a forecast."""
        head, values = reply.head, reply.forecast
        targets: dict[str, reply_types.TargetForecast] = {}
        for at, name in enumerate(self._targets):
            targets[name] = {
                "point": np.ascontiguousarray(values.point[:, at]),
                "quantiles": np.ascontiguousarray(values.quantiles[:, at]),
            }
            if request.samples:
                targets[name]["paths"] = np.ascontiguousarray(values.paths[..., at])
        document: reply_types.ForecastReply = {
            "model": self._name,
            "version": reply.version.version,
            "stream": reply.key.stream,
            "epoch": head.epoch.hex(),
            "position": head.position,
            "tag": head.tag.hex(),
            "times_ms": list(reply.times_ms or ()),
            "levels": self._levels,
            "forecast": targets,
        }
        if reply.times_ms is None:
            del document["times_ms"]
        if reply.warm is not None:
            document["warm"] = {"events": reply.warm.events, "of": reply.warm.of}
        return document


def _writable(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    # The writers take arrays in C order and scalars, but no array without axes.
    return {
        name: np.ascontiguousarray(array) if array.ndim else array[()]
        for name, array in arrays.items()
    }
