"""Settings of the V2 protocol, over HTTP and gRPC."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from service.core.settings import settings_group


@settings_group
class V2Settings:
    """The V2 protocol, and its port for gRPC."""

    sequence_end: Literal["keep", "delete"] = "keep"
    """What `sequence_end` of the V2 protocol (KServe, Triton) does to the stream: `keep` keeps its
    state, `delete` deletes it after the chunk."""

    grpc_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """TCP port of the V2 protocol over gRPC; 0 selects a free one, without a value there is none.
    Needs the packages of the extra `grpc`."""

    grpc_max_calls: Annotated[int, Field(ge=1)] = 1_000
    """Maximum concurrent gRPC calls of one worker; further ones get `RESOURCE_EXHAUSTED`. Probes,
    and health and reflection streams without a key, are counted separately. More than all clients
    together have open; each stream may take four times `CARRY_GRPC_MAX_MESSAGE_BYTES`
    of memory while a message arrives."""

    grpc_max_message_bytes: Annotated[int, Field(ge=1024)] = 4 << 20
    """Maximum length of a gRPC request; a longer one gets `RESOURCE_EXHAUSTED`. The default is that
    of gRPC."""
