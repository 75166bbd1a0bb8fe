"""The wheels of the current commit: their bytes, their metadata, their content."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.metadata import Metadata
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from tests.support.pages import ROOT

LIBRARY = "carry/models/detection/libdetection.so"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both wheels, by distribution."""
    return build(tmp_path_factory.mktemp("wheels"), umask=0o022, timezone="UTC")


def build(folder: Path, umask: int, timezone: str, target: str = "") -> dict[str, Path]:
    variables = {"TMPDIR": str(folder), "TZ": timezone, "VENV": sys.prefix, "WHEEL_TARGET": target}
    subprocess.run(
        [ROOT / "scripts/wheels", folder],
        env=os.environ | variables,
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


def test_the_service_is_a_wheel_of_this_platform_for_every_python(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    tags = parse_wheel_filename(wheels["carry"].name)[3]
    assert tags & set(sys_tags())
    assert {(each.interpreter, each.abi) for each in tags} == {("py3", "none")}
    with ZipFile(wheels["carry"]) as archive:
        compiled = r"(?s).*\.(c|h|o|a|so|pyd|dll|dylib|lib|pdb)"
        assert [each for each in archive.namelist() if re.fullmatch(compiled, each)] == [LIBRARY]
        assert ctypes.CDLL(archive.extract(LIBRARY, tmp_path))
        if sys.platform == "linux":
            needed = set(re.findall(rb"lib\w+\.so[.\d]*", archive.read(LIBRARY)))
            assert needed <= {b"libc.so.6", b"libm.so.6"}


@pytest.mark.parametrize(
    ("target", "platform", "start"),
    [
        ("linux-aarch64", "manylinux_2_28_aarch64", rb"\x7fELF.{14}\xb7\x00"),
        ("darwin-arm64", "macosx_13_0_arm64", rb"\xcf\xfa\xed\xfe\x0c\x00\x00\x01"),
    ],
)
def test_a_wheel_is_built_for_another_platform(
    tmp_path: Path, target: str, platform: str, start: bytes
) -> None:
    wheel = build(tmp_path, umask=0o022, timezone="UTC", target=target)["carry"]
    assert {str(each) for each in parse_wheel_filename(wheel.name)[3]} == {f"py3-none-{platform}"}
    library = ZipFile(wheel).read(LIBRARY)
    assert re.match(start, library, re.DOTALL)
    # the folder of the build would make the bytes differ
    assert str(tmp_path).encode() not in library
