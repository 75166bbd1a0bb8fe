"""The manifest of a model on disk, and the files that it lists.

The manifest is JSON. It lists every file with size and SHA-256, and its own `checksum` is the
SHA-256 of the rest of it in canonical form. What the manifest means is for `models.artifact`.

Reading refuses a manifest of another format, or one that does not have its checksum, and a listed
file that is missing, changed or outside the directory. Files that are not listed are not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import ArtifactError
from models.files import inside
from models.fingerprint import canonical_json

FORMAT = 1
MANIFEST_NAME = "manifest.json"


def sealed(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The manifest with its checksum, as plain data.

    Raises:
        ArtifactError: it holds what is not plain, finite JSON data.
    """
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    try:
        # What is read back has lists for tuples and text for every key; it must be the same.
        plain: dict[str, Any] = json.loads(canonical_json({**rest, "checksum": _checksum(rest)}))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}: expected metrics and training to be plain, finite JSON data, got {error}"
        ) from error
    return plain


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The file's content."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def file_entry(data: bytes) -> dict[str, Any]:
    """What `files` says of a file of that content."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a directory, whole and of this format; nothing more is checked.

    Raises:
        ArtifactError: naming the file and the reason.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: expected a directory with {MANIFEST_NAME}")
    file = path / MANIFEST_NAME
    try:
        manifest = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: expected JSON, got {error}") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{file}: expected a JSON object, got {type(manifest).__name__}")
    form = manifest.get("format")
    if form != FORMAT or isinstance(form, bool):
        raise ArtifactError(f"{file}: expected artifact format {FORMAT}, got {form!r}")
    try:
        expected = _checksum(manifest)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: expected finite numbers, got {error}") from error
    if manifest.get("checksum") != expected:
        raise ArtifactError(
            f"{file}: changed since it was written: its checksum is "
            f"{manifest.get('checksum')!r}, its content gives {expected!r}"
        )
    return manifest


def read_files(path: Path, manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """Every file that a directory's manifest lists, as it was written, by name.

    Raises:
        ArtifactError: naming the file and the reason.
    """
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise ArtifactError(f"{path / MANIFEST_NAME}: expected `files`, an object")
    contents: dict[str, bytes] = {}
    for name, entry in listed.items():
        file = path / name
        if not inside(name) or not file.resolve().is_relative_to(path.resolve()):
            raise ArtifactError(
                f"{path / MANIFEST_NAME}: expected file names inside the artifact, got {name!r}"
            )
        if not isinstance(entry, dict):
            raise ArtifactError(f"{path / MANIFEST_NAME}: expected `files.{name}` to be an object")
        try:
            data = file.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
        if len(data) != entry.get("size_bytes"):
            raise ArtifactError(
                f"{file}: expected {entry.get('size_bytes')} bytes, got {len(data)}"
            )
        if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
            raise ArtifactError(f"{file}: changed since it was written (SHA-256 differs)")
        contents[name] = data
    return contents


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()
