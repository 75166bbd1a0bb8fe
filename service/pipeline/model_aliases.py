"""The versions of the served models over all processes: loads them, and moves the aliases.

The store has a record of each model whose versions were ever changed (`model_record`). Every
process reads the records each `REFRESH_S`, loads the versions that they name beside those that
answer, in a thread, and reports what it has loaded, or why not. An alias is given to a version only
once every process that serves the model has reported it; so a switch finds the version warm
everywhere. While the store does not answer, the last known records hold.

Use from one event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NamedTuple, Protocol

import msgspec
import structlog

from models.artifact.fingerprint import version_of
from service.access.caller import Caller, Verb
from service.core.errors import CarryError, VersionNotReady, VersionRejected
from service.core.values import Check
from service.pipeline.model_record import (
    Action,
    ModelRecord,
    VersionSource,
    check_accepts_same_requests,
)
from service.pipeline.model_versions import ModelVersions, Route
from service.pipeline.recorder import Audit, no_audit
from service.pipeline.served_model import ServedModel
from service.store.capabilities import StoredModels

REFRESH_S: Final = 0.5
"""Time between two reads of the records' version."""

REPORT_S: Final = 2.0
"""Longest time between two reports of a process; the store forgets older ones after a while."""

READ_S: Final = 0.4
"""Longest wait for the store when it is polled."""

MANAGE: Final = (Verb.MANAGE_MODELS,)

log = structlog.get_logger(__name__)


class VersionLoader(Protocol):
    """Loads versions from the folder of the models."""

    def __call__(self, model: str, path: str) -> ServedModel:
        """Load and warm up the version of a model in a folder; called in a thread."""

    def path_of(self, served: ServedModel) -> str:
        """The path by which a version is loaded again."""


OnSwitch = Callable[[ModelVersions], object]
"""Called after the route or the loaded versions of a model have changed."""


class ProcessReport(msgspec.Struct, frozen=True):
    """What one process has loaded.

    Attributes:
        loaded: fingerprints, in hex, by model; only the models that it serves.
        failed: why a version could not be loaded, by model and fingerprint.
    """

    process: str
    loaded: dict[str, list[str]]
    failed: dict[str, dict[str, str]]


class ModelStatus(NamedTuple):
    """The versions of one model, and the processes that serve it."""

    record: ModelRecord
    processes: list[ProcessReport]


