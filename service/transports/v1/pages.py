"""The pages of the documentation, and the security headers of every page of the service.

    python -m service.transports.v1.pages      prints the tables of docs/reference/errors.md

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
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import service.server.errors  # noqa: F401  (adds errors to the tree)
from service.core.errors import CarryError, leaf_errors

FOLDER: Final = Path(__file__).parent
ASSETS: Final = "/docs/assets"

_HEADINGS: Final = {
    "BadRequest": "Invalid requests",
    "AccessDenied": "Access",
    "NotFound": "Unknown addresses",
    "StreamRejection": "Rejections by the stream",
    "ServiceFailure": "Failures of the service",
}


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


def reference_markdown() -> str:
    """The tables of `docs/reference/errors.md`: one for each branch of the tree."""
    parts = []
    for branch in CarryError.__subclasses__():
        explanation = " ".join((branch.__doc__ or "").split())
        parts.append(f"\n## {_HEADINGS[branch.__name__]}\n\n{explanation}\n\n")
        parts.append(
            "| code | status | retry | meaning | remedy |\n| --- | --- | --- | --- | --- |\n"
        )
        for code, status, retry, meaning, remedy in _entries(branch):
            remedy = remedy.replace("|", "\\|")
            anchor = f'<a id="{code}"></a>`{code}`'
            parts.append(f"| {anchor} | {status} | {retry} | {meaning} | {remedy} |\n")
    return "".join(parts)


def reference_html() -> str:
    """The page of all errors; each code is an anchor."""
    rows = []
    for code, status, *texts in _entries(CarryError):
        cells = "".join([f"<td>{html.escape(text)}</td>" for text in texts])
        rows.append(f'<tr id="{code}"><td><code>{code}</code></td><td>{status}</td>{cells}</tr>')
    page = (FOLDER / "errors.html").read_text("utf-8")
    return page.replace("ROWS", "".join(rows))


def _entries(branch: type[CarryError]) -> Iterator[tuple[str, int, str, str, str]]:
    """Code, status, whether to retry, meaning and remedy of each error of a branch."""
    for kind in leaf_errors(branch):
        retry = "yes" if kind.retryable else "no"
        if kind.needs_position:
            retry = "with a position"
        yield kind.code, kind.status, retry, f"{kind.title}.", kind.remedy


if __name__ == "__main__":
    print(reference_markdown())
