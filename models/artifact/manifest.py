"""Manifest of an artifact, and verification of the files that it lists.

The manifest is JSON. It lists every file with size and SHA-256, and its `checksum` is the
SHA-256 of its other members in canonical form. The other members are interpreted by
`models.artifact.artifact`.

Reading rejects a manifest of another format or with a wrong checksum, and a listed
file that is missing, changed, outside the directory or not a regular file, or larger than the
limits below. Each file is opened once, so that the bytes that were verified are the ones returned.
Unlisted files are not opened. Links are followed inside the directory, which may be a link itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.artifact.files import inside, open_regular
from models.artifact.fingerprint import canonical_json
from models.errors import ArtifactError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
MAX_ARTIFACT_BYTES = 4 * 2**30
"""Largest manifest, and most bytes of all files that it lists."""

_PIECE_BYTES = 2**20


def add_checksum(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Add the checksum to a manifest, and convert it to plain data.

    Raises:
        ArtifactError: it contains data that is not finite JSON.
    """
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    try:
        # JSON has lists instead of tuples and strings as keys: convert to what reading returns.
        plain: dict[str, Any] = json.loads(canonical_json({**rest, "checksum": _checksum(rest)}))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where}: expected metrics and training to be finite JSON data, got {error}"
        ) from error
    return plain


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Encode a manifest as the content of its file."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def file_entry(data: bytes) -> dict[str, Any]:
    """The entry of a file in `files`, from its content."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest and check its format and checksum, and nothing else.

    Raises:
        ArtifactError: naming the file and the reason.
    """
    if not path.is_dir():
        raise ArtifactError(f"{path}: expected a directory with {MANIFEST_NAME}")
    file = path / MANIFEST_NAME
    try:
        with open_regular(file, path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MAX_MANIFEST_BYTES:
                raise ArtifactError(
                    f"{file}: expected at most {MAX_MANIFEST_BYTES} bytes, got {size}"
                )
            manifest = json.loads(stream.read(size))
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


def read_files(path: Path, manifest: Mapping[str, Any], keys: Sequence[str]) -> list[bytes]:
    """Verify every file that a directory's manifest lists.

    Args:
        keys: members of the manifest that name the files to return; these must be listed.

    Returns:
        The contents of those files.

    Raises:
        ArtifactError: naming the file and the reason.
    """
    where = path / MANIFEST_NAME
    listed = manifest.get("files")
    if not isinstance(listed, dict):
        raise ArtifactError(f"{where}: expected `files`, an object")
    wanted = [manifest.get(key) for key in keys]
    for key, name in zip(keys, wanted, strict=True):
        if not isinstance(name, str) or name not in listed:
            raise ArtifactError(f"{where}: expected `{key}` to name one of its files, got {name!r}")
    sizes: dict[str, int] = {}
    for name, entry in listed.items():
        if not inside(name):
            raise ArtifactError(f"{where}: expected file names inside the artifact, got {name!r}")
        size = entry.get("size_bytes") if isinstance(entry, dict) else None
        if not isinstance(size, int) or size < 0:
            raise ArtifactError(
                f"{where}: expected `files.{name}` to be an object with `size_bytes` and `sha256`"
            )
        sizes[name] = size
    if sum(sizes.values()) > MAX_ARTIFACT_BYTES:
        raise ArtifactError(
            f"{where}: expected files of at most {MAX_ARTIFACT_BYTES} bytes in all, "
            f"got {sum(sizes.values())}"
        )
    contents = {
        name: _read_listed(path, name, size, listed[name].get("sha256"), keep=name in wanted)
        for name, size in sizes.items()
    }
    return [contents[name] for name in wanted if name is not None]


def _read_listed(path: Path, name: str, size: int, sha256: Any, *, keep: bool) -> bytes:
    """Read and verify one file; returns its content if `keep`, else b""."""
    file = path / name
    digest, kept = hashlib.sha256(), []
    try:
        with open_regular(file, path) as stream:
            got = os.fstat(stream.fileno()).st_size
            if got != size:
                raise ArtifactError(f"{file}: expected {size} bytes, got {got}")
            while size > 0 and (piece := stream.read(min(size, _PIECE_BYTES))):
                size -= len(piece)
                digest.update(piece)
                if keep:
                    kept.append(piece)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
    if digest.hexdigest() != sha256:
        raise ArtifactError(f"{file}: changed since it was written (SHA-256 differs)")
    return b"".join(kept)


def _checksum(manifest: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()
