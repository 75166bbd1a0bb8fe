"""Security headers of the service's pages: no content of other hosts, and no code but their own.

So what a page shows, such as a name from the model, cannot become code that reads the user's key.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Sequence
from hashlib import sha256


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
