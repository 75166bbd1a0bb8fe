"""Versions of a model: list, load and retire them, and change which one answers."""

from __future__ import annotations

import asyncio
from typing import Literal

from starlette.responses import Response

from models.artifact.fingerprint import version_of
from service.codec.body_types import VersionBody
from service.pipeline.model_aliases import ModelStatus
from service.transports.v1.call import Call
from service.transports.v1.reply_types import VersionInfo, VersionList


async def get_versions(call: Call) -> Response:
    """Versions of a model, and which of them answers.

    The champion answers; the challenger computes beside it, and answers a share of the streams.
    """
    return await _reply(call)


async def post_version(call: Call) -> Response:
    """Load a version of a model.

    It is loaded and warmed up beside those that answer, by the process that answers this request;
    then the others load it. Rejected with the reason if it cannot serve the model.
    """
    body = await call.read_as(VersionBody)
    aliases, model = call.api.pipeline.aliases, call.served.name
    fingerprint = await aliases.load(call.caller, model, body.path, body.label)
    return call.reply(_version(model, fingerprint, await aliases.describe(call.caller, model)))


async def delete_version(call: Call) -> Response:
    """Retire a version.

    It is forgotten and unloaded; never the champion.
    """
    aliases = call.api.pipeline.aliases
    await aliases.retire(call.caller, call.served.name, call.path["version"])
    return Response(status_code=204)


async def get_report(call: Call) -> Response:
    """What is known of a version beside the champion that it was compared with.

    Differences of their outputs, losses and calibration of predictions whose events came since,
    time and lag: of all workers of the service that answers, since they were started.
    """
    status = await call.api.pipeline.aliases.describe(call.caller, call.served.name)
    version = version_of(status.record.find(call.path["version"]))
    report = call.api.recorder.shadow_report
    return call.reply(await asyncio.to_thread(report, call.served.name, version))


async def post_alias(call: Call) -> Response:
    """Change which version answers.

    Rejected (`version_not_ready`) until every process that serves the model has loaded the version,
    and if it would reject streams of the champion, unless `force` is true. Each process switches
    between two batches, so no request fails.
    """
    body = await call.read(call.codec.reader.alias)
    await call.api.pipeline.aliases.change(
        call.caller, call.served.name, body.action, body.version, body.share, force=body.force
    )
    return await _reply(call)


async def _reply(call: Call) -> Response:
    status = await call.api.pipeline.aliases.describe(call.caller, call.served.name)
    record = status.record
    document: VersionList = {
        "model": call.served.name,
        "processes": len(status.processes),
        "rollback": None if record.previous is None else version_of(record.previous),
        "versions": [_version(call.served.name, key, status) for key in record.versions],
    }
    return call.reply(document)


def _version(model: str, fingerprint: str, status: ModelStatus) -> VersionInfo:
    record, source = status.record, status.record.versions[fingerprint]
    alias: Literal["champion", "challenger"] | None = None
    share = 0.0
    if fingerprint == record.champion:
        alias, share = "champion", 1 - record.share
    elif fingerprint == record.challenger:
        alias, share = "challenger", record.share
    reports = status.processes
    return {
        "version": version_of(fingerprint),
        "fingerprint": fingerprint,
        "label": source.label,
        "path": source.path,
        "alias": alias,
        "share": share,
        "loaded": sum(fingerprint in report.loaded[model] for report in reports),
        "failed": [
            {"process": report.process, "reason": failed[fingerprint]}
            for report in reports
            if fingerprint in (failed := report.failed.get(model, {}))
        ],
    }
