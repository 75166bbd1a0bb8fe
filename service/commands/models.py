"""`carry models`: manages the versions of the models of a running service.

The commands are a client of the HTTP API, `pull` one of MLflow's; they connect to no store.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands.common import DEFAULT_URL, Url, open_service, show_progress
from service.core.errors import OperatorError

if TYPE_CHECKING:
    from carry_client import Carry

POLL_S = 0.5

Force = Annotated[bool, typer.Option("--force", help="Also if it would reject streams that exist.")]

models_app = typer.Typer(
    help="Load versions of models in a running service, and change which one answers.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Argument(help="The model's name.")]
Version = Annotated[
    str, typer.Argument(help="Its label, or the first digits of its fingerprint, at least four.")
]


@models_app.command("list")
def list_versions(
    model: Annotated[str | None, typer.Argument(help="The model's name; default: all.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Print the versions of a model, or of all."""
    with open_service(url) as client:
        names = [model]
        if model is None:
            listed: Any = client.request("GET", "/v1/models")
            names = [each["name"] for each in listed["models"]]
        for name in names:
            _print(_versions(client, str(name)))


@models_app.command("load")
def load_version(
    model: Model,
    path: Annotated[str, typer.Argument(help="Folder of the artifact, in that of the models.")],
    label: Annotated[str | None, typer.Option(help="A name for the version.")] = None,
    timeout_s: Annotated[
        float, typer.Option(min=0, help="Longest wait until every process has loaded it.")
    ] = 300.0,
    url: Url = DEFAULT_URL,
) -> None:
    """Load a version beside those that answer, and wait until every process has loaded it."""
    deadline_s = time.monotonic() + timeout_s
    with open_service(url) as client, show_progress("loading"):
        body = {"path": path} | ({} if label is None else {"label": label})
        made: Any = client.request("POST", _path(model, "versions"), body)
        while True:
            document = _versions(client, model)
            named = {each["version"]: each for each in document["versions"]}
            if (version := named.get(made["version"])) is None:
                raise OperatorError(f"version {made['version']} was retired meanwhile")
            if version["failed"]:
                failed = version["failed"][0]
                raise OperatorError(f"{failed['process']} does not load it: {failed['reason']}")
            if version["loaded"] == document["processes"]:
                break
            if time.monotonic() > deadline_s:
                count = f"{version['loaded']} of {document['processes']}"
                raise OperatorError(f"{count} processes have loaded it after {timeout_s:g} s")
            time.sleep(POLL_S)
    _print(document)


@models_app.command("pull")
def pull_version(
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="models:/NAME@ALIAS or models:/NAME/VERSION.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The artifact directory to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact at OUT.")
    ] = False,
) -> None:
    """Download an artifact from an MLflow registry, that of MLFLOW_TRACKING_URI."""
    from models.registry import pull_model

    artifact = pull_model(uri, out, overwrite=overwrite)
    typer.echo(f"{out}: model {artifact.spec.name}, version {artifact.version}")


@models_app.command("shadow")
def shadow_version(model: Model, version: Version, url: Url = DEFAULT_URL) -> None:
    """Let a version compute beside the champion, without answering."""
    _change(url, model, {"action": "shadow", "version": version})


@models_app.command("canary")
def answer_share(
    model: Model,
    version: Version,
    share: Annotated[float, typer.Argument(help="Share of the streams, above 0 and up to 1.")],
    force: Force = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Let a version answer a share of the streams."""
    _change(url, model, {"action": "canary", "version": version, "share": share} | _forced(force))


@models_app.command("promote")
def promote_version(
    model: Model, version: Version, force: Force = False, url: Url = DEFAULT_URL
) -> None:
    """Let a version answer all streams; the one that answered so far computes beside it."""
    _change(url, model, {"action": "promote", "version": version} | _forced(force))


@models_app.command("rollback")
def roll_back(model: Model, url: Url = DEFAULT_URL) -> None:
    """Undo the last promotion."""
    _change(url, model, {"action": "rollback"})


@models_app.command("retire")
def retire_version(model: Model, version: Version, url: Url = DEFAULT_URL) -> None:
    """Forget a version and unload it."""
    with open_service(url) as client:
        client.request("DELETE", _path(model, f"versions/{version}"))
        _print(_versions(client, model))


@models_app.command("report")
def print_report(
    model: Model,
    version: Annotated[
        str | None, typer.Argument(help="Of a version; default: the challenger.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Compare a challenger with the champion: outputs, losses, calibration, time."""
    with open_service(url) as client:
        if version is None:
            listed = _versions(client, model)["versions"]
            version = next((v["version"] for v in listed if v["alias"] == "challenger"), None)
        if version is None:
            raise OperatorError(f"model {model} has no challenger; name a version")
        report = client.request("GET", _path(model, f"versions/{version}/report"))
    typer.echo(json.dumps(report, indent=2) if as_json else _report_text(report))


def _report_text(report: Any) -> str:
    """A report as text: a line of totals, and a line for each output, loss and calibration."""
    counts = "  ".join(f"{outcome} {count:,}" for outcome, count in report["chunks"].items())
    lines = [f"challenger {report['challenger']}", f"chunks      {counts or 'none'}"]
    lines.append(
        f"events      computed {report['events']:,}  from history {report['caught_up_events']:,}"
    )
    times = "  ".join(f"{side} {us:.1f} us" for side, us in report["us_per_event"].items())
    lag_s = "-" if report["lag_s"] is None else f"{report['lag_s']:.3f} s"
    lines.append(f"time/event  {times or '-'}  lag {lag_s}")
    for output, each in report["differences"].items():
        sizes = "  ".join(f"{name} {value:.3g}" for name, value in each.items())
        lines.append(f"difference  {output}  {sizes}")
    for head, losses in report["losses"].items():
        for loss, each in losses.items():
            change = each["challenger"] - each["champion"]
            lines.append(
                f"loss        {head} {loss}  champion {each['champion']:.4g}  challenger "
                f"{each['challenger']:.4g} ({change:+.2g})  of {each['events']:,} events"
            )
    for head, sides in report["calibration"].items():
        errors = "  ".join(f"{side} {own['error']:.4f}" for side, own in sides.items())
        lines.append(f"calibration {head}  error {errors}")
    return "\n".join(lines)


def _forced(force: bool) -> dict[str, Any]:
    """The member of a forced change; left out otherwise, as services before it do not know it."""
    return {"force": True} if force else {}


def _change(url: str, model: str, change: dict[str, Any]) -> None:
    with open_service(url) as client:
        _print(client.request("POST", _path(model, "aliases"), change))


def _versions(client: Carry, model: str) -> Any:
    return client.request("GET", _path(model, "versions"))


def _path(model: str, rest: str) -> str:
    from carry_client import model_path

    return f"{model_path(model)}/{rest}"


def _print(document: Any) -> None:
    """Print the versions of a model, one per line."""
    for version in document["versions"]:
        columns = [document["model"], version["version"], version["label"] or "-"]
        alias = version["alias"] or "-"
        if 0 < version["share"] < 1:
            alias += f" {version['share']:.4g}"
        loaded = f"loaded by {version['loaded']} of {document['processes']}"
        typer.echo("  ".join([*columns, alias, loaded, version["path"]]))
        for failed in version["failed"]:
            typer.echo(f"    {failed['process']}: {failed['reason']}")
