"""The Python client by a name below `carry`: everything that `carry_client` exports."""

from carry_client import *  # noqa: F403
from carry_client import __all__ as __all__
