"""State tokens: the state after a predicted sequence, held by the client, signed by the service.

A token continues a sequence on any worker, and nothing is stored. Its bytes are opaque to clients:

    offset  size  what
         0     4  magic "CRRT"
         4     1  format, 1
         5     1  n, length of the model's name
         6    32  HMAC-SHA256 over all other bytes, under the store's token key
        38     n  the model's name
      38+n        the state as the store would hold it (`service.store.codec`): fingerprint,
                  feed, position, values and a checksum; without epoch, tag and last chunk

The signature comes first: nothing else of a token is read unless the service wrote it. The key is a
random secret in the store, which all workers share anyway: who can read it can read every state.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Final

from models.spec.state import State
from service.core.errors import (
    CarryError,
    InputKindMismatch,
    StateTokenInvalid,
    StateTokenOfOtherModel,
    StateTokenOfOtherVersion,
)
from service.core.values import EPOCH_BYTES, FIRST_TAG, Steps, StreamHead, StreamState
from service.pipeline.model_versions import ModelVersions
from service.pipeline.served_model import ServedModel
from service.store.codec import decode_state, encode_state
from service.store.layout import CodecError

MAGIC: Final = b"CRRT"
FORMAT: Final = 1
KEY_LIFE_S: Final = 60.0
"""A key is read again after this time: the store may have lost it, and got another."""

_HEADER: Final = len(MAGIC) + 2
_SIGNED: Final = _HEADER + 32


class StateTokens:
    """Signs and verifies the tokens of a worker.

    Args:
        read_key: reads the store's token key.
        clock_s: monotonic time.
    """

    def __init__(
        self,
        read_key: Callable[[], Awaitable[bytes]],
        clock_s: Callable[[], float] = time.monotonic,
    ):
        self._read_key = read_key
        self._clock_s = clock_s
        self._key: bytes | None = None
        self._read_s = 0.0

    async def sign(self, served: ServedModel, state: StreamState) -> bytes:
        """The token of a state.

        Raises:
            StoreUnavailable: the key is not known, and the store does not answer.
        """
        name = served.name.encode()
        header = MAGIC + bytes((FORMAT, len(name)))
        body = name + encode_state(state)
        return header + _signature(await self._current_key(), header, body) + body

    async def verify(self, versions: ModelVersions, token: bytes, steps: Steps) -> StreamState:
        """The state of a token that is to be continued by `steps`, of any loaded version.

        Raises:
            StateTokenInvalid, StateTokenOfOtherModel, StateTokenOfOtherVersion, InputKindMismatch,
                StoreUnavailable
        """
        if len(token) < _SIGNED or token[: len(MAGIC)] != MAGIC:
            raise StateTokenInvalid("expected a token that the service returned, got other bytes")
        if token[len(MAGIC)] != FORMAT:
            raise StateTokenInvalid(
                f"expected a token of format {FORMAT}, got format {token[len(MAGIC)]}",
                expected=FORMAT,
                got=token[len(MAGIC)],
            )
        if not self._is_signed(await self._current_key(), token) and not self._is_signed(
            await self._current_key(max_age_s=0), token
        ):
            raise StateTokenInvalid(
                "expected the signature of this service, got another: the token was changed, or "
                "comes from a service with another store"
            )
        end = _SIGNED + token[_HEADER - 1]
        model = token[_SIGNED:end].decode()
        if model != versions.name:
            raise StateTokenOfOtherModel(
                f"expected a token of model {versions.name!r}, got one of {model!r}",
                expected=versions.name,
                got=model,
            )
        try:
            state = decode_state(token[end:])
        except CodecError as error:
            raise StateTokenInvalid(f"the state in the token is damaged: {error}") from error
        served = versions.route.champion
        if isinstance(state, StreamState):
            served = versions.writer(state.fingerprint)
        if not isinstance(state, StreamState) or not served.is_compatible(state):
            got = state.fingerprint.hex() if isinstance(state, StreamState) else "none"
            raise StateTokenOfOtherVersion(
                f"expected a token of version {served.version} of model {served.name!r}, "
                f"fingerprint {served.fingerprint.hex()}; got one of fingerprint {got}",
                expected=served.fingerprint.hex(),
                got=got,
            )
        if state.feed is not steps.feed:
            raise InputKindMismatch(
                f"expected `{state.feed}`, as in the sequence that the token continues, got "
                f"`{steps.feed}`",
                expected=str(state.feed),
                got=str(steps.feed),
            )
        return state

    def _is_signed(self, key: bytes, token: bytes) -> bool:
        signature = _signature(key, token[:_HEADER], token[_SIGNED:])
        return hmac.compare_digest(signature, token[_HEADER:_SIGNED])

    async def _current_key(self, max_age_s: float = KEY_LIFE_S) -> bytes:
        """The store's key, as it was at most so long ago; older if the store does not answer."""
        if self._key is not None and self._clock_s() - self._read_s < max_age_s:
            return self._key
        try:
            self._key, self._read_s = await self._read_key(), self._clock_s()
        except CarryError:
            if self._key is None:
                raise
        return self._key


def state_after(
    served: ServedModel, steps: Steps, before: StreamState | None, state: State
) -> StreamState:
    """The state that a token holds after a sequence.

    Args:
        before: what the token held that it continues; None if it starts from the initial state.
    """
    position = before.head.position if before else 0
    head = StreamHead(bytes(EPOCH_BYTES), FIRST_TAG, position + steps.length)
    return StreamState(head, steps.feed, served.fingerprint, None, 0, state)


def _signature(key: bytes, header: bytes, body: bytes) -> bytes:
    return hmac.digest(key, header + body, "sha256")
