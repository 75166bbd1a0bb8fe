"""Real servers and stores on them."""

from tests.support.servers import own_server, server, shared_server

__all__ = ["own_server", "server", "shared_server"]
