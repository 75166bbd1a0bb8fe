"""The artifacts of the models' folder: those that a process starts with, and further versions.

A version is loaded beside those that answer, so its memory is estimated first: a process that runs
out of memory would end the streams of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

import structlog

from models.artifact.artifact import Artifact, load_artifact
from models.artifact.manifest import MANIFEST_NAME, read_manifest
from models.errors import ArtifactError
from service.engine.runtimes.loading import open_decoders, open_runtimes
from service.pipeline.served_model import ServedModel
from service.pipeline.settings import ModelSettings

T = TypeVar("T")

log = structlog.get_logger(__name__)

MEMORY_FACTOR: Final = 4
"""Memory of a loaded version, in sizes of its files: weights, graph, and the runtime's copies."""


class VersionFiles:
    """Loads versions of models from the models' folder (`model_aliases.VersionLoader`)."""

    def __init__(self, settings: ModelSettings):
        self._settings = settings
        self._folder = settings.models_dir

    def path_of(self, served: ServedModel) -> str:
        """The path of a version's artifact in the folder."""
        return str(served.artifact.path.relative_to(self._folder))

    def __call__(self, model: str, path: str) -> ServedModel:
        """Load the version of a model from a folder, and warm it up; takes seconds.

        Raises:
            ArtifactError: the path leads out of the folder, the artifact is damaged or of another
                model, or there is not enough memory.
            RuntimeUnavailableError: the runtime cannot run it.
        """
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise ArtifactError("expected a path inside the folder of the models")
        folder = self._folder / path
        if not folder.is_dir():
            raise ArtifactError(
                f"expected a folder inside that of the models ({self._folder}), such as "
                f"{model}/VERSION; there is none"
            )
        name = read_manifest(folder).get("name")
        if name != model:
            raise ArtifactError(f"expected an artifact of model {model!r}, got one of {name!r}")
        _check_memory(folder)
        rates = self._settings.alarm_rates()
        rates = {model: rates[model]} if model in rates else {}
        [served] = _open(self._settings, with_alarm_rates([load_artifact(folder)], rates))
        served.warm()
        return served


def _check_memory(folder: Path) -> None:
    needed = MEMORY_FACTOR * sum(each.stat().st_size for each in folder.iterdir() if each.is_file())
    available = available_bytes()
    if available is not None and needed > available:
        raise ArtifactError(
            f"expected {needed:,} bytes of free memory, by the size of its files, got {available:,}"
        )


def available_bytes(system: Path = Path("/")) -> int | None:
    """The memory that this process may still use; None if the system does not say.

    Args:
        system: the root of the files in which the kernel says it.
    """
    limits: list[int] = []
    try:
        text = (system / "proc/meminfo").read_text()
        fields = dict(line.split(":") for line in text.splitlines())
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
        group = system / "sys/fs/cgroup"
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # the kernel drops files from the cache before a process of the group runs out of memory
        limits.append(most - used + int(statistics["inactive_file"]))
    except (OSError, KeyError, ValueError):
        pass  # another system, or no limit
    return min(limits, default=None)


def open_models(settings: ModelSettings, only: str | None = None) -> list[ServedModel]:
    """Load the artifacts of the settings, or one of them, and open their runtimes, not yet warmed
    up.

    Raises:
        ArtifactError, RuntimeUnavailableError: as for `build_pipeline`.
    """
    rates = settings.alarm_rates()
    if only is not None:
        rates = {name: rate for name, rate in rates.items() if name == only}
    artifacts = load_models(settings.models_dir, only)
    if only is None:
        settings.check_history_models([artifact.spec.name for artifact in artifacts])
    return _open(settings, with_alarm_rates(artifacts, rates))


def _open(settings: ModelSettings, artifacts: list[Artifact]) -> list[ServedModel]:
    """Open the runtimes of artifacts."""
    runtimes = open_runtimes(settings.runtime, artifacts, settings.runtime_threads)
    decoders = open_decoders(runtimes, artifacts, settings.runtime_threads)
    return [
        ServedModel(artifact, runtime, decoder, settings.history_of(artifact.spec))
        for artifact, runtime, decoder in zip(artifacts, runtimes, decoders, strict=True)
    ]


def load_models(directory: Path, only: str | None = None) -> list[Artifact]:
    """The artifact of every model in a directory, or the one that the directory itself is.

    A model's folder holds its artifact, or folders of its versions, of which the last valid one by
    name is loaded.

    Args:
        only: name of the model to load; the manifests of the others are read, and nothing else.

    Raises:
        ArtifactError: there is none, one is rejected, each version of a model is, or two models
            have one name.
    """
    if (directory / MANIFEST_NAME).is_file():
        candidates = [[directory]]
    elif not directory.is_dir():
        raise ArtifactError(f"{directory}: expected a directory of model artifacts")
    else:
        candidates = [
            found for each in sorted(directory.iterdir()) if (found := _artifacts_of(each))
        ]
    if not candidates:
        raise ArtifactError(
            f"{directory}: expected a model artifact, or a directory of them, and found no "
            f"{MANIFEST_NAME}; `carry init` or `carry train` makes one"
        )
    if only is not None:
        names = [str(_first_valid(read_manifest, paths).get("name")) for paths in candidates]
        candidates = [paths for paths, name in zip(candidates, names, strict=True) if name == only]
        if not candidates:
            known = ", ".join(sorted(names))
            raise ArtifactError(f"model: expected one of {known}, got {only!r}")
    artifacts: dict[str, Artifact] = {}
    for paths in candidates:
        artifact = _first_valid(load_artifact, paths)
        if artifact.spec.name in artifacts:
            other = artifacts[artifact.spec.name].path
            raise ArtifactError(f"{artifact.path}: model {artifact.spec.name!r} is also in {other}")
        artifacts[artifact.spec.name] = artifact
    return list(artifacts.values())


def _first_valid(read: Callable[[Path], T], paths: Sequence[Path]) -> T:
    """What is read of the first folder that is valid.

    Raises:
        ArtifactError: none is; that of the first one.
    """
    errors: list[ArtifactError] = []
    for path in paths:
        try:
            return read(path)
        except ArtifactError as error:
            errors.append(error)
            if len(paths) > 1:
                log.error("version_skipped", path=str(path), reason=str(error))
    raise errors[0]


def with_alarm_rates(artifacts: list[Artifact], rates: Mapping[str, float]) -> list[Artifact]:
    """Apply the expected rates of false alarms, by model, to the artifacts.

    Raises:
        ArtifactError: there is no such model, or its alarms cannot have that rate.
    """
    names = [artifact.spec.name for artifact in artifacts]
    for name in rates:
        if name not in names:
            raise ArtifactError(
                f"CARRY_FALSE_ALARMS_PER_DAY: expected models among {names}, got {name!r}"
            )
    try:
        return [
            artifact.with_alarm_rate(rates[name]) if name in rates else artifact
            for name, artifact in zip(names, artifacts, strict=True)
        ]
    except ArtifactError as error:
        raise ArtifactError(f"CARRY_FALSE_ALARMS_PER_DAY: {error}") from error


def _artifacts_of(folder: Path) -> list[Path]:
    """The artifacts in a model's folder: itself, or its versions, the last by name first."""
    if (folder / MANIFEST_NAME).is_file():
        return [folder]
    return sorted((path.parent for path in folder.glob(f"*/{MANIFEST_NAME}")), reverse=True)
