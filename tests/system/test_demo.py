"""`carry serve --demo` in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.forks import COMMAND


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_printed_request_continues_a_stream_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "empty").mkdir()
    with subprocess.Popen(
        [COMMAND, "serve", "--demo", "--port", "0"],
        cwd=tmp_path / "empty",
        env=os.environ | {"TMPDIR": str(tmp_path / "temporary"), "CARRY_MODELS_DIR": "other"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as service:
        try:
            assert service.stdout is not None
            request = service.stdout.readline()
            for position in (1, 2):
                reply = json.loads(subprocess.check_output(["sh", "-c", request]))
                assert (reply["model"], reply["position"]) == ("flights", position)
        finally:
            service.terminate()
    assert service.returncode == 0
    assert not [*(tmp_path / "empty").iterdir(), *(tmp_path / "temporary").iterdir()]
