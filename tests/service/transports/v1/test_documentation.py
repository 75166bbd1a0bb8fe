"""Reference pages for clients: their examples are recomputed, their requests sent as printed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter

from models.artifact.writing import write_artifact
from models.events.columns import canonical_bytes
from models.events.schema import EventSchema
from models.spec.history import HistorySpec
from models.spec.model import ModelSpec, parse_spec
from service.core.delivery import chunk_digest, next_tag
from service.core.values import FIRST_TAG, Check, Feed, ServerStatus, Steps
from service.pipeline.watching import Watches
from service.store.topics import TopicRegistration
from service.transports.live.watching import add_watching
from service.transports.v1 import reply_types
from tests.service.transports.v1.harness import Harness, harness
from tests.support.oracle import contracting_weights
from tests.support.servers import RealServer
from tests.support.strict_events import columns_from_events, event_adapter

ROOT = Path(__file__).parents[4]
FITTED: dict[str, dict[str, Any]] = {
    "numeric": {"mean": 1.5, "std": 4.0},
    "timestamp": {"gap_mean": 6.0, "gap_std": 1.5},
    "categorical": {"vocabulary": ["UA", "EWR", "IAH"]},
    "boolean": {},
}


def fences(page: str, language: str, title: str = "") -> list[str]:
    """The code blocks of a reference page with this language and, where given, this title."""
    text = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    info = f'{language} title="{title}"' if title else language
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def listed_bytes(listing: str) -> bytes:
    """The bytes of a listing: each line's leading pairs of hex digits."""
    pairs = re.compile(r"[0-9a-f]{2}(?: {1,2}[0-9a-f]{2})*(?= {2}|$)")
    found = [pairs.match(line) for line in listing.splitlines()]
    assert all(found), listing
    return b"".join(bytes.fromhex(match[0]) for match in found if match)


def test_worked_example_of_the_protocol_is_correct() -> None:
    schema = EventSchema.model_validate_json(fences("protocol.md", "json", "schema")[0])
    chunks = [json.loads(text) for text in fences("protocol.md", "json", "chunk")]
    listings = [listed_bytes(text) for text in fences("protocol.md", "text", "bytes")]
    digests = [text.strip() for text in fences("protocol.md", "text", "digest")]
    tags = [text.strip() for text in fences("protocol.md", "text", "tag")]
    assert len(chunks) == len(listings) == len(digests) == len(tags) == 4
    tag = FIRST_TAG
    for chunk, listing, digest, expected in zip(chunks, listings, digests, tags, strict=True):
        if "events" in chunk:
            adapter = event_adapter(schema)
            events = [adapter.validate_json(json.dumps(event)) for event in chunk["events"]]
            columns = columns_from_events(schema, events)
            steps = Steps(Feed.EVENTS, len(events), columns=columns)
            assert listing[9:] == canonical_bytes(schema, columns)
        else:
            rows = np.array(chunk["inputs"], np.float32)
            steps = Steps(Feed.INPUTS, len(rows), rows=rows)
            assert listing[9:] == rows.tobytes()
        assert hashlib.sha256(listing).hexdigest() == digest
        final = chunk.get("final", False)
        assert chunk_digest(schema, steps, final=final).hex() == digest
        start = chunk["position"]
        tag = next_tag(FIRST_TAG if start == 0 else tag, start, bytes.fromhex(digest))
        assert tag.hex() == expected


def flights_spec() -> ModelSpec:
    """The example's spec with made-up numbers where training would fit them."""
    data = yaml.safe_load((ROOT / "examples/flights/spec.yaml").read_text("utf-8"))
    for field in data["events"]["fields"]:
        field.update(FITTED[field["kind"]])
    return parse_spec(data)


def exchanges() -> Iterator[tuple[str, bool, str]]:
    """Each request of http-api.md, whether it is abridged, and its reply ("" if it has none)."""
    text = (ROOT / "docs/reference/http-api.md").read_text(encoding="utf-8")
    blocks = re.findall(
        r'^```http title="(request abridged|request|reply)"\n(.*?)^```$',
        text,
        re.MULTILINE | re.DOTALL,
    )
    for at, (kind, block) in enumerate(blocks):
        if kind != "reply":
            after = blocks[at + 1] if at + 1 < len(blocks) else ("", "")
            yield block, kind == "request abridged", after[1] if after[0] == "reply" else ""


def parts(block: str) -> tuple[str, dict[str, str], str]:
    """First line, headers and body of a request or reply."""
    head, _, body = block.partition("\n\n")
    first, *lines = head.strip().splitlines()
    return first, dict(line.split(": ", 1) for line in lines), body.strip()


