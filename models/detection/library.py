"""The compiled library of detection, of the C files in this folder.

It is built when Carry is installed (`hatch_build.py`), and depends on the C library only. In a
checkout it has to be built from the sources beside it: those of another version may have other
structures and parts of the state.
"""

from __future__ import annotations

import ctypes
import zlib
from functools import cache
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from models.errors import LibraryError

_BYTES = ctypes.c_char * 0


@cache
def load_library(kind: type[ctypes.CDLL] = ctypes.PyDLL) -> ctypes.CDLL:
    """The library, whose calls keep the global interpreter lock.

    Args:
        kind: `ctypes.CDLL`, whose calls release it: short ones take longer then.

    Raises:
        LibraryError: it is missing, of other sources, or built for another platform.
    """
    path = Path(__file__).with_name("libdetection.so")
    try:
        library = kind(str(path))
    except OSError as error:
        raise LibraryError(
            f"expected the compiled library of detection at {path}: run scripts/setup in a "
            f"checkout, or install Carry again ({error})"
        ) from error
    files = sorted(path.parent.glob("*.[ch]"))
    checksum = zlib.crc32(b"".join(each.read_bytes() for each in files))
    # a wheel has no sources
    if files and checksum != _sources_of(library):
        raise LibraryError(
            f"the compiled library of detection at {path} is of other sources than those beside "
            "it: run scripts/setup"
        )
    return library


def _sources_of(library: ctypes.CDLL) -> int | None:
    try:
        return ctypes.c_uint32.in_dll(library, "sources").value
    except ValueError:
        return None


def address_of(array: NDArray[Any] | None) -> int | None:
    """The address of an array in C order, to pass as a pointer; None of None."""
    if array is None:
        return None
    if array.flags.writeable:  # twice as fast
        return ctypes.addressof(_BYTES.from_buffer(array))
    return int(array.__array_interface__["data"][0])
