"""The cases of the V2 protocol, each by the section of the specification that demands it.

Files and headings are those of the Open Inference Protocol (`inference_*.md`) and of Triton's
`docs/protocol` (`extension_*.md`). A case knows nothing of the model but the metadata, so it
compares outputs with each other.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import httpx
import numpy as np
from tritonclient.utils import InferenceServerException

from carry_client.conformance.server import (
    NUMERIC,
    Failure,
    Server,
    Tensors,
    Transport,
    Unsupported,
    new_id,
)

PASS, FAIL, UNSUPPORTED = "pass", "fail", "not supported"
REST, GRPC, SEQUENCE = "inference_rest.md", "inference_grpc.md", "extension_sequence.md"
BINARY: Final = "extension_binary_data.md", "binary_tensor_data"
UNKNOWN: Final = "no-such-name"

Check = Callable[[Server], None]


@dataclass(frozen=True)
class Case:
    """A case of the protocol.

    Attributes:
        section: file and heading of the specification.
        extension: the one that it belongs to, as servers list it; empty: part of the protocol.
        check: raises an exception if the server does not conform.
    """

    name: str
    section: str
    extension: str
    check: Check

    def run(self, server: Server) -> tuple[str, str]:
        """Run the case: its outcome, and the reason if it did not pass."""
        if self.extension and self.extension not in server.extensions:
            return UNSUPPORTED, f"the server does not list the extension {self.extension}"
        try:
            self.check(server)
        except Unsupported as reason:
            return UNSUPPORTED, str(reason)
        except Exception as error:  # what does not conform may break the client anywhere
            return FAIL, f"{type(error).__name__}: {error}"
        return PASS, ""


def expect(condition: bool, message: str) -> None:
    """Fail the case unless the condition holds."""
    if not condition:
        raise Failure(message)


def expect_error(what: str, send: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Fail the case unless the server answers a request with an error of the protocol."""
    try:
        answer = send(*arguments, **options)
    except InferenceServerException as error:
        expect(bool(error.message()), f"{what}: the error has no message")
        return
    is_error = isinstance(answer, httpx.Response) and answer.is_error
    expect(is_error, f"{what}: accepted")
    expect(isinstance(answer.json().get("error"), str), f"{what}: no message, {answer}")


def is_same(ours: Tensors, theirs: Tensors) -> bool:
    """Whether outputs have the same names and, but for rounding, the same values."""
    return ours.keys() == theirs.keys() and all(
        values.shape == theirs[name].shape
        and (
            np.array_equal(values, theirs[name])
            if values.dtype == object
            else np.allclose(values, theirs[name], rtol=1e-3, atol=1e-4)
        )
        for name, values in ours.items()
    )


CASES: Final[list[Case]] = []


def case(name: str, section: str, extension: str = "") -> Callable[[Check], Check]:
    """Register a case."""

    def register(check: Check) -> Check:
        CASES.append(Case(name, section, extension, check))
        return check

    return register


def both(
    name: str, heading: str, extension: str = ""
) -> Callable[[Callable[[Server, Transport], None]], None]:
    """Register a case of HTTP and of gRPC."""

    def register(check: Callable[[Server, Transport], None]) -> None:
        files = (SEQUENCE, SEQUENCE) if extension else (REST, GRPC)
        for kind, file in zip(("http", "grpc"), files, strict=True):
            section = f"{file} {heading}".strip()
            run = partial(_with, kind, check)
            case(f"{'HTTP' if kind == 'http' else 'gRPC'}: {name}", section, extension)(run)

    return register


def _with(kind: str, check: Callable[[Server, Transport], None], server: Server) -> None:
    check(server, getattr(server, kind))


@both("server is live and ready", "Health")
def _(server: Server, transport: Transport) -> None:
    for method in ("is_server_live", "is_server_ready"):
        expect(transport.get(method), f"{method} is false")


@both("model is ready, an unknown one is not", "Model Ready")
def _(server: Server, transport: Transport) -> None:
    expect(transport.get("is_model_ready", server.model), "the model is not ready")
    with contextlib.suppress(InferenceServerException):
        expect(not transport.get("is_model_ready", UNKNOWN), "an unknown model is ready")


@both("server metadata", "Server Metadata")
def _(server: Server, transport: Transport) -> None:
    found = transport.get("get_server_metadata")
    expect(bool(found["name"] and found["version"]), f"no name or version: {found}")
    listed = set(found.get("extensions", ()))
    expect(listed == server.extensions, f"extensions: {sorted(listed ^ server.extensions)}")


