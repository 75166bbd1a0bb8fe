"""A request that is cut at its id and its parameters is what the whole decoder reads."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec
import pytest

from service.core.errors import CarryError
from service.transports.v2.http_body import (
    MAX_CUT_BYTES,
    CutRequest,
    cut_request,
    decode_request,
)
from service.transports.v2.parameters import InferParameters

TENSOR = '{"name":"inputs","datatype":"FP32","shape":[1,3],"parameters":{"binary_data_size":12}}'
INPUTS = f'"inputs":[{TENSOR}]'
OUTPUTS = '"outputs":[{"name":"steep","parameters":{"binary_data":true}}]'
ROWS = bytes(12)

USUAL = [
    f'{{"id":"ID","parameters":PARAMETERS,{INPUTS},{OUTPUTS}}}',
    f'{{"id": "ID", {INPUTS}, {OUTPUTS}, "parameters": PARAMETERS}}',
    f'{{{INPUTS},"parameters":PARAMETERS}}',
    f'{{"parameters" : PARAMETERS , {INPUTS}}}',
]
TRAPS = [
    *(f'{{{INPUTS},"id":"ID","parameters":PARAMETERS}}', f'{{"id":"ID",{INPUTS}}}'),
    f'{{"id":"ID","id":"7","parameters":PARAMETERS,{INPUTS}}}',
    f'{{"id":"ID","parameters":PARAMETERS,{INPUTS},"id":"7"}}',
    f'{{"id":"ID","parameters":PARAMETERS,{INPUTS},"parameters":{{"sequence_id":7}}}}',
    f'{{"id":"ID","parameters":PARAMETERS,{INPUTS},"parameters":{{}}}}',
    f'{{"id":"ID","parameters":{{"sequence_id":7}},{INPUTS},"parameters":PARAMETERS}}',
    f'{{"id":"ID","parameters":{{"sequence_id":7,"position":PARAMETERS}},{INPUTS}}}',
    f'{{"id":"ID","parameters":[PARAMETERS],{INPUTS}}}',
    f'{{"id":"ID","inputs":[{TENSOR[:-1]},"parameters":PARAMETERS}}]}}',
    f'{{"id":"ID",{INPUTS},"outputs":[{{"name":"steep","parameters":PARAMETERS}}]}}',
    f'{{"id":"ID","Parameters":PARAMETERS,{INPUTS}}}',
    f'{{"id":"ID","parameters":PARAMETERS{INPUTS}}}',
    f'{{"id":"ID","parameters":PARAMETERS,{INPUTS}}}}}',
    f'{{"id":"ID","parameters":PARAMETERS,{INPUTS}',
    f'{{"id":"ID""parameters":PARAMETERS,{INPUTS}}}',
]
IDS = [
    "",
    "1",
    "281474976710656",
    "0d2f-77",
    "a b",
    'a\\"b',
    "\\u0031",
    "é",
    "1,",
    '","id":"8',
    "}",
]
PARAMETERS = [
    '{"sequence_id":1,"sequence_start":true,"sequence_end":false}',
    '{"sequence_id": 18446744073709551615, "position": 0}',
    '{"position":7,"sequence_id":"s-1","epoch":"0123456789abcdef","timeout":5}',
    '{"sequence_id":3,"binary_data_output":true,"dry_run":false,"false_alarms_per_day":0.5}',
    *('{"sequence_id":0}', '{"sequence_id":""}', '{"sequence_id":"a}b"}', '{"sequence_id":"a/b"}'),
    *('{"sequence_id":01}', '{"sequence_id":-1}', '{"sequence_id":1.0}', '{"sequence_id":1e2}'),
    *('{"sequence_id":18446744073709551616}', '{"sequence_id":true}', '{"sequence_id":null}'),
    *('{"sequence_id":{}}', '{"sequence_id":[1]}', '{"sequence_id":1,"sequence_id":2}', "{}"),
    *('{"sequence_id":"\\u0031"}', '{"sequence_id":"."}', '{"sequence_id":1,}', '{"sequence_id":1'),
    *('{"sequence_id":1,"position":7,"sequence_start":true}', '{"sequence_id":1,"position":-7}'),
    *('{"sequence_id":1,"position":7.0}', '{"sequence_id":1,"position":"7"}'),
    *('{"sequence_id":1,"position":null}', '{"sequence_id":1,"postion":7}'),
    *('{"sequence_id":1,"priority":2}', '{"sequence_id":1,"triton_x":"y"}'),
    *('{"sequence_id":1,"sequence_start":1}', '{"sequence_id":1,"timeout":-5}'),
    *('{"sequence_id":1,"epoch":"0123"}', '{"sequence_id":1,"epoch":"0123456789abcdef\\n"}'),
    '{"position":{"sequence_id":1}}',
]


def fill(text: str, request_id: str, parameters: str) -> bytes:
    return text.replace("ID", request_id, 1).replace("PARAMETERS", parameters, 1).encode()


def cut(text: bytes) -> CutRequest | None:
    """The request cut, if the cuts are right."""
    request = cut_request(text, is_all=False)
    return request if request is not None and request.is_correct() else None


def values(parameters: InferParameters) -> dict[str, Any]:
    names = InferParameters.__struct_fields__
    return {name: getattr(parameters, name) for name in names if name != "sequence_id"}


@pytest.mark.parametrize("text", [*USUAL, *TRAPS])
def test_cut_request_is_that_of_the_whole_decoder(text: str) -> None:
    for request_id, parameters in product(IDS, PARAMETERS):
        sent = fill(text, request_id, parameters)
        if (request := cut(sent)) is None:
            continue
        whole = decode_request(sent + ROWS, len(sent), "probe", "")
        assert (request.id, request.parameters.stream) == (whole.id, whole.parameters.stream), sent
        assert values(request.parameters) == values(whole.parameters), sent


@pytest.mark.parametrize("text", USUAL)
def test_usual_requests_are_cut(text: str) -> None:
    requests = [cut(fill(text, str(n), f'{{"sequence_id":{n}}}')) for n in (1, 22, 333)]
    assert [each and each.parameters.stream for each in requests] == ["1", "22", "333"]
    assert len({each and (each.before, each.after) for each in requests}) == 1


def test_options_of_parameters_are_cut_for_every_valid_form() -> None:
    """A valid object of parameters that is not cut is only slower; these must not be."""
    not_cut = []
    for parameters in PARAMETERS:
        sent = fill(USUAL[0], "1", parameters)
        try:
            whole = decode_request(sent + ROWS, len(sent), "probe", "")
        except CarryError:
            continue
        if whole.parameters.stream is not None and cut(sent) is None:
            not_cut.append(parameters)
    ignored = ["priority", "triton_x"]
    assert [msgspec.json.decode(each) for each in not_cut] == [
        {"sequence_id": 1, name: value} for name, value in zip(ignored, (2, "y"), strict=True)
    ]


def test_long_parameters_are_not_cut() -> None:
    """A hostile number takes the decoder of the cut parameters long."""
    longest = '{"sequence_id":1' + " " * (MAX_CUT_BYTES - 17) + "}"
    for parameters, is_cut in ((longest, True), (longest.replace(":", ": "), False)):
        sent = fill(USUAL[0], "1", parameters)
        assert (cut_request(sent, is_all=False) is not None) is is_cut
        assert decode_request(sent + ROWS, len(sent), "probe", "").parameters.stream == "1"
