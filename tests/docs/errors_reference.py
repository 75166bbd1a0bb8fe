"""Generates the tables of errors in `docs/reference/errors.md`.

python -m tests.docs.errors_reference        prints them
"""

from __future__ import annotations

from typing import Final

from service.core.errors import CarryError, leaf_errors
from service.transports.v1.pages import retry_advice

HEADINGS: Final = {
    "BadRequest": "Invalid requests",
    "AccessDenied": "Access",
    "NotFound": "Unknown addresses",
    "StreamRejection": "Rejections by the stream",
    "ServiceFailure": "Failures of the service",
}


def errors_tables() -> str:
    """Make a Markdown table for each branch of the tree."""
    parts = []
    for branch in CarryError.__subclasses__():
        explanation = " ".join((branch.__doc__ or "").split())
        parts.append(f"\n## {HEADINGS[branch.__name__]}\n\n{explanation}\n\n")
        parts.append(
            "| code | status | retry | meaning | remedy |\n| --- | --- | --- | --- | --- |\n"
        )
        for kind in leaf_errors(branch):
            remedy = kind.remedy.replace("|", "\\|")
            anchor = f'<a id="{kind.code}"></a>`{kind.code}`'
            retry, meaning = retry_advice(kind), f"{kind.title}."
            parts.append(f"| {anchor} | {kind.status} | {retry} | {meaning} | {remedy} |\n")
    return "".join(parts)


if __name__ == "__main__":
    print(errors_tables())