@both("model metadata, also of each version", "Model Metadata")
def _(server: Server, transport: Transport) -> None:
    versions = server.metadata.get("versions") or ()
    for names in ((server.model,), *((server.model, version) for version in versions)):
        found = transport.get("get_model_metadata", *names)
        expect(found["name"] == server.model, f"name {found['name']!r}")
        expect(isinstance(found["platform"], str), "platform is not a string")
        for tensor in (*found["inputs"], *found["outputs"]):
            expect(tensor["datatype"] in (*NUMERIC, "BYTES"), f"datatype {tensor['datatype']!r}")
            expect(all(int(size) >= -1 for size in tensor["shape"]), f"shape {tensor['shape']}")
        expect(transport.get("is_model_ready", *names), f"{names} is not ready")
    expect_error("an unknown model", transport.get, "get_model_metadata", UNKNOWN)


@both("inference returns all outputs of the metadata, and the id", "Inference")
def _(server: Server, transport: Transport) -> None:
    reply = server.infer(transport, request_id="request-42")
    expect(reply.document.get("id") == "request-42", f"id {reply.document.get('id')!r}")
    expect(reply.document["model_name"] == server.model, f"model {reply.document['model_name']!r}")
    expect(reply.outputs.keys() == server.outputs.keys(), f"outputs {sorted(reply.outputs)}")
    same = server.infer(server.http)
    expect(is_same(same.outputs, reply.outputs), "the same request over HTTP has other outputs")


@both("inference returns the requested outputs only", "Inference")
def _(server: Server, transport: Transport) -> None:
    whole = server.infer(transport).outputs
    for name, values in whole.items():
        found = server.infer(transport, outputs={name: False}).outputs
        expect(is_same(found, {name: values}), f"{sorted(found)} instead of {name}")


@both("inference with unknown names is an error", "Inference")
def _(server: Server, transport: Transport) -> None:
    tensors = server.tensors()
    renamed = {UNKNOWN: next(iter(tensors.values()))}
    model, options = server.model, {"outputs": server.outputs, **server.alone()}
    expect_error("an unknown model", transport.infer, UNKNOWN, tensors, **options)
    expect_error("an unknown input", transport.infer, model, renamed, **options)
    options["outputs"] = {UNKNOWN: False}
    expect_error("an unknown output", transport.infer, model, tensors, **options)
    expect(transport.get("is_server_live"), "the server is not live any more")


@case("HTTP: nested data equals flat data", "open_inference_rest.yaml tensor_data")
def _(server: Server) -> None:
    body = server.body()
    flat = server.post(server.body()).json()["outputs"]
    expect({each["name"] for each in flat} == server.outputs.keys(), "not all outputs are returned")
    for tensor, array in zip(body["inputs"], server.tensors().values(), strict=True):
        tensor["data"] = array.tolist()
    for ours, theirs in zip(server.post(body).json()["outputs"], flat, strict=True):
        values = [np.ravel(each["data"]) for each in (ours, theirs)]
        expect(is_same({"": values[0]}, {"": values[1]}), f"{ours['name']} differs")


@case("HTTP: malformed requests are errors", f"{REST} Inference")
def _(server: Server) -> None:
    def changed(**members: Any) -> dict[str, Any]:
        body = server.body()
        return {**body, "inputs": [{**body["inputs"][0], **members}, *body["inputs"][1:]]}

    data = server.body()["inputs"][0]["data"]
    expect_error("JSON that is cut off", server.post, b'{"inputs": [')
    expect_error("a body without inputs", server.post, {"parameters": server.alone()})
    expect_error("an unknown datatype", server.post, changed(datatype="FP31"))
    expect_error("more data than the shape", server.post, changed(data=[*data, *data]))
    expect_error("strings as numbers", server.post, changed(data=["x"] * len(data)))


