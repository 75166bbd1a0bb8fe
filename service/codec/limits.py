"""Length from which a body is read in blocks."""

from __future__ import annotations

from typing import Final

LONG_BYTES: Final = 64 * 1024
"""Bodies of this length or more are read in blocks, so that other requests run in between."""
