"""Settings of access: whether requests need a key."""

from __future__ import annotations

from service.core.settings import settings_group


@settings_group
class AccessSettings:
    """Whether requests need a key."""

    require_keys: bool | None = None
    """`true`: answer only requests with an access key, even before the first one is created. Not
    set: keys are required once the store has, or has ever had, a key, also if it was restored
    without its keys. `false`: keys are required only if the store has one now."""

    insecure: bool = False
    """Listen on an address that other machines reach although there is no access key: everybody who
    reaches the port may do everything. Only behind a gateway that checks access."""