@case("HTTP: binary tensors equal JSON", *BINARY)
def _(server: Server) -> None:
    expected = server.infer(server.http)
    reply = server.infer(server.http, outputs=dict.fromkeys(server.outputs, True), binary=True)
    expect(is_same(reply.outputs, expected.outputs), "the outputs differ")
    for output in reply.document["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        expected_size = reply.outputs[output["name"]].nbytes
        expect(
            size == expected_size and "data" not in output, f"output {output['name']}: {size} bytes"
        )


@case("HTTP: binary_data of an output overrides binary_data_output", *BINARY)
def _(server: Server) -> None:
    body, (name, *_) = server.body(), server.outputs
    body["parameters"]["binary_data_output"] = True
    body["outputs"] = [{"name": name, "parameters": {"binary_data": False}}]
    [output] = server.post(body).json()["outputs"]
    expect("data" in output, "binary_data is ignored")
    del body["outputs"]
    length = server.post(body).headers.get("inference-header-content-length")
    expect(length is not None, "binary_data_output is ignored")


@case("HTTP: binary tensors of the wrong size are errors", *BINARY)
def _(server: Server) -> None:
    body = server.body()
    for tensor in body["inputs"]:
        del tensor["data"]
        tensor["parameters"] = {"binary_data_size": 1}
    text, path = json.dumps(body).encode(), f"/v2/models/{server.model}/infer"
    headers = {"inference-header-content-length": str(len(text))}
    content = text + bytes(len(body["inputs"]))
    options = {"content": content, "headers": headers}
    expect_error("a tensor of one byte", server.request, "POST", path, **options)


@case("HTTP: model configuration", "extension_model_configuration.md", "model_configuration")
def _(server: Server) -> None:
    names = [each["name"] for each in server.http.get("get_model_config", server.model)["output"]]
    expect(set(names) == set(server.outputs), f"outputs {names}")


@case("HTTP: statistics count inferences", "extension_statistics.md", "statistics")
def _(server: Server) -> None:
    def count() -> int:
        [found] = server.http.get("get_inference_statistics", server.model)["model_stats"]
        return int(found["inference_stats"]["success"]["count"])

    before = count()
    server.infer(server.http)
    expect(count() > before, "the count of successes stays")


@case("HTTP: repository index", "extension_model_repository.md Index", "model_repository")
def _(server: Server) -> None:
    found = server.http.get("get_model_repository_index")
    ready = sorted(each["name"] for each in found if each.get("state") == "READY")
    expect(server.model in ready, f"ready models {ready}")


@both("a sequence continues its state", "", "sequence")
def _(server: Server, transport: Transport) -> None:
    first, second = server.sequence(transport, 1, 1)
    expect(not is_same(first, second), "the second request does not depend on the first")
    again = server.sequence(transport, 1, 1)
    expect(is_same(again[1], second), "the same sequence has other outputs")


@both("sequence_start starts over, also after sequence_end", "", "sequence")
def _(server: Server, transport: Transport) -> None:
    sequence = new_id()
    first, _ = server.sequence(transport, 1, 2, sequence_id=sequence)
    [again] = server.sequence(transport, 1, sequence_id=sequence)
    expect(is_same(again, first), "the start depends on earlier requests")
    end = {"sequence_id": sequence, "sequence_start": False, "sequence_end": True}
    server.infer(transport, 3, **end)
    [again] = server.sequence(transport, 1, sequence_id=sequence)
    expect(is_same(again, first), "the start depends on the sequence that ended")


@both("sequences do not mix", "", "sequence")
def _(server: Server, transport: Transport) -> None:
    alone, sequence = server.sequence(transport, 1, 2), new_id()
    server.sequence(transport, 1, sequence_id=sequence)
    server.sequence(transport, 3)
    going_on = {"sequence_id": sequence, "sequence_start": False, "sequence_end": False}
    second = server.infer(transport, 2, **going_on).outputs
    expect(is_same(second, alone[1]), "a sequence depends on another one")


@both("sequence_id is a string", "", "sequence(string_id)")
def _(server: Server, transport: Transport) -> None:
    numbered = server.sequence(transport, 1, 2)
    named = server.sequence(transport, 1, 2, sequence_id=f"sequence-{new_id()}")
    expect(all(map(is_same, named, numbered)), "a sequence with a name has other outputs")


@case("HTTP: sequence_start without sequence_id is an error", SEQUENCE, "sequence")
def _(server: Server) -> None:
    body = {**server.body(), "parameters": {"sequence_id": 0, "sequence_start": True}}
    expect_error("a start without an id", server.post, body)


@case("gRPC: ModelStreamInfer answers each request", f"{SEQUENCE} GRPC", "sequence")
def _(server: Server) -> None:
    transport, sequence = server.grpc, new_id()
    expected = server.sequence(transport, 1, 2)
    unknown = {UNKNOWN: next(iter(server.tensors().values()))}
    calls = [
        transport.call(tensors, {}, sequence_id=sequence, sequence_start=at == 0)
        for at, tensors in enumerate((server.tensors(1), server.tensors(2), unknown))
    ]
    *replies, error = transport.stream(server.model, calls)
    outputs = [each.outputs for each in replies if not isinstance(each, Exception)]
    expect(len(outputs) == 2, f"replies {replies}")
    expect(all(map(is_same, outputs, expected)), "a stream has other outputs than calls")
    expect(isinstance(error, InferenceServerException), "an unknown input is accepted")
