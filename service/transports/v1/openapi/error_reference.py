"""Writes `docs/reference/errors.md` and the page that problem documents refer to.

Both come from the error tree.

python -m service.transports.v1.openapi.error_reference            prints the Markdown
python -m service.transports.v1.openapi.error_reference FILE       writes it
"""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from pathlib import Path

from service.core.errors import CarryError, leaf_errors
from service.transports.v1.problems import STATUS

INTRODUCTION = """\
# Errors

Every failure is answered with a problem document (RFC 9457, `application/problem+json`, or
MessagePack if the client accepts it). Use `code`, which is stable; `detail` is for people.

| member | meaning |
| --- | --- |
| `type` | the address of the code's entry in this list |
| `title`, `status`, `detail` | kind of error, HTTP status, expected and actual value |
| `code` | one of the codes below |
| `retryable` | whether the same request may be sent again unchanged |
| `request_id` | as in the reply's `X-Request-ID` and the service's log |
| `at`, `expected`, `got` | the place in the request, the expected and the actual value |
| `errors` | `at`, `expected`, `got` of the first few errors, if there are several |
| `stream`, `epoch`, `position`, `tag` | the stream and its head, if its state rejects the request |
| `verb`, `model`, `stream`, `allowed` | what the key does not allow, and what it allows |
| `retry_after_s` | seconds to wait; also in the header `Retry-After` |

A rejected request changes nothing: the stream keeps its head after every error of the first four
sections. A chunk with a position may be sent again after any failure; it is applied once. In a
request for many streams each item has its own `status` and `error`.
"""

_HEADINGS = {
    "BadRequest": "Invalid requests",
    "AccessDenied": "Access",
    "NotFound": "Unknown addresses",
    "StreamRejection": "Rejections by the stream",
    "ServiceFailure": "Failures of the service",
}


def groups() -> Iterator[tuple[str, str, list[type[CarryError]]]]:
    """Heading, explanation and errors of each branch of the tree."""
    for branch in CarryError.__subclasses__():
        explanation = " ".join((branch.__doc__ or "").split())
        yield _HEADINGS[branch.__name__], explanation, list(leaf_errors(branch))


def reference_markdown() -> str:
    """The whole of `docs/reference/errors.md`."""
    parts = [INTRODUCTION]
    for heading, explanation, kinds in groups():
        parts += [f"\n## {heading}\n", f"\n{explanation}\n", "\n"]
        parts.append("| code | status | retry | meaning | remedy |\n")
        parts.append("| --- | --- | --- | --- | --- |\n")
        for kind in kinds:
            parts.append(
                f'| <a id="{kind.code}"></a>`{kind.code}` | {STATUS[kind]} | {_retry(kind)} | '
                f"{kind.title}. | {_cell(kind.remedy)} |\n"
            )
    return "".join(parts)


def reference_html() -> str:
    """The same entries as a page; each code is an anchor."""
    rows = [
        f'<tr id="{kind.code}"><td><code>{kind.code}</code></td><td>{STATUS[kind]}</td>'
        f"<td>{_retry(kind)}</td><td>{html.escape(kind.title)}.</td>"
        f"<td>{html.escape(kind.remedy)}</td></tr>"
        for _, _, kinds in groups()
        for kind in kinds
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Carry: errors</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;"
        "padding:0 1rem;color-scheme:light dark}table{border-collapse:collapse}td,th{padding:"
        ".4rem .8rem;border-bottom:1px solid #8886;text-align:left;vertical-align:top}"
        "tr:target{background:#fd83}</style></head><body><h1>Errors</h1><p>Every failure is a "
        "problem document (RFC 9457). Decide by <code>code</code>.</p><table><thead><tr>"
        "<th>code</th><th>status</th><th>retry</th><th>meaning</th><th>remedy</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></body></html>\n"
    )


def _retry(kind: type[CarryError]) -> str:
    if kind.needs_position:
        return "with a position"
    return "yes" if kind.retryable else "no"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> None:
    """Print the reference, or write it to the file that is named."""
    text = reference_markdown()
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])
