"""The stand-in service of the replay's tests, for the examples."""

from tests.service.replay.conftest import background, standin, streams

__all__ = ["background", "standin", "streams"]
