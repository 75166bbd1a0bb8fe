"""A chunk whose tensor is in JSON is the same on the fast path as for the whole decoder.

The fast path cuts the values out and reads them by simdjson; what it does not accept is the slow
path's, whose decoders say here what a request means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifact.artifact import Artifact
from service.access.caller import ANYONE
from service.codec.json_rows import MAX_NUMBER_BYTES
from service.core.values import Chunk
from service.telemetry.logs import RequestIds
from service.transports.v1.fast_path import FastRequest
from service.transports.v2 import http_fast_path
from service.transports.v2.http_body import decode_request
from service.transports.v2.http_fast_path import FastInferPath
from service.transports.v2.inference import Inference
from tests.service.codec.paths import LIMITS, codec_of, result, shown
from tests.service.transports.v1.raw_http import request

FIRST = "POST /v2/models/{}/infer HTTP/1.1"
USUAL = [
    '{"id":"ID","parameters":PARAMETERS,"inputs":[{"name":"inputs","datatype":"FP32","shape":SHAPE,'
    '"data":DATA}],"outputs":[{"name":"steep","parameters":{"binary_data":false}}]}',
    '{"id": "ID", "inputs": [{"name": "inputs", "shape": SHAPE, "datatype": "FP32", "data": DATA}],'
    ' "outputs": [{"name": "steep"}, {"name": "last"}], "parameters": PARAMETERS}',
    '{"outputs":[{"name":"out"}],"parameters":PARAMETERS,'
    '"inputs":[{"data":DATA,"shape":SHAPE,"datatype":"FP32","name":"inputs"}]}',
    '{\n"parameters"\t: PARAMETERS , "inputs" : [ { "data" :\r\n DATA ,'
    ' "name" : "inputs" , "datatype" : "FP32" , "shape" : SHAPE } ] }\n',
    '{"parameters":PARAMETERS,"inputs":[{"name":"inputs","datatype":"FP32","shape":SHAPE,'
    '"data":DATA},{"name":"reset","datatype":"BOOL","shape":MARKED,"data":[false,false]}]}',
]
TENSOR = '"name":"inputs","datatype":"FP32","shape":SHAPE'
UNUSUAL = [
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"d\\u0061ta":DATA}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":[1,2],"data":DATA}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA,"data":[1,2]}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA,"data":[1,2,3,4,5,6]}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{"data":DATA,{TENSOR},"data":[1,2,3,4,5,6]}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{"data":[1]}}],"inputs":[{{{TENSOR},"data":DATA}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}}],"inputs":[{{"data":[1]}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA,"parameters":{{}}}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA,'
    '"parameters":{"binary_data_size":0}}]}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":null}}],"data":DATA}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":{{"data":DATA}}}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"dat":DATA}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}}],'
    '"outputs":[{"name":"out","data":DATA}]}',
    f'{{"outputs":[{{"name":"data"}}],"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}}]}}',
    f'{{"id":"data","parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}}]}}',
    f'{{"id":"a\\"data\\":[","parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}},'
    '{"name":"reset","datatype":"BOOL","shape":MARKED,"data":[false,true]}]}',
    '{"parameters":PARAMETERS,"inputs":[{"name":"reset","datatype":"BOOL","shape":MARKED,"data":'
    f'[false,true]}},{{{TENSOR},"data":DATA}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA}}]}},',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA,}}]}}',
    f'{{"parameters":PARAMETERS,"inputs":[{{{TENSOR},"data":DATA]}}',
]
SHAPES = ["[2,3]", "[1,2,3]"]
FLAT = [
    "[1,2,3,4,5,6]",
    "[0.1,-2.5e-3,3E2,4,-5,6.25]",
    "[ 1 ,\t2,\r\n3 , 4 , 5 , 6 ]",
    "[-0,-0.0,0,1e-400,5e-324,1.17549435e-38]",
    "[3.4028234e38,-3.4028234e38,16777217,9007199254740993,18446744073709551615,1]",
]
"""The numbers of both shapes, accepted."""
NESTED = ["[[1,2,3],[4,5,6]]", "[ [ 1.5 , 2, 3 ] ,[4,5 ,6] ]"]
"""Accepted too, as the next one for the shape of three axes alone."""
DEEP = "[[[1,2,3],[4,5,6]]]"
ODD = [
    *("[NaN,2,3,4,5,6]", "[1,Infinity,3,4,5,6]", "[1,-Infinity,3,4,5,6]", "[1,2,3,4,5,1e400]"),
    *("[1,2,3,4,5,1e39]", "[1,2,3,4,5,-1e39]", "[1,2,3,4,5,3.4028236e38]"),
    *("[1,2,3,4,5,123456789012345678901234567890]", "[1,2,3,4,5,-9223372036854775809]"),
    *("[1,2,3,4,5]", "[1,2,3,4,5,6,7]", "[]", "[[]]", "[[],[]]", "[[[]]]", "[1]"),
    *('["1",2,3,4,5,6]', "[true,2,3,4,5,6]", "[null,2,3,4,5,6]", "[{},2,3,4,5,6]", '["a}b]"]'),
    *("[[1,2],[3,4],[5,6]]", "[[1,2,3,4],[5,6]]", "[[1,2,3,4,5,6]]", "[[1],[2],[3],[4],[5],[6]]"),
    *("[[1,2,3],4,5,6]", "[1,2,3,[4,5,6]]", "[[1,2,[3]],[4,5,6]]", "[[1,2,3],[4,5,[6]]]"),
    *("[[[1,2,3]],[[4,5,6]]]", "[[[[1,2,3],[4,5,6]]]]", "[[[1,2,3],[4,5,6]],[]]"),
    *("[[1,2,3],[4,5,6],[]]", "[[1,2,3],[]]", "[[1,2,3],[[4,5,6]]]", "[[[1,2,3],[4,5,[6]]]]"),
    *("[01,2,3,4,5,6]", "[+1,2,3,4,5,6]", "[.5,2,3,4,5,6]", "[1.,2,3,4,5,6]", "[0x1,2,3,4,5,6]"),
    *("[1,2,3,4,5,6,]", "[,1,2,3,4,5,6]", "[1 2,3,4,5,6]", "[1,2,3,4,5,6", "1,2,3,4,5,6]"),
    *(
        "[1,2,3,4,5,6]]",
        "[1,2,3,4,5,6],[7]",
        "[1,2,3],[4,5,6]",
        "[1,2,3,4,5,6]x",
        "[1\0,2,3,4,5,6]",
    ),
    *(
        "[\0]",
        "[1,2,3,4,5,6][\0]",
        "\ufeff[1,2,3,4,5,6]",
        "[1,2,3,4,5,6]}",
        "null",
        "5",
        '"x"',
        "{}",
    ),
    *('[1,2,3,4,5,6],"shape":[1,3]', '[1,2,3,4,5,6],"x":[1]', '[1,2,3],"data":[1,2,3,4,5,6]'),
    *(
        '[1,2,3,4,5,6]},{"name":"reset","datatype":"BOOL","shape":[2],"data":[true,true]',
        "[[1,2,3]]",
    ),
]
PARAMETERS = [
    '{"sequence_id":7}',
    '{"sequence_id":"a","position":4,"epoch":"0123456789abcdef"}',
    '{"sequence_id":7,"sequence_start":true,"sequence_end":true}',
    '{"sequence_id":7,"binary_data_output":true}',
]
VALUES = FLAT[0]


class Paths:
    """Both ways of a request to a model, whose chunks have at most four steps."""

    def __init__(self, artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
        codec = codec_of(artifact)
        self._name = codec.served.name
        pipeline = SimpleNamespace(
            model=lambda *of: codec.served,
            check_admission=lambda *arguments: None,
            aliases=SimpleNamespace(on_switch=[]),
        )
        api: Any = SimpleNamespace(
            pipeline=pipeline,
            access=SimpleNamespace(open_caller=ANYONE),
            codecs={self._name: codec},
            limits=LIMITS,
            recorder=None,
            tracer=None,
            accepts_host=lambda host: True,
        )
        self._inference = Inference(api)
        self._fast = FastInferPath(self._inference, RequestIds())
        self.decoded: list[bytes] = []

        def watched(body: bytes, *arguments: Any) -> Any:
            self.decoded.append(body)
            return decode_request(body, *arguments)

        monkeypatch.setattr(http_fast_path, "decode_request", watched)

    def fast(self, body: bytes) -> Chunk | None:
        """The chunk of a request; None if it is left to the slow path."""
        parsed = self._fast.parse(request(body, first=FIRST.format(self._name)))
        assert parsed is None or isinstance(parsed, FastRequest)
        return parsed and parsed.chunk

    def check(self, body: bytes) -> bool:
        """Compare both paths; returns whether the fast one read the request."""
        chunk = self.fast(body)
        if chunk is not None:
            assert shown(chunk) == shown(self.slow(body)), body
        return chunk is not None

    def slow(self, body: bytes) -> Any:
        """The chunk of a request, its sequences, or its error."""
        return result(lambda: self._read(body))

    def _read(self, body: bytes) -> Any:
        whole = decode_request(body, None, self._name, "")
        return self._inference.read(ANYONE, whole, math.inf).work


@pytest.fixture
def paths(models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch) -> Paths:
    return Paths(models["probe"], monkeypatch)


def fill(text: str, shape: str, parameters: str = PARAMETERS[0], data: str = VALUES) -> bytes:
    marked = "[2]" if shape == SHAPES[0] else "[1,2]"
    changes = {"ID": "5", "PARAMETERS": parameters, "SHAPE": shape, "MARKED": marked}
    for name, value in changes.items():
        text = text.replace(name, value, 1)
    return text.replace("DATA", data).encode()


def test_usual_requests_are_decoded_once_for_each_shape(paths: Paths) -> None:
    for text, shape in product(USUAL, SHAPES):
        assert paths.check(fill(text, shape)), text
        paths.decoded.clear()
        accepted = [*FLAT, *NESTED, *([DEEP] if shape == SHAPES[1] else [])]
        for data, parameters in product(accepted, PARAMETERS[:3]):
            assert paths.check(fill(text, shape, parameters, data)), (text, data)
        assert not paths.decoded, text


def test_odd_values_are_read_as_by_the_whole_decoder(paths: Paths) -> None:
    """Each after a valid request of the same shape, and before one."""
    read = set()
    for text, shape in product([*USUAL, *UNUSUAL], SHAPES):
        for data, parameters in product([*ODD, DEEP, *FLAT], PARAMETERS[:2]):
            paths.check(fill(text, shape, parameters))
            if paths.check(fill(text, shape, parameters, data)):
                read.add(data)
    assert {*FLAT, DEEP} <= read


def test_damaged_requests_are_read_as_by_the_whole_decoder(
    models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(models["probe"], monkeypatch)

    @settings(max_examples=500, deadline=None)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        text, shape = data.draw(st.sampled_from(USUAL)), data.draw(st.sampled_from(SHAPES))
        whole = fill(text, shape, data=data.draw(st.sampled_from([*FLAT, *NESTED])))
        paths.fast(whole)
        tokens = [*b'[]{},:"\\ 0-1.e\0', b"NaN", b'"data":', b"[1,2,3]", b"[0]", b"]}", b"null"]
        put = data.draw(st.one_of(st.binary(max_size=2), st.sampled_from(tokens)))
        put = bytes([put]) if isinstance(put, int) else put
        at = data.draw(st.integers(0, len(whole)))
        paths.check(whole[:at] + put + whole[at + data.draw(st.integers(0, 3)) :])

    check()


def test_requests_of_more_steps_than_a_chunk_may_have_are_left_to_the_slow_path(
    paths: Paths,
) -> None:
    values = json.dumps([1.0] * 15)
    for text in USUAL[:4]:
        assert not paths.check(fill(text, "[5,3]", data=values))
        assert not paths.check(fill(text, "[0,3]", data="[]"))


def test_longer_lists_than_their_numbers_need_are_left_to_the_slow_path(paths: Paths) -> None:
    """To parse hostile numbers takes simdjson up to 0.5 us a byte, however few there may be."""
    assert paths.check(fill(USUAL[0], SHAPES[0]))
    longest = 6 * MAX_NUMBER_BYTES
    for length, is_usual in ((longest, True), (longest + 1, False)):
        data = "[" + VALUES[1:].rjust(length - 1)
        assert paths.check(fill(USUAL[0], SHAPES[0], data=data)) is is_usual


def test_codes_of_categories_are_checked(
    models: Mapping[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = models["small"]
    paths, features = Paths(small, monkeypatch), small.spec.input_features
    text, shape = USUAL[2].replace('"outputs":[{"name":"out"}],', ""), f"[1,{features}]"
    assert paths.check(fill(text, shape, data=json.dumps([1.0] * features)))
    paths.decoded.clear()
    for code, is_code in ((0.0, True), (2.0, True), (1.5, False), (99.0, False)):
        sent = fill(text, shape, data=json.dumps([code] * features))
        assert paths.check(sent) is is_code, code
    assert not paths.decoded
