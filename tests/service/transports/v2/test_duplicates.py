"""Duplicate members of V2's JSON are rejected, whatever is escaped in its strings.

Generated bodies are compared with Python's own parser, which shows every member of an object.
"""

from __future__ import annotations

import json
import random

import pytest

from service.codec.media import Media
from service.core.errors import InvalidInput
from service.transports.v2.http_body import decode_request
from service.transports.v2.http_fast_path import FastInferPath
from tests.service.transports.v1.harness import rows
from tests.service.transports.v1.raw_http import request
from tests.service.transports.v2.v2 import HEADER, V2, binary_body, error_of, json_body
from tests.support.documents import document, has_duplicates, members, quoted, with_duplicates

ROWS = rows(2)
PARAMETERS = {"sequence_id": 7, "position": 0, "binary_data_output": True}
TENSOR = b'{"name":"inputs","datatype":"FP32","shape":[1,3],"data":%b}'


def is_rejected(text: bytes, json_bytes: int | None = None) -> bool:
    """Whether a body is rejected for a duplicate member."""
    try:
        decode_request(text, json_bytes, "probe", "")
    except InvalidInput as error:
        return "more than once" in error.detail
    return False


async def test_duplicates_are_those_that_another_parser_finds(v2: V2) -> None:
    body, headers = binary_body(ROWS, PARAMETERS)
    end = int(headers[HEADER])
    binary, data = json.loads(body[:end]), body[end:]
    fast = [route for route in v2.api.app.state.http.fast_routes if type(route) is FastInferPath]
    decoded = 0
    for seed in range(300):
        choose = random.Random(seed)
        more = {"id": quoted(choose), "outputs": [{"name": "out"}]}
        text = with_duplicates(choose, json_body(ROWS, parameters=PARAMETERS) | more)
        assert is_rejected(text) == has_duplicates(text), (seed, text)
        text = with_duplicates(choose, binary | more)
        assert is_rejected(text + data, len(text)) == has_duplicates(text), (seed, text)
        for path in fast:
            line = f"Inference-Header-Content-Length: {len(text)}"
            sent = request(text + data, line, first="POST /v2/models/probe/infer HTTP/1.1")
            is_decoded = path.parse(sent) is not None
            assert not (is_decoded and has_duplicates(text)), (seed, text)
            decoded += is_decoded
    assert decoded >= 50 * len(fast)


MARKS = rb'"id":"\u0022\u0022"'
HIDDEN = {
    "sequence_id": (b'"sequence_id":7', b'"sequence_id":7,"sequence_id":8', MARKS),
    "position": (b'"position":0', b'"position":4,"position":0', MARKS),
    "inputs": (b'"inputs":', b'"inputs":[],"inputs":', MARKS),
    "shape": (b'"shape":', b'"shape":[9,9],"shape":', MARKS),
    "id": (b"", b"", b'"id":"a",' + MARKS.replace(b'":"', rb'":"\u0022\u0022')),
}


@pytest.mark.parametrize("is_binary", [False, True], ids=["JSON", "binary"])
async def test_escaped_quotation_marks_hide_no_duplicates(v2: V2, is_binary: bool) -> None:
    body, headers = binary_body(ROWS, PARAMETERS)
    if not is_binary:
        body = document(Media.JSON, members(json_body(ROWS, parameters=PARAMETERS)))
    end = int(headers[HEADER]) if is_binary else len(body)
    for at, (once, twice, identity) in HIDDEN.items():
        text = body[:end].replace(once, twice, 1)[:-1] + b"," + identity + b"}"
        length = {HEADER: str(len(text))} if is_binary else {}
        error = error_of(await v2.post(text + body[end:], length), 422, "invalid_input")
        assert error["at"].rpartition(".")[2] == at
    assert not v2.api.store.states


async def test_data_that_occurs_twice_is_replaced_where_it_is(v2: V2) -> None:
    """It is left out when duplicates are searched: where it is, not where the same bytes are."""
    long = b'"%b"' % (b"a" * 2000)
    body = b'{"id":"","parameters":{%b:1},"inputs":[%b]}' % (long, TENSOR % long)
    error = error_of(await v2.post(body), 422, "invalid_input")
    assert "more than once" not in error["detail"]
    numbers = b"[" + b"0," * 1000 + b"0]"
    for twice in (numbers, b"[1]"):
        tensor = (TENSOR % numbers).replace(b'"data"', b'"data":%b,"data"' % twice)
        error = error_of(await v2.post(b'{"inputs":[%b]}' % tensor), 422, "invalid_input")
        assert "inputs[0].data: expected each member of an object once" in error["detail"]


def test_many_tensors_and_parameters_are_rejected_before_their_members_are_compared() -> None:
    numbers = b"[" + b"0," * 490 + b"0]"
    many = {
        "inputs": b'{"id":"","inputs":[%b]}' % b",".join([TENSOR % numbers] * 800),
        "outputs": b'{"inputs":[],"outputs":[%b]}' % b",".join([b'{"name":"o"}'] * 60_000),
        "parameters": b'{"inputs":[],"parameters":{%b}}'
        % b",".join([b'"%d":1' % at for at in range(80_000)]),
    }
    for at, text in many.items():
        with pytest.raises(InvalidInput, match=f"{at}: expected .* with at most 256 "):
            decode_request(text, None, "probe", "")
