"""An object store for tests: the files of a folder by the reading part of the protocol of S3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path

    def do_HEAD(self) -> None:
        self._respond(has_body=False)

    def do_GET(self) -> None:
        self._respond(has_body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _respond(self, *, has_body: bool) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        if "list-type" in query:
            self._send(200, self._listing(unquote(url.path), query.get("prefix", [""])[0]))
            return
        file = self.folder / unquote(url.path).lstrip("/")
        if not file.is_file():
            self._send(404, b"")
            return
        content = file.read_bytes()
        size = len(content)
        if (wanted := self.headers.get("Range")) is None:
            self._send(200, content, has_body=has_body)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        self._send(206, content[start:stop], f"bytes {start}-{stop - 1}/{size}")

    def _listing(self, bucket: str, prefix: str) -> bytes:
        root = self.folder / bucket.strip("/")
        files = sorted(file for file in root.rglob("*") if file.is_file())
        entries = [
            f"<Contents><Key>{escape(name)}</Key><Size>{file.stat().st_size}</Size>"
            "<LastModified>2025-01-01T00:00:00.000Z</LastModified><ETag>e</ETag></Contents>"
            for file in files
            if (name := str(file.relative_to(root))).startswith(prefix)
        ]
        listing = "".join(["<IsTruncated>false</IsTruncated>", *entries])
        return f"<ListBucketResult>{listing}</ListBucketResult>".encode()

    def _send(
        self, status: int, content: bytes, content_range: str = "", *, has_body: bool = True
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.send_header("ETag", '"e"')
        self.send_header("Accept-Ranges", "bytes")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if has_body:
            self.wfile.write(content)


@contextmanager
def serve_objects(folder: Path) -> Iterator[str]:
    """Serve the files of a folder, whose directories are buckets; yields the address."""
    handler = type("Handler", (_Handler,), {"folder": folder})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
