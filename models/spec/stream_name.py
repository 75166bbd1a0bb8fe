"""Rule for the names of streams, of requests and of training tables alike.

`.` and `..` are excluded: clients remove them from a URL (RFC 3986, 5.2.4), and the request would
reach another stream. The pattern is written without lookahead, which some regex engines lack.
"""

from __future__ import annotations

import re
from typing import Final

STREAM_NAME: Final = (
    r"^(?:[A-Za-z0-9._:@-]{3,256}|[A-Za-z0-9_:@-][A-Za-z0-9._:@-]?|\.[A-Za-z0-9_:@-])$"
)
STREAM_NAME_RULE: Final = "1 to 256 characters of A-Z a-z 0-9 . _ : @ -, and neither . nor .."

is_stream_name = re.compile(STREAM_NAME[1:-1]).fullmatch