def compare(shown: Any, got: Any, actual_of: dict[str, str], at: str = "reply") -> None:
    """Check that members and types agree; records epochs and tags, which differ, in `actual_of`."""
    if isinstance(shown, dict):
        assert isinstance(got, dict), at
        # the page shows a part of a state
        assert (
            shown.keys() <= got.keys() if at.endswith(".state") else shown.keys() == got.keys()
        ), at
        for name, value in shown.items():
            compare(value, got[name], actual_of, f"{at}.{name}")
    elif isinstance(shown, list):
        assert isinstance(got, list), at
        # a listing has no order
        got = sorted(got) if at.endswith(".streams") else got
        for index, value in enumerate(shown):
            compare(value, got[index], actual_of, f"{at}[{index}]")
    elif isinstance(shown, str):
        assert isinstance(got, str), at
        if len(shown) >= 12 and re.fullmatch(r"[0-9a-f]+", shown):
            actual_of[shown] = got
        # the tests have a runtime of their own
        elif not shown.endswith("...") and not at.endswith(".runtime"):
            assert got == shown, at
    elif isinstance(shown, bool | int) and not at.endswith(("_ms", "_bytes", ".last_ms")):
        assert got == shown, at
    else:
        assert isinstance(got, type(shown) | int), at


async def add_topic(api: Harness, server: RealServer) -> None:
    """A topic with an output; one of its entries is done, one pending, and one not read."""
    registration = TopicRegistration(
        "carry", "departures", "scores", "departures:dead", "flights", False
    )
    await api.store.topics.register(registration)
    (keys,) = registration.keys(api.store.topics.space)
    await api.store.topics.acquire(keys, "consumer-1:7:5f0c9a1e", "fence", 300, "0")
    with server.client() as client:
        for _ in range(3):
            client.xadd("departures", {"stream": "EWR-UA", "event": "{}"})
        ((_, read),) = client.xreadgroup("carry", "carry", {"departures": ">"}, 2)
        client.xack("departures", "carry", read[0][0])
        output = {"stream": "EWR-UA", "position": 5, "time": 1795981253745}
        client.xadd("scores", {**output, "outputs": '{"late": 0.02}'})


async def test_every_exchange_of_the_api_page_is_current(
    pipeline_server: RealServer, tmp_path: Path
) -> None:
    spec = flights_spec()
    artifact = write_artifact(tmp_path / "flights", spec, contracting_weights(spec, 5))
    actual_of: dict[str, str] = {}
    state_body = ""
    history = HistorySpec(events=64)
    async with harness(pipeline_server, {"flights": artifact}, history=history) as api:
        address = "unix:///run/carry/valkey.sock"
        detail, servers = f"{address} accepts commits", (ServerStatus(address, "up"),)
        api.store.check = Check("store", True, detail, servers=servers)
        for request, abridged, reply in exchanges():
            first, headers, body = parts(request)
            method, address = first.split(" ")
            if abridged and method == "PUT":
                body = state_body
            for shown, real in actual_of.items():
                headers = {name: text.replace(shown, real) for name, text in headers.items()}
            if address == "/v1/topics":
                await add_topic(api, pipeline_server)
            response = await api.client.request(
                method, address, headers=headers, content=body or None
            )
            if not reply:
                TypeAdapter(reply_types.ModelDetail).validate_json(response.content)
                assert json.loads(fences("http-api.md", "json")[0]).keys() == response.json().keys()
                continue
            status, shown_headers, shown_body = parts(reply)
            assert response.status_code == int(status), (first, response.text)
            assert bool(shown_body) == bool(response.content), first
            if shown_body:
                compare(json.loads(shown_body), response.json(), actual_of, first)
            for name, text in shown_headers.items():
                assert name in response.headers, (first, name)
                if name in ("Location", "Content-Type"):
                    assert response.headers[name] == text
            if address.endswith("/state"):
                state_body = response.text


async def test_every_route_has_its_section(pipeline_server: RealServer, tmp_path: Path) -> None:
    spec = flights_spec()
    artifact = write_artifact(tmp_path / "flights", spec, contracting_weights(spec, 5))
    async with harness(pipeline_server, {"flights": artifact}) as api:
        add_watching(api.app, Watches(api.store, api.store.outputs, api.counts))
        paths = (await api.client.get("/openapi.json")).json()["paths"]
    text = (ROOT / "docs/reference/http-api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^### `([A-Z]+) (\S+)`$", text, re.MULTILINE))
    assert documented == {(method.upper(), path) for path, item in paths.items() for method in item}
