"""Members of requests and replies as the API document describes them."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from service.codec.field_rules import EPOCH, TAG
from service.core.values import STREAM_NAME

EXAMPLE_STREAM: Final = "EWR-UA"
EXAMPLE_EPOCH: Final = "5f0c1e7ab2d34896"
EXAMPLE_TAG: Final = "c2a94d0b71e65f3889d1046be7a2f35c"
EXAMPLE_VERSION: Final = "9c04e2d1b8a7"
EXAMPLE_FINGERPRINT: Final = "9c04e2d1b8a75f6631c2d4e8f9a0b7c6"
EXAMPLE_STATE: Final = {"lstm_1.hidden": [0.12, -0.4], "lstm_1.carry": [0.3, -0.91]}

StreamName = Annotated[str, Field(pattern=STREAM_NAME, examples=[EXAMPLE_STREAM])]
ModelName = Annotated[str, Field(description="The model's slug.", examples=["flights"])]
Version = Annotated[
    str,
    Field(description="First 12 digits of the model's fingerprint.", examples=[EXAMPLE_VERSION]),
]
Fingerprint = Annotated[
    str,
    Field(
        pattern="^[0-9a-f]{32}$",
        description="Hash of what determines the model's numbers.",
        examples=[EXAMPLE_FINGERPRINT],
    ),
]
EpochText = Annotated[
    str,
    Field(
        pattern=f"^{EPOCH}$",
        description="Random; new whenever the stream is created, restored or forked.",
        examples=[EXAMPLE_EPOCH],
    ),
]
TagText = Annotated[
    str,
    Field(
        pattern=f"^{TAG}$",
        description="Hash chain over the commits of the epoch.",
        examples=[EXAMPLE_TAG],
    ),
]
PositionNumber = Annotated[
    int, Field(ge=0, le=2**62, description="Events consumed.", examples=[48])
]
FeedName = Annotated[
    Literal["events", "inputs"], Field(description="How the stream is fed, since its first chunk.")
]
BY_PART: Final = "Each part of the state by its name, as nested lists of the part's shape."
StateValues = Annotated[
    dict[str, Any],
    Field(
        description=BY_PART,
        examples=[EXAMPLE_STATE],
    ),
]
