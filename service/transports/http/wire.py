"""Between bytes and the values of the pipeline, for one model: a reader in, a writer out."""

from __future__ import annotations

from service.pipeline.served_model import ServedModel
from service.transports.http.bodies.request_reader import RequestReader
from service.transports.http.limits import ApiLimits
from service.transports.http.long_bodies.long_reader import LongReader
from service.transports.http.replies.reply_writer import ReplyWriter


class ModelWire:
    """What the routes need of one model.

    Attributes:
        reader: makes values of its requests.
        long: makes values of long requests, yielding the event loop.
        writer: makes replies of values.
    """

    __slots__ = ("long", "reader", "served", "writer")

    def __init__(self, served: ServedModel, limits: ApiLimits):
        self.served = served
        self.reader = RequestReader(served, limits)
        self.long = LongReader(self.reader)
        self.writer = ReplyWriter(served)
