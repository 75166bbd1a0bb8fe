"""Replies of the routes: negotiated bytes, the ETag and the Server-Timing header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from service.api.media import Media, dumps
from service.domain import Mark, Timing


def reply(
    media: Media, document: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A document in the media type that was negotiated."""
    return Response(dumps(media, document), status, headers=headers, media_type=media.value)


def etag(mark: Mark) -> dict[str, str]:
    """The ETag header of a stream's state."""
    return {"ETag": f'"{mark.etag}"'}


def server_timing(timing: Timing) -> str:
    """Where a chunk's time went, in milliseconds, as Server-Timing writes it."""
    return (
        f"queue;dur={timing.queue_s * 1000:.3f}, load;dur={timing.load_s * 1000:.3f}, "
        f"infer;dur={timing.infer_s * 1000:.3f}, commit;dur={timing.commit_s * 1000:.3f}"
    )
