"""A server of the V2 protocol, and inference requests for one of its models."""

from __future__ import annotations

import json
import queue
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from importlib import import_module
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import anyio
import httpx
import numpy as np
from numpy.typing import NDArray
from tritonclient.utils import triton_to_np_dtype

Tensors = Mapping[str, NDArray[Any]]

TIMEOUT_S: Final = 60.0
NUMERIC: Final = (
    *("BOOL", "FP16", "FP32", "FP64", "INT8", "INT16", "INT32", "INT64"),
    *("UINT8", "UINT16", "UINT32", "UINT64"),
)
"""All datatypes except BYTES."""


class Failure(Exception):
    """The server does not do what the protocol says."""


class Unsupported(Exception):
    """The server, the model or this installation lacks what a case needs."""


class Reply(NamedTuple):
    """A reply: its outputs, and the rest of it in JSON."""

    outputs: Tensors
    document: Mapping[str, Any]


class Transport:
    """Triton's client of one transport, `http` or `grpc`."""

    def __init__(self, kind: str, address: str, headers: Mapping[str, str], is_tls: bool = False):
        try:
            self.kind: Any = import_module(f"tritonclient.{kind}")
        except ImportError as error:
            raise Unsupported(f"pip install 'carry-client[conformance]' ({error})") from error
        self.is_http = kind == "http"
        timeouts = {"connection_timeout": TIMEOUT_S, "network_timeout": TIMEOUT_S}
        options = timeouts if self.is_http else {}
        self.client: Any = self.kind.InferenceServerClient(address, ssl=is_tls, **options)
        self._headers = headers
        self._as_json: dict[str, Any] = {} if self.is_http else {"as_json": True}

    def get(self, method: str, *names: str) -> Any:
        """Call a method of the client; messages are returned as JSON."""
        options = self._as_json if method.startswith("get_") else {}
        return self._call(method, *names, headers=self._headers, **options)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the client, which has `TIMEOUT_S` altogether.

        The timeouts of the HTTP client are of each byte; gevent, which it waits by, ends the call.
        """
        send = getattr(self.client, method)
        if not self.is_http:
            return send(*arguments, client_timeout=TIMEOUT_S, **options)
        with import_module("gevent").Timeout(TIMEOUT_S, _late()):
            return send(*arguments, **options)

    def call(
        self,
        tensors: Tensors,
        outputs: Mapping[str, bool],
        binary: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """The arguments of an inference call.

        Args:
            outputs: the requested outputs, and whether each is binary; none over gRPC: all.
            binary: whether the tensors of the request are; gRPC has one format.
        """
        inputs = []
        for name, array in tensors.items():
            datatype = next(each for each in NUMERIC if triton_to_np_dtype(each) == array.dtype)
            inputs.append(self.kind.InferInput(name, array.shape, datatype))
            inputs[-1].set_data_from_numpy(
                array, **({"binary_data": binary} if self.is_http else {})
            )
        requested = [
            self.kind.InferRequestedOutput(
                name, **({"binary_data": wanted} if self.is_http else {})
            )
            for name, wanted in outputs.items()
        ]
        return {"inputs": inputs, "outputs": requested or None, **options}

    def infer(self, model: str, tensors: Tensors, **options: Any) -> Reply:
        """Send an inference request; `options` are those of `call` and of the client."""
        call = self.call(tensors, **options)
        return self.read(self._call("infer", model, headers={**self._headers}, **call))

    def read(self, result: Any) -> Reply:
        """The reply in a result of the client."""
        document = result.get_response(**self._as_json)
        found = {each["name"]: result.as_numpy(each["name"]) for each in document["outputs"]}
        for each in document["outputs"]:
            shape = [*map(int, each["shape"])]
            if list(found[each["name"]].shape) != shape:
                raise Failure(f"output {each['name']} has not the shape {shape}")
        return Reply(found, document)

    def stream(self, model: str, calls: Sequence[Mapping[str, Any]]) -> list[Reply | Exception]:
        """Send requests on one stream of gRPC: the reply to each, or its error."""
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        answer = lambda result, error: answers.put((result, error))  # noqa: E731
        self.client.start_stream(answer, headers=self._headers)
        try:
            for call in calls:
                self.client.async_stream_infer(model, **call)
            pairs = [answers.get(timeout=TIMEOUT_S) for _ in calls]
        finally:
            self.client.stop_stream(cancel_requests=True)
        return [error or self.read(result) for result, error in pairs]


class Server:
    """A server, one of its models, and requests for it.

    Args:
        url: of HTTP.
        grpc: address of gRPC, as `HOST:PORT`; empty: its cases are not supported.
        shapes: of the inputs to send; empty: all inputs, 1 for each axis of any size.
        headers: of each request, and metadata of each call.

    Raises:
        Exception: the metadata of the server or the model cannot be read.
    """

    def __init__(
        self,
        url: str,
        model: str,
        grpc: str = "",
        shapes: Mapping[str, Sequence[int]] | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.model, parts, headers = model, urlsplit(url), headers or {}
        self._raw = partial(httpx.AsyncClient, base_url=url, headers=headers, timeout=None)
        self.http = Transport("http", parts.netloc + parts.path, headers, parts.scheme == "https")
        self._connect = partial(Transport, "grpc", grpc, headers) if grpc else None
        try:
            self._read_metadata(shapes or {})
        except BaseException:
            self.close()
            raise

    def _read_metadata(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.extensions = frozenset(self.http.get("get_server_metadata")["extensions"])
        self.metadata = self.http.get("get_model_metadata", self.model)
        self.outputs = {each["name"]: False for each in self.metadata["outputs"]}
        self._inputs = {
            name: (each["datatype"], shapes.get(name) or [max(1, n) for n in each["shape"]])
            for each in self.metadata["inputs"]
            if (name := each["name"]) in (shapes or {name})
        }
        config = self.request("GET", f"/v2/models/{self.model}/config")
        self.has_config = config.status_code == httpx.codes.OK
        self.is_stateful = self.has_config and "sequence_batching" in config.json()

    def close(self) -> None:
        """Close all connections."""
        for transport in ("http", "grpc"):
            if transport in vars(self):
                vars(self)[transport].client.close()

    @cached_property
    def grpc(self) -> Transport:
        """The transport of gRPC, which connects when it is used first."""
        if self._connect is None:
            raise Unsupported("no address of gRPC was given")
        return self._connect()

    def tensors(self, seed: int = 0) -> Tensors:
        """Random values for each input: floats from -1 to 1, or 0 and 1."""
        generator, found = np.random.default_rng(seed), {}
        for name, (datatype, shape) in self._inputs.items():
            if datatype not in NUMERIC:
                raise Unsupported(f"input {name} is {datatype}: choose others by --shape")
            is_float = datatype.startswith("FP")
            values = generator.uniform(-1, 1, shape) if is_float else generator.random(shape) < 0.5
            found[name] = np.asarray(values).astype(triton_to_np_dtype(datatype))
        return found

    def infer(self, transport: Transport, seed: int = 0, **options: Any) -> Reply:
        """Send a request, which is a sequence of its own if the model takes sequences."""
        options = {"outputs": self.outputs if transport.is_http else {}, **self.alone(), **options}
        return transport.infer(self.model, self.tensors(seed), **options)

    def alone(self) -> dict[str, Any]:
        """Options of a request that is a whole sequence, if the model takes sequences."""
        if not self.is_stateful:
            return {}
        return {"sequence_id": new_id(), "sequence_start": True, "sequence_end": True}

    def body(self) -> dict[str, Any]:
        """A request in JSON that is a whole sequence, if the model takes sequences."""
        inputs = [
            {"name": name, "datatype": datatype, "shape": [*shape], "data": values.ravel().tolist()}
            for (name, (datatype, shape)), values in zip(
                self._inputs.items(), self.tensors().values(), strict=True
            )
        ]
        return {"inputs": inputs, "parameters": self.alone()}

    def post(self, content: Any) -> httpx.Response:
        """Send a body: bytes as they are, anything else as JSON."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.request("POST", f"/v2/models/{self.model}/infer", content=body)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send one request as it is; its whole reply arrives within `TIMEOUT_S`.

        Raises:
            Failure: it does not.
        """

        async def send() -> httpx.Response:
            async with self._raw() as client:
                with anyio.fail_after(TIMEOUT_S):
                    return await client.request(method, path, **options)

        try:
            return anyio.run(send)
        except TimeoutError:
            raise _late() from None

    def sequence(
        self, transport: Transport, *seeds: int, sequence_id: int | str = 0
    ) -> list[Tensors]:
        """The outputs of requests of one sequence, which starts with the first and does not end."""
        if self.has_config and not self.is_stateful:
            raise Unsupported("the model has no sequence_batching")
        options = {"sequence_id": sequence_id or new_id(), "sequence_end": False}
        return [
            self.infer(transport, seed, sequence_start=at == 0, **options).outputs
            for at, seed in enumerate(seeds)
        ]


def _late() -> Failure:
    return Failure(f"expected a whole reply within {TIMEOUT_S:g} s")


def new_id() -> int:
    """A sequence id that no other request uses."""
    return uuid.uuid4().int >> 80
