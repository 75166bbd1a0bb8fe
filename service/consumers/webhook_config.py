"""Configuration of a webhook, and of values that are secret."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl, StringConstraints

from service.core.errors import OperatorError

HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")]


class Secret(BaseModel):
    """A value outside the configuration: in an environment variable, or in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env: str | None = None
    file: Path | None = None

    def model_post_init(self, _: object) -> None:
        if (self.env is None) == (self.file is None):
            raise ValueError("expected `env` or `file`, and not both")


def read_secret(value: str | Secret, place: str) -> str:
    """The value of a secret, without white space around it; a string is the value itself.

    Args:
        place: the member of the configuration, for errors.

    Raises:
        OperatorError: there is no such variable, or the file cannot be read.
    """
    if isinstance(value, str):
        return value.strip()
    if value.file is not None:
        try:
            return value.file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise OperatorError(f"{place}: {value.file} cannot be read: {error}") from error
    variable = os.environ.get(value.env or "")
    if variable is None:
        raise OperatorError(f"{place}: expected the variable {value.env}, which is not set")
    return variable.strip()


class WebhookConfig(BaseModel):
    """The receiver of outputs, and how they are posted."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    url: HttpUrl
    """The receiver."""

    secret: str | Secret
    """The secret that signs requests, in base64, as `{env: NAME}` or `{file: PATH}`; several,
    separated by whitespace, while a receiver moves to a new one."""

    headers: dict[HeaderName, str | Secret] = {}
    """Headers of each request, such as `authorization`."""

    batch: Annotated[int, Field(ge=1, le=1000)] = 100
    """Maximum number of outputs in a request."""

    timeout_s: Annotated[float, Field(ge=0.1, le=300)] = 15.0
    """Duration in seconds after which a request has failed."""

    ca_file: Path | None = None
    """Certificates of the authorities that the receiver's is verified with, in PEM, instead of the
    public ones."""

    on_error: Literal["continue", "halt"] = "continue"
    """What follows a rejection of an output: it becomes a dead letter and the relay continues; or
    the relay halts, and tries again until the output is accepted."""

    delete: bool = False
    """Whether delivered entries are deleted from the output topic."""
