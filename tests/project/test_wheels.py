"""The wheels of the current commit: their bytes, their metadata, their content."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata

from tests.support.pages import ROOT


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, by distribution."""
    return build(tmp_path_factory.mktemp("wheels"), umask=0o022, timezone="UTC")


def build(folder: Path, umask: int, timezone: str) -> dict[str, Path]:
    subprocess.run(
        [ROOT / "scripts/wheels", folder],
        env=os.environ | {"TZ": timezone, "VENV": sys.prefix},
        umask=umask,
        check=True,
    )
    return {path.name.partition("-")[0]: path for path in folder.iterdir() if path.is_file()}


def metadata_of(wheel: Path) -> Metadata:
    with ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


def test_two_builds_of_a_commit_have_the_same_bytes(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    others = build(tmp_path, umask=0o077, timezone="Asia/Tokyo")
    assert others.keys() == wheels.keys() == {"carry", "carry_client"}
    for name, wheel in wheels.items():
        assert wheel.read_bytes() == others[name].read_bytes(), name


def test_wheels_have_valid_metadata_and_need_each_other_in_the_same_version(
    wheels: dict[str, Path],
) -> None:
    service, client = (metadata_of(wheels[name]) for name in ("carry", "carry_client"))
    assert service.version == client.version
    assert f"carry-client=={client.version}" in map(str, service.requires_dist or [])
    for each in (service, client):
        assert each.description_content_type == "text/markdown"
        assert each.license_expression == "Apache-2.0"


def test_a_wheel_occupies_one_name_and_has_what_is_served(wheels: dict[str, Path]) -> None:
    names = {name: ZipFile(wheel).namelist() for name, wheel in wheels.items()}
    for name, found in names.items():
        folders = {each.partition("/")[0] for each in found}
        assert {each for each in folders if not each.endswith(".dist-info")} == {name}
    for needed in (
        r"carry/models/pretrained/flights/graph\.onnx",
        r"carry/service/store/redis/lua/.*\.lua",
        r"carry/service/console/assets/.*\.js",
    ):
        assert any(re.fullmatch(needed, each) for each in names["carry"]), needed
    assert not any("console/web" in each for each in names["carry"])
