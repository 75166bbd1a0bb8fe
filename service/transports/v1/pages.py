"""The pages of the documentation, and the security headers of every page of the service.

A page has no content of other hosts, and no code but its own: what it shows, such as a name from
the model, cannot become code that reads the user's key.

`/docs` is Swagger UI for `/openapi.json`, which asks for an access key if one is needed. The key is
kept as the console keeps it, in the `sessionStorage` of the tab: it is entered once for both pages.
`/docs/errors` is what problem documents refer to: the errors by branch of their tree.
"""

from __future__ import annotations

import html
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import service.server.errors  # noqa: F401  (adds errors to the tree)
from service.core.errors import CarryError, leaf_errors

FOLDER: Final = Path(__file__).parent
ASSETS: Final = "/docs/assets"


def documentation_html(parameters: Mapping[str, Any]) -> str:
    """The page; its addresses are relative, so that a proxy may serve it below a path.

    Args:
        parameters: of Swagger UI, besides those that all pages have.
    """
    shown = {
        "dom_id": "#swagger-ui",
        "layout": "BaseLayout",
        "deepLinking": True,
        "showExtensions": True,
        "showCommonExtensions": True,
        **parameters,
    }
    page = (FOLDER / "docs.html").read_text("utf-8")
    return page.replace("ASSETS", ASSETS).replace("PARAMETERS", json.dumps(shown))


def page_headers(page: str = "", directives: Sequence[str] = ()) -> dict[str, str]:
    """Make the security headers of a page.

    Args:
        page: its HTML; the scripts and styles in it are allowed by their hashes.
        directives: further ones of its content security policy.
    """
    policy = (
        "default-src 'none'",
        f"script-src 'self'{_hashes('script', page)}",
        f"style-src 'self'{_hashes('style', page)}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        *directives,
    )
    return {
        "content-security-policy": "; ".join(policy),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
    }


def _hashes(tag: str, page: str) -> str:
    inline = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = [b64encode(sha256(text.encode()).digest()).decode() for text in inline]
    return "".join([f" 'sha256-{digest}'" for digest in digests])


def reference_html() -> str:
    """The page of all errors; each code is an anchor."""
    rows = []
    for kind in leaf_errors():
        cells = [str(kind.status), retry_advice(kind), f"{kind.title}.", kind.remedy]
        code = f'<tr id="{kind.code}"><td><code>{kind.code}</code></td>'
        rows.append(code + "".join([f"<td>{html.escape(text)}</td>" for text in cells]) + "</tr>")
    page = (FOLDER / "errors.html").read_text("utf-8")
    return page.replace("ROWS", "".join(rows))


def retry_advice(kind: type[CarryError]) -> str:
    """Whether to send a request again that failed with this error."""
    if kind.needs_position:
        return "with a position"
    return "yes" if kind.retryable else "no"
