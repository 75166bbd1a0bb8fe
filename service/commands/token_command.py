"""`carry keys token`: signs a token of an access key, without a service or its store."""

from __future__ import annotations

import time
from typing import Annotated

import typer


def sign(
    allow: Annotated[
        list[str] | None,
        typer.Option(metavar="VERB", help="What it may do; default: what the key may."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Models that it may use; default: those of the key.")
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Only streams whose names begin with this; default: that of the key."),
    ] = None,
    subject: Annotated[str | None, typer.Option(help="The tenant, for logs.")] = None,
    minutes: Annotated[float, typer.Option(min=0.001, help="Minutes until it expires.")] = 60.0,
) -> None:
    """Sign a token that allows a part of what the key in CARRY_API_KEY (or CARRY_API_KEY_FILE)
    allows, and print it."""
    from carry_client.wire import authorization
    from service.access.caller import Verb
    from service.access.keys import parse_key
    from service.access.tokens import TokenClaims, sign_token

    try:
        bearer = authorization().get("authorization", "").removeprefix("Bearer ")
        key = parse_key(bearer)
        if key is None:
            raise ValueError("expected an access key in CARRY_API_KEY or CARRY_API_KEY_FILE")
        claims = TokenClaims(
            exp=round(time.time() + 60 * minutes),
            sub=subject,
            verbs=None if allow is None else tuple(map(Verb, allow)),
            models=None if model is None else tuple(model),
            prefix=prefix,
        )
    except ValueError as error:
        typer.echo(f"carry: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(sign_token(key, claims))
