"""The service beside the load: its description, second computations, and cleaning up.

One request at a time, over the standard library.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from tests.load.description import Description, read_description
from tests.load.scenarios import LoadError

TIMEOUT_S = 120.0
RETRIED_FOR_S = 30.0
RETRY_S = 0.2
BUSY_STATUSES = (429, 503, 504)


class Service:
    """A running service at one address."""

    def __init__(self, url: str):
        """Nothing is asked yet; LoadError where it is no http address."""
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadError(f"--url: expected an http address, got {url!r}")
        self.url = url.rstrip("/")

    def describe(self, model: str | None) -> Description:
        """The model of that name; without one, the only one that is served.

        Raises:
            LoadError: nothing answers, or there is no such model, or there are several.
        """
        try:
            served = [found["name"] for found in self._ask("GET", "/v1/models")["models"]]
        except (KeyError, TypeError) as error:
            raise LoadError(f"what answers at {self.url} does not list its models") from error
        if model is None and len(served) != 1:
            raise LoadError(f"--model: choose one of {', '.join(served) or 'none that is served'}")
        if model is not None and model not in served:
            raise LoadError(f"--model {model}: served are {', '.join(served) or 'none'}")
        return read_description(self._ask("GET", f"/v1/models/{model or served[0]}"))

    def post(self, path: str, body: bytes) -> Any:
        """The document that a POST is answered with; tried again while the service is busy."""
        return self._ask("POST", path, body)

    def forget(self, model: str, prefix: str) -> int:
        """Delete every stream whose name begins with `prefix`; how many there were."""
        query = urllib.parse.urlencode({"prefix": prefix})
        return int(self._ask("DELETE", f"/v1/models/{model}/streams?{query}")["deleted"])

    def _ask(self, method: str, path: str, body: bytes | None = None) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=body, headers=headers, method=method)
        ends_s = time.monotonic() + RETRIED_FOR_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                said = error.read()[:300].decode(errors="replace")
                if error.code not in BUSY_STATUSES or time.monotonic() >= ends_s:
                    raise LoadError(f"{method} {path}: status {error.code}: {said}") from error
                time.sleep(RETRY_S)
            except ValueError as error:
                raise LoadError(f"{method} {path}: what came is not JSON") from error
            except OSError as error:
                reason = getattr(error, "reason", error)
                raise LoadError(
                    f"nothing answers at {self.url} ({reason}); start the service with "
                    "`make run`, or name another address with --url"
                ) from error
