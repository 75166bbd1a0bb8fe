"""Chunks of rows by simdjson: accepted forms; `test_fast_decoder` compares the values."""

from __future__ import annotations

import numpy as np
import pytest

from service.codec.fast_decoder import MAX_BYTES, JsonRowsDecoder


@pytest.fixture
def decoder() -> JsonRowsDecoder:
    return JsonRowsDecoder(3, 4)


@pytest.mark.parametrize("space", ["", " ", "\n\t "])
def test_usual_bodies_are_decoded(decoder: JsonRowsDecoder, space: str) -> None:
    text = (
        f'{{"position":{space}7,"epoch":"0123456789abcdef","inputs":[[1,-2.5,0],[{space}3,4,5]]}}'
    )
    found = decoder.decode_chunk(text.encode())
    assert found is not None
    assert found.rows.dtype == np.float32
    assert found.rows.tolist() == [[1, -2.5, 0], [3, 4, 5]]
    assert (found.position, found.epoch) == (7, "0123456789abcdef")


def test_the_parser_is_reusable_after_invalid_text(decoder: JsonRowsDecoder) -> None:
    for text in (b'{"inputs":[[1,2]]}', b'{"inputs":[[1,2,"3"]]}', b'{"inputs":[[', b"[]"):
        assert decoder.decode_chunk(text) is None
        assert decoder.decode_chunk(b'{"inputs":[[1,2,3]]}') is not None


@pytest.mark.parametrize(
    "text",
    [
        b'[[1,2,3],[4,5,[6,7],"8"]]',
        b"[[1,2,[3,4]],[5,6,[]]]",
        b'["abc"]',
        b"[[1,2,true]]",
        b"[[1,2,null]]",
        b'[{"a":1,"b":2,"c":3}]',
        b"[1,2,3]",
        b"[]",
        b"[[]]",
        b"[[1,2,3],[4,5,6],[1,2,3],[4,5,6],[7,8,9]]",
        b"[[1,2,1e39]]",
    ],
)
def test_other_shapes_are_not_decoded(decoder: JsonRowsDecoder, text: bytes) -> None:
    assert decoder.decode_chunk(b'{"inputs":' + text + b"}") is None


def test_long_texts_are_not_decoded(decoder: JsonRowsDecoder) -> None:
    row = b"[[1,2," + b" " * MAX_BYTES + b"3]]"
    assert decoder.decode_chunk(b'{"inputs":' + row + b"}") is None


def test_items_are_decoded_into_one_array(decoder: JsonRowsDecoder) -> None:
    body = (
        b'{"chunks":[{"stream":"a","position":7,"inputs":[[1,2,3]]},'
        b'{"inputs":[[4,5,6],[7,8,9]],"epoch":"0123456789abcdef","stream":"b"}]}'
    )
    first, second = decoder.decode_items(body, 2) or [None, None]
    assert first is not None
    assert second is not None
    assert (first.stream, first.position, first.epoch) == ("a", 7, None)
    assert (second.stream, second.position, second.epoch) == ("b", None, "0123456789abcdef")
    assert (first.rows.tolist(), second.rows.tolist()) == ([[1, 2, 3]], [[4, 5, 6], [7, 8, 9]])
    assert first.rows.base is second.rows.base
    assert decoder.decode_items(body, 1) is None


@pytest.mark.parametrize(
    "item",
    [
        b'"stream":"b","inputs":[[1,2],[3]]',
        b'"stream":"b","inputs":[[1,2,[3]]]',
        b'"stream":"b","inputs":[[1,2,1e39]]',
        b'"stream":"b","inputs":[[1,2,3]],"position":-1',
        b'"stream":"b","inputs":[[1,2,3]],"position":1.0',
        b'"stream":"b","inputs":[[1,2,3]],"position":true',
        b'"stream":"b","inputs":[[1,2,3]],"epoch":"0123"',
        b'"stream":"b","inputs":[[1,2,3]],"final":true',
        b'"stream":"b","stream":"b","inputs":[[1,2,3]]',
        b'"stream":"b c","inputs":[[1,2,3]]',
        b'"stream":1,"inputs":[[1,2,3]]',
        b'"inputs":[[1,2,3]]',
        b'"stream":"b"',
    ],
)
def test_unusual_items_are_left_to_the_other_decoders(
    decoder: JsonRowsDecoder, item: bytes
) -> None:
    usual = b'{"stream":"a","inputs":[[1,2,3]]}'
    assert decoder.decode_items(b'{"chunks":[' + usual + b"]}", 9) is not None
    assert decoder.decode_items(b'{"chunks":[' + usual + b",{" + item + b"}]}", 9) is None
    assert decoder.decode_items(b'{"chunks":[' + usual + b'],"x":[' + usual + b"]}", 9) is None
