"""The errors by branch of their tree: the tables of `docs/reference/errors.md`, and the page that
problem documents refer to.

python -m service.transports.v1.openapi.error_reference        prints the tables
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Final

from service.core.errors import CarryError, leaf_errors
from service.transports.v1.problems import STATUS

_HEADINGS: Final = {
    "BadRequest": "Invalid requests",
    "AccessDenied": "Access",
    "NotFound": "Unknown addresses",
    "StreamRejection": "Rejections by the stream",
    "ServiceFailure": "Failures of the service",
}
_PAGE: Final = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Carry: errors</title>\
<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;\
padding:0 1rem;color-scheme:light dark}table{border-collapse:collapse}td,th{padding:\
.4rem .8rem;border-bottom:1px solid #8886;text-align:left;vertical-align:top}\
tr:target{background:#fd83}</style></head><body><h1>Errors</h1><p>Every failure is a \
problem document (RFC 9457). Decide by <code>code</code>.</p><table><thead><tr>\
<th>code</th><th>status</th><th>retry</th><th>meaning</th><th>remedy</th>\
</tr></thead><tbody>ROWS</tbody></table></body></html>
"""


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
    """The same entries as a page; each code is an anchor."""
    rows = []
    for code, status, *texts in _entries(CarryError):
        cells = "".join([f"<td>{html.escape(text)}</td>" for text in texts])
        rows.append(f'<tr id="{code}"><td><code>{code}</code></td><td>{status}</td>{cells}</tr>')
    return _PAGE.replace("ROWS", "".join(rows))


def _entries(branch: type[CarryError]) -> Iterator[tuple[str, int, str, str, str]]:
    """Code, status, whether to retry, meaning and remedy of each error of a branch."""
    for kind in leaf_errors(branch):
        retry = "yes" if kind.retryable else "no"
        if kind.needs_position:
            retry = "with a position"
        yield kind.code, STATUS[kind], retry, f"{kind.title}.", kind.remedy


if __name__ == "__main__":
    print(reference_markdown())
