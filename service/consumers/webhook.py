"""A webhook: outputs as signed POST requests, by the Standard Webhooks specification.

A request has a batch of outputs, since one request for each would bound their rate by the
receiver's latency: those of a topic are delivered one after another. Its `webhook-id` is the same
if the same batch is sent again. After a crash the same outputs may come in other batches, so a
receiver recognises an output by its stream, epoch and position.

The receiver is the operator's choice, so private addresses are allowed. Redirects are not followed,
and proxies of the environment are not used.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ssl
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx
import msgspec

from service.consumers.alarms import describe_alarm
from service.consumers.events import read_document
from service.consumers.relay import DeliveryFailed, DeliveryRejected
from service.consumers.webhook_config import WebhookConfig, read_secret
from service.core.errors import OperatorError
from service.store.topics import Entry

MAX_TIME_S: Final = datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp()
TYPE: Final = "carry.outputs"
"""The type of every message."""

MIN_SECRET_BYTES: Final = 24
MAX_RETRY_AFTER_S: Final = 3600.0
MAX_REPLY_BYTES: Final = 65_536
"""Most bytes of a reply that are read, so that its connection can be used again."""

MAX_REASON_BYTES: Final = 300
"""Most bytes of a reply in the reason of a failure."""

RETRIED_STATUSES: Final = {401, 403, 404, 405, 407, 408, 410, 421, 425, 429}
"""Statuses of 4xx that are retried, since they are not about the outputs: a wrong address or
secret, or too many requests."""

_encode = msgspec.json.Encoder().encode


class Webhook:
    """A sink (`service.consumers.relay.Sink`) that posts outputs; `close` after use.

    Args:
        is_json: whether outputs are JSON; otherwise MessagePack.

    Raises:
        OperatorError: a secret or the file of certificates is missing or invalid.
    """

    def __init__(self, config: WebhookConfig, *, is_json: bool = True):
        self.batch = config.batch
        self.on_error = config.on_error
        self._url = str(config.url)
        self._host = config.url.host
        self._timeout_s = config.timeout_s
        self._is_json = is_json
        self._keys = _signing_keys(read_secret(config.secret, "webhook.secret"))
        headers = {
            name: read_secret(value, f"webhook.headers.{name}")
            for name, value in config.headers.items()
        }
        for name, value in headers.items():
            if not (value.isascii() and value.isprintable()):
                raise OperatorError(f"webhook.headers.{name}: expected printable ASCII")
        verify: ssl.SSLContext | bool = True
        if config.ca_file is not None:
            try:
                verify = ssl.create_default_context(cafile=config.ca_file)
            except (OSError, ssl.SSLError) as error:
                raise OperatorError(f"webhook.ca_file: {config.ca_file}: {error}") from error
        self._client = httpx.AsyncClient(
            headers={"user-agent": "carry"} | headers,
            verify=verify,
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def check(self) -> None:
        """Do nothing: a receiver may start later."""

    async def deliver(self, topic: str, entries: Sequence[Entry]) -> None:
        """Post outputs; see `Sink`."""
        body = self._body(topic, entries)
        message = f"{topic}\0{entries[0].id!r}\0{entries[-1].id!r}\0{len(entries)}"
        message_id = f"msg_{hashlib.blake2b(message.encode(), digest_size=16).hexdigest()}"
        sent_s = str(int(time.time()))
        signed = f"{message_id}.{sent_s}.".encode() + body
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": sent_s,
            "webhook-signature": " ".join(_sign(key, signed) for key in self._keys),
        }
        status, text, retry_after_s = await self._post(body, headers)
        if 200 <= status < 300:
            return
        reason = f"{self._host} returned {status}: {text}".rstrip(": ")
        if 400 <= status < 500 and status not in RETRIED_STATUSES:
            raise DeliveryRejected(reason)
        raise DeliveryFailed(reason, retry_after_s)

    async def _post(self, body: bytes, headers: dict[str, str]) -> tuple[int, str, float]:
        """Send a request; returns status, beginning of the reply, and `Retry-After` in seconds."""
        status, retry_after_s, reply = 0, 0.0, b""
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self._url, content=body, headers=headers) as response,
            ):
                retry_after_s = _retry_after_s(response.headers.get("retry-after", ""))
                status = response.status_code
                async for part in response.aiter_raw():
                    reply += part
                    if len(reply) > MAX_REPLY_BYTES:
                        break
        except (httpx.HTTPError, OSError) as error:
            # the status decides, even if the rest of the reply is lost
            if not status:
                reason = str(error) or type(error).__name__
                raise DeliveryFailed(f"{self._host}: {reason}") from error
        text = " ".join(reply[:MAX_REASON_BYTES].decode("utf-8", "replace").split())
        return status, "".join(filter(str.isprintable, text)), retry_after_s

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def _body(self, topic: str, entries: Sequence[Entry]) -> bytes:
        """The message: type, time of the last entry, topic, and the outputs; with alarms also a
        text, which chat tools show."""
        # an id that a writer chose may be any number
        last_s = min(int(entries[-1].id.partition(b"-")[0]) / 1000, MAX_TIME_S)
        data = [self._output(entry) for entry in entries]
        message = {
            "type": TYPE,
            "timestamp": datetime.fromtimestamp(last_s, UTC).isoformat(timespec="milliseconds"),
            "topic": topic,
            "data": data,
        }
        if lines := list(filter(None, map(describe_alarm, data))):
            message["text"] = "\n".join(lines)
        return _encode(message)

    def _output(self, entry: Entry) -> dict[str, Any]:
        """The fields of an entry, of which `outputs` is a document and three are numbers."""
        fields = entry.fields or ()
        output: dict[str, Any] = {"entry": entry.id.decode()}
        try:
            for name, value in zip(fields[::2], fields[1::2], strict=True):
                key = name.decode()
                if key == "outputs":
                    output[key] = read_document(value, is_json=self._is_json)
                elif key in ("position", "time"):
                    output[key] = int(value)
                elif key == "severity":
                    output[key] = float(value)
                else:
                    output[key] = value.decode()
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            raise DeliveryRejected(f"the entry is not an output: {error}") from error
        if "outputs" not in output:
            raise DeliveryRejected("the entry is not an output: expected the field `outputs`")
        return output


def _signing_keys(text: str) -> list[bytes]:
    """The keys of secrets that whitespace separates.

    Raises:
        OperatorError
    """
    keys = []
    for secret in text.split():
        try:
            keys.append(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
        except binascii.Error:
            keys.append(b"")
    if not keys or min(map(len, keys)) < MIN_SECRET_BYTES:
        raise OperatorError(
            f"webhook.secret: expected whsec_ and at least {MIN_SECRET_BYTES} bytes in base64, "
            'such as from `echo "whsec_$(openssl rand -base64 32)"`'
        )
    return keys


def _sign(key: bytes, content: bytes) -> str:
    return f"v1,{base64.b64encode(hmac.digest(key, content, 'sha256')).decode()}"


def _retry_after_s(value: str) -> float:
    """Seconds of a header `Retry-After`, which is a number of them or a date; 0 if neither."""
    try:
        seconds = float(value) if value.isdecimal() else _seconds_until(value)
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def _seconds_until(date: str) -> float:
    return parsedate_to_datetime(date).timestamp() - time.time()
