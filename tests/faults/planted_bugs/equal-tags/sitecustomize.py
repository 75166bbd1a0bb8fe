"""Planted: appends have no nonce, so that two equal ones share a tag.

Of two that race, the loser finds the stream at the very head it wanted to write, and takes the
other's commit for its own.
"""

from service.core import delivery

delivery.new_nonce = lambda: b""
