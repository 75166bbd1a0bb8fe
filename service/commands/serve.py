"""`carry serve` and `carry check`: the service, and its start-up checks alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.common import DataDir, RedisUrl

if TYPE_CHECKING:
    from service.settings import Settings

Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Models = Annotated[
    list[Path] | None, typer.Option(metavar="DIR", help="An artifact, or a directory of artifacts.")
]


def one_directory(models: list[Path] | None) -> Path | None:
    """The directory of models; a second one would replace the first without a word.

    Raises:
        BadParameter: there are several.
    """
    if models and len(models) > 1:
        raise typer.BadParameter("expected one directory, which may have several artifacts in it")
    return models[0] if models else None


def serve(
    host: Host = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of the V2 protocol over gRPC; default: none.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Number of worker processes.")] = None,
    redis_url: RedisUrl = None,
    models: Models = None,
    data_dir: DataDir = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="Serve the pretrained examples from a temporary embedded store, print a request.",
        ),
    ] = False,
) -> None:
    """Serve models over HTTP. Every setting is also a CARRY_ variable; flags take precedence."""
    from service.serve import serve as serve_until_stopped
    from service.settings import Settings
    from service.telemetry.logs import configure_logs

    flags = {
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "workers": workers,
        "redis_url": redis_url,
        "models_dir": one_directory(models),
        "data_dir": data_dir,
    }
    if demo:
        if models or redis_url:
            raise typer.BadParameter("expected --demo without --models and --redis-url")
        for name in ("CARRY_MODELS_DIR", "CARRY_REDIS_URL"):
            os.environ.pop(name, None)
        os.environ.setdefault("CARRY_LOG_FORMAT", "console")
    settings = Settings.load(flags)
    configure_logs(settings.telemetry.log_level, settings.telemetry.log_format)
    _report_settings(settings)
    serve_until_stopped(settings, demo=demo)


def _report_settings(settings: Settings) -> None:
    """Print the settings that are set as a table for people, or log all of them as one line."""
    from structlog import get_logger

    shown = settings.effective()
    chosen = [setting for setting in shown if setting.origin != "default"]
    if settings.telemetry.log_format == "console":
        for setting in chosen:
            typer.echo(f"{setting.name:24} {setting.value:40} {setting.origin}", err=True)
        others = "the other settings have" if chosen else "all settings have"
        typer.echo(f"{others} their defaults: docs/reference/settings.md lists them", err=True)
        return
    origins = {
        origin: [setting.name for setting in chosen if setting.origin == origin]
        for origin in ("flag", "env")
    }
    values = {setting.name: setting.value for setting in shown}
    get_logger(__name__).info("settings", values=values, **origins)


def check(
    host: Host = None,
    redis_url: RedisUrl = None,
    models: Models = None,
    data_dir: DataDir = None,
    grace_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds after SIGTERM until the supervisor kills the service."),
    ] = None,
    proxy_idle_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for which the proxy keeps idle connections to it."),
    ] = None,
) -> None:
    """Run the start-up checks of settings, models and store, without serving or writing."""
    from service.settings import Settings, SettingsError
    from service.start_checks import CheckResult, run_checks
    from service.telemetry.logs import configure_logs

    flags = {
        "host": host,
        "redis_url": redis_url,
        "models_dir": one_directory(models),
        "data_dir": data_dir,
    }
    configure_logs("warning", "console")
    try:
        settings = Settings.load(flags)
    except SettingsError as error:
        results = [CheckResult("settings", False, str(error))]
    else:
        names = ", ".join(sorted(settings.origins)) or "none"
        results = [CheckResult("settings", True, f"valid; set: {names}")]
        results += run_checks(settings, grace_s, proxy_idle_s)
    for result in results:
        typer.echo(f"{'ok' if result.ok else 'failed':7}{result.name:12} {result.detail}")
    if not all(result.ok for result in results):
        raise typer.Exit(1)