class ModelAliases:
    """The aliases of the models of one process.

    Args:
        versions: by model; their routes are set here.
        load: loads a version; None if none can be loaded.
        policy: what happens to streams that another version wrote, as in the settings.
        audit: records what was changed.

    Attributes:
        on_switch: called in their order.
    """

    def __init__(
        self,
        versions: Mapping[str, ModelVersions],
        stored: StoredModels,
        load: VersionLoader | None = None,
        *,
        policy: str,
        audit: Audit = no_audit,
    ):
        self._versions = versions
        self._stored = stored
        self._load_version = load
        self._policy = policy
        self._audit = audit
        self.on_switch: list[OnSwitch] = []
        self._process = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(2)}"
        self._records_version: bytes | None = None
        self._records: dict[str, ModelRecord] = {}
        self._failed: dict[str, dict[str, str]] = {}
        self._reported: tuple[float, bytes] = (-math.inf, b"")
        self._is_failing = False
        self._changing = asyncio.Lock()
        self._loading = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load the versions that answer by the records, and follow the records from then on; once,
        after the store is started and before the champions are warmed up.

        Raises:
            VersionRejected: a champion or a canary cannot be loaded.
            StoreUnavailable, StoreRefused
        """
        await self._read(math.inf)
        for name, versions in self._versions.items():
            if "/" in self._path(versions.route.champion):
                # from a folder of versions: one that is added later must not answer by a restart
                await self._change(name, lambda record: record)
        for name, record in self._records.items():
            # the champion is what others are checked against, not the last one in the folder
            await self._load_recorded(name, record.champion, is_checked=False)
            self._apply(name)
            if record.challenger is not None:
                await self._load_recorded(name, record.challenger)
                self._apply(name)
            if (reason := self._failure(name)) is not None:
                raise VersionRejected(reason)
        loop = asyncio.get_running_loop()
        steps = (self.refresh, self._load_missing)
        self._tasks = [loop.create_task(self._repeat(step)) for step in steps]

    async def close(self) -> None:
        """Stop following; once, before the store is closed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._reported[1]:
            try:
                await self._stored.report(self._process, b"", time.monotonic() + READ_S)
            except CarryError as error:
                log.info("models_not_reported", code=error.code, reason=error.detail)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        """Repeat a step for ever: a process that no longer follows the records counts as ended."""
        while True:
            try:
                await step()
            except Exception:
                log.exception("models_not_followed")
            await asyncio.sleep(REFRESH_S)

    async def _load_missing(self) -> None:
        """Load the recorded versions that are not loaded, one after another."""
        for name, record in [*self._records.items()]:
            for fingerprint in record.versions:
                if not self._is_settled(name, fingerprint):
                    await self._load_recorded(name, fingerprint)
                    self._apply(name)

    async def refresh(self) -> None:
        """Read the records again and report, if the store answers."""
        try:
            await self._read(time.monotonic() + READ_S)
            await self._report(time.monotonic() + READ_S)
        except CarryError as error:
            if not self._is_failing:
                log.warning("models_not_read", code=error.code, reason=error.detail)
            self._is_failing = True
        else:
            self._is_failing = False

    async def _read(self, deadline_s: float) -> None:
        stored = await self._stored.read(self._records_version, deadline_s)
        if stored is None:
            return
        version, records = stored
        for name in self._versions:
            if name not in records:
                continue
            try:
                record = msgspec.json.decode(records[name], type=ModelRecord)
            except msgspec.MsgspecError as error:
                log.error("model_record_not_readable", model=name, reason=str(error))
                continue
            if record != self._records.get(name):
                self._records[name] = record
                self._failed.pop(name, None)  # tried again: a folder may have been corrected
                self._apply(name)
        self._records_version = version

    async def _report(self, deadline_s: float = math.inf, *, always: bool = False) -> list[bytes]:
        """Report what is loaded, if that has changed or the last report is old; returns the
        reports of all processes, none if it did not."""
        report = ProcessReport(
            self._process,
            {
                name: sorted(key.hex() for key in versions.loaded)
                for name, versions in self._versions.items()
            },
            self._failed,
        )
        encoded, now_s = msgspec.json.encode(report), time.monotonic()
        reported_s, reported = self._reported
        if encoded == reported and now_s - reported_s < REPORT_S and not always:
            return []
        reports = [*await self._stored.report(self._process, encoded, deadline_s)]
        self._reported = now_s, encoded
        return reports

    # Versions

    def _is_settled(self, name: str, fingerprint: str) -> bool:
        """Whether a version is loaded, or could not be."""
        is_loaded = bytes.fromhex(fingerprint) in self._versions[name].loaded
        return is_loaded or fingerprint in self._failed.get(name, {})

    async def _load_recorded(self, name: str, fingerprint: str, *, is_checked: bool = True) -> None:
        """Load a version that the record names, as `_load` does; a failure is reported."""
        source = self._records[name].versions.get(fingerprint)
        if source is None or self._is_settled(name, fingerprint):
            return
        try:
            served = await self._load(name, source.path, is_checked=is_checked)
            if served.fingerprint.hex() != fingerprint:
                raise VersionRejected(
                    f"{source.path}: expected version {version_of(fingerprint)}, got "
                    f"{served.version}; put the expected one back: each needs a folder of its own"
                )
        except VersionRejected as error:
            log.error(
                "model_version_not_loaded",
                model=name,
                version=version_of(fingerprint),
                reason=error.detail,
            )
            self._failed.setdefault(name, {})[fingerprint] = error.detail

    async def _load(self, name: str, path: str, *, is_checked: bool = True) -> ServedModel:
        """Load a version beside those that answer, without disturbing them.

        Args:
            is_checked: whether it has to accept the requests of the champion.
        """
        versions = self._versions[name]
        async with self._loading:
            if self._load_version is None:
                raise VersionRejected("this process loads no versions")
            try:
                served = await asyncio.to_thread(self._load_version, name, path)
            except Exception as error:
                # whatever is wrong with an artifact: the versions that answer go on
                raise VersionRejected(f"{path}: {error}") from error
            if is_checked:
                check_accepts_same_requests(versions.route.champion, served)
            if served.fingerprint not in versions.loaded:
                versions.add(served)
            return served

    def _apply(self, name: str) -> None:
        """Set the route of a model by its record, as far as its versions are loaded."""
        record, versions = self._records[name], self._versions[name]
        loaded = {key.hex(): served for key, served in versions.loaded.items()}
        champion, challenger = loaded.get(record.champion), loaded.get(record.challenger or "")
        if champion is not None:
            share = 0.0 if challenger is None else record.share
            route = Route(champion, challenger, share)
            if route != versions.route:
                versions.route = route
                log.info(
                    "model_route_changed",
                    model=name,
                    champion=champion.version,
                    challenger=challenger and challenger.version,
                    share=share,
                )
        self._forget_others(name)
        for on_switch in self.on_switch:
            on_switch(versions)

    def _forget_others(self, name: str) -> None:
        """Unload the versions of a model that are not recorded."""
        self._versions[name].keep(map(bytes.fromhex, self._record(name).versions))

    def _failure(self, name: str) -> str | None:
        """Why this process does not answer as the record says; None if it does."""
        record, failed = self._records[name], self._failed.get(name, {})
        if (reason := failed.get(record.champion)) is not None:
            return f"the champion of model {name!r} is not loaded: {reason}"
        if record.share and (reason := failed.get(record.challenger or "")) is not None:
            return f"the canary of model {name!r} is not loaded: {reason}"
        return None

    def check(self) -> Check | None:
        """The readiness check; None while no model has a record."""
        if not self._records:
            return None
        reasons = [reason for name in self._records if (reason := self._failure(name)) is not None]
        return Check("versions", not reasons, "; ".join(reasons) or "loaded as recorded")

    # Use cases

    async def describe(self, caller: Caller, model: str) -> ModelStatus:
        """The versions of a model that the caller may see, and the processes that serve it."""
        caller.check((Verb.MODELS, *MANAGE), model)
        await self._read(math.inf)
        return ModelStatus(self._record(model), await self._processes(model))

    def find(self, model: str, version: str) -> ServedModel:
        """A loaded version, by its label or the first digits of its fingerprint.

        Raises:
            VersionNotFound
            VersionNotReady: this process has not loaded it.
        """
        fingerprint = self._record(model).find(version)
        served = self._versions[model].loaded.get(bytes.fromhex(fingerprint))
        if served is None:
            raise _not_loaded(model, fingerprint, self._process, self._failed.get(model, {}))
        return served

    async def load(self, caller: Caller, model: str, path: str, label: str | None) -> str:
        """Load a version from a folder of the models in this process, and let the others load it;
        returns its fingerprint.

        Raises:
            VersionRejected: it cannot serve the model.
        """
        caller.check(MANAGE, model)
        served = await self._load(model, path)
        fingerprint, source = served.fingerprint.hex(), VersionSource(self._path(served), label)
        try:
            with self._audited(caller, "model_version_loaded", model, version=served.version):
                await self._change(model, lambda record: record.add(fingerprint, source))
        finally:
            self._forget_others(model)
        return fingerprint

    async def change(
        self,
        caller: Caller,
        model: str,
        action: Action,
        version: str | None = None,
        share: float | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Give an alias to a version.

        Args:
            version: its label, or the first digits of its fingerprint; None for a rollback.
            share: of the streams that a canary answers.
            force: whether to let it answer streams that it would reject.

        Raises:
            VersionNotFound, InvalidInput
            VersionNotReady: a process has not loaded it, or it would reject streams of the
                champion. A rollback is not checked for these.
        """
        caller.check(MANAGE, model)
        processes = await self._processes(model)

        def change(record: ModelRecord) -> ModelRecord:
            named = None if version is None else record.find(version)
            changed = record.change(action, named, share)
            answering = [changed.champion, changed.challenger]
            for fingerprint in filter(None, answering):
                _check_loaded(model, fingerprint, processes)
            if action in ("canary", "promote") and changed != record and not force:
                self._check_continues(model, self.find(model, record.champion), named or "")
            return changed

        facts = {"version": version, "share": share, "force": force or None}
        given = {name: fact for name, fact in facts.items() if fact is not None}
        with self._audited(caller, "model_alias_changed", model, action=action, **given):
            await self._change(model, change)

    def _check_continues(self, model: str, champion: ServedModel, fingerprint: str) -> None:
        """Check that a version continues the streams of the champion.

        States that it computed in the shadow do not count: without a history, a stream whose last
        chunk it has not computed is rejected.

        Raises:
            VersionNotReady
        """
        served, settings = self.find(model, fingerprint), f"CARRY_ON_MODEL_CHANGE={self._policy}"
        if self._policy == "reset" or (self._policy == "rewarm" and champion.history is not None):
            return
        if self._policy == "keep":
            if served.shares_states(champion):
                return
            settings += ", but its states or its encoding of events are others"
        elif self._policy == "rewarm":
            settings += " without CARRY_HISTORY_EVENTS"
        error = VersionNotReady(
            f"version {served.version} would reject streams of version {champion.version} of model "
            f"{model!r} with state_incompatible: {settings}. Set CARRY_HISTORY_EVENTS with "
            "CARRY_ON_MODEL_CHANGE=rewarm, or CARRY_ON_MODEL_CHANGE=keep or reset; or change it "
            "with `force`",
            expected=served.version,
        )
        error.retryable = False
        raise error

    async def retire(self, caller: Caller, model: str, version: str) -> None:
        """Forget and unload a version.

        Raises:
            VersionNotFound
            InvalidInput: it is the champion.
        """
        caller.check(MANAGE, model)
        with self._audited(caller, "model_version_retired", model, version=version):
            await self._change(model, lambda record: record.retire(record.find(version)))

    async def _change(self, model: str, change: Callable[[ModelRecord], ModelRecord]) -> None:
        """Change the record of a model by compare-and-set, and follow it at once."""
        async with self._changing:
            while True:
                await self._read(math.inf)
                before = self._record(model)
                after = change(before)
                if after == before and model in self._records:
                    return
                version, encoded = self._records_version or b"", msgspec.json.encode(after)
                # if it fails, another process has changed a record since
                if await self._stored.write(version, model, encoded):
                    await self._read(math.inf)
                    return

    def _record(self, model: str) -> ModelRecord:
        """The record of a model; before its first change, the version that it was started with."""
        record = self._records.get(model)
        if record is not None:
            return record
        champion = self._versions[model].route.champion
        fingerprint = champion.fingerprint.hex()
        return ModelRecord(fingerprint, {fingerprint: VersionSource(self._path(champion))})

    def _path(self, served: ServedModel) -> str:
        return "" if self._load_version is None else self._load_version.path_of(served)

    async def _processes(self, model: str) -> list[ProcessReport]:
        """The reports of the processes that serve a model."""
        encoded = await self._report(always=True)
        reports = [msgspec.json.decode(each, type=ProcessReport) for each in encoded]
        return [report for report in reports if model in report.loaded]

    @contextmanager
    def _audited(self, caller: Caller, change: str, model: str, **facts: object) -> Iterator[None]:
        """Report a change that was made, or may have been made."""
        facts |= caller.audit_names()
        try:
            yield
        except CarryError as error:
            if error.needs_position:
                self._audit(change, model=model, **facts, outcome=error.code)
            raise
        self._audit(change, model=model, **facts)


def _check_loaded(model: str, fingerprint: str, processes: list[ProcessReport]) -> None:
    for report in processes:
        if fingerprint not in report.loaded[model]:
            raise _not_loaded(model, fingerprint, report.process, report.failed.get(model, {}))


def _not_loaded(
    model: str, fingerprint: str, process: str, failed: Mapping[str, str]
) -> VersionNotReady:
    reason = failed.get(fingerprint, "it is being loaded")
    return VersionNotReady(
        f"process {process} has not loaded version {version_of(fingerprint)} of model {model!r}: "
        f"{reason}",
        expected=version_of(fingerprint),
        process=process,
    )
