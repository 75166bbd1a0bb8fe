"""Compiles the C files of `models/detection` into the library of a wheel, with ziglang's compiler.

The library uses no header and no symbol of Python, so that one wheel fits every Python of its
platform. An editable install has the library beside its source. Target and CPU are fixed, so that
no byte depends on the machine that builds. `WHEEL_TARGET` builds the wheel of another key of
`TARGETS`. Zig's cache is temporary unless `ZIG_GLOBAL_CACHE_DIR` names a folder.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import zlib
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "models/detection/libdetection.so"
TARGETS = {
    "linux-x86_64": ("x86_64-linux-gnu.2.28", "manylinux_2_28_x86_64"),
    "linux-aarch64": ("aarch64-linux-gnu.2.28", "manylinux_2_28_aarch64"),
    "darwin-arm64": ("aarch64-macos.13.0", "macosx_13_0_arm64"),
    "darwin-x86_64": ("x86_64-macos.13.0", "macosx_13_0_x86_64"),
}
"""Target of the compiler and platform tag of the wheel, by platform and machine of Python."""
FLAGS = (
    *("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-mcpu=baseline", "-shared"),
    *("-fPIC", "-s", "-Wall", "-Wextra", "-Wvla", "-Werror"),
)


class LibraryBuildHook(BuildHookInterface[Any]):
    """Adds the library to a wheel, or writes it into the checkout of an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library.

        Raises:
            RuntimeError: no compiler is installed, or the platform is unknown.
            CalledProcessError: the compilation failed.
        """
        target = f"{sys.platform}-{platform.machine()}"
        if version == "standard":
            target = os.environ.get("WHEEL_TARGET") or target
        if target not in TARGETS:
            raise RuntimeError(f"expected a platform of {', '.join(TARGETS)}, got {target}")
        if importlib.util.find_spec("ziglang") is None:
            raise RuntimeError("the package ziglang, which has the C compiler, is not installed")
        triple, tag = TARGETS[target]
        library = Path(self.root, LIBRARY)
        parent = None
        if version == "editable":
            # on the file system of the checkout: several environments may install it at once
            (parent := Path(self.root, "build")).mkdir(exist_ok=True)
        self.folder = TemporaryDirectory(dir=parent)
        folder = self.folder.name
        # a relative output: a library of macOS contains its path
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, *FLAGS]
        files = sorted(library.parent.glob("*.[ch]"))
        checksum = zlib.crc32(b"".join(each.read_bytes() for each in files))
        files = [each for each in files if each.suffix == ".c"]
        subprocess.run(  # noqa: S603
            [*command, f"-DSOURCES={checksum}u", *files, "-lm", "-o", library.name],
            cwd=folder,
            env={"ZIG_GLOBAL_CACHE_DIR": folder} | os.environ | {"ZIG_LOCAL_CACHE_DIR": folder},
            check=True,
        )
        compiled = Path(folder, library.name)
        if version == "editable":
            compiled.replace(library)
        else:
            build_data["force_include"][str(compiled)] = f"carry/{LIBRARY}"
            build_data |= {"pure_python": False, "tag": f"py3-none-{tag}"}

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the temporary folder once the wheel is written."""
        self.folder.cleanup()
