"""The units of systemd: systemd accepts them, and a consumer is confined as the service is."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.pages import ROOT

UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
PROGRAM = "/opt/carry/bin/carry"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    file = tmp_path / unit.name.replace("@", "@departures")
    file.write_text(unit.read_text().replace(PROGRAM, "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if file.name in line]
    assert (done.returncode, lines) == (0, [])


def test_a_consumer_is_confined_as_the_service_is() -> None:
    confinements = []
    for unit in UNITS:
        lines = (
            unit.read_text().partition("DynamicUser=yes\n")[2].partition("\n\n[")[0].splitlines()
        )
        confinements.append({line for line in lines if not line.startswith("StateDirectory")})
    first, second = confinements
    assert first == second
    assert "NoNewPrivileges=yes" in first
