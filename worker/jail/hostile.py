"""
A prisoner of our own: it tries what a hostile upload would, in the very jail of a job's process.

It says of each attempt whether it got through, one JSON line each, and is started once per stage before
a worker takes its first job. An attempt that gets through does no harm. The last one is exec, which would
leave nobody to say more.
"""

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from worker import sandbox
from worker.jail import seccomp
from worker.sandbox import Jail, Stage

LAST = "exec"
_FORKS = 8
_LIMIT_BYTES = 1 << 20
_TOO_MUCH_BYTES = 8 << 30
_PTRACE_SEIZE = 0x4206
_NEW_USER = 0x10000000
_UNTRIED = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS})
"""What a call says whose arguments the kernel never looked at, or may not be trusted to."""


@dataclass(frozen=True, kw_only=True)
class Bait:
    """What lies about for the prisoner."""

    keeper: int  # the process of the worker
    port: int  # where it listens on loopback
    secret: str  # a file of another job's
    outside: str  # a folder beside its own

    def to_json(self) -> str:
        """Return the bait as an argument of a command line."""
        return json.dumps(asdict(self))


Probe = Callable[[Bait], bool]


def _environment(_bait: Bait) -> bool:
    return any(name.startswith("WEIGHTWASH_") for name in os.environ)


def _descriptors(_bait: Bait) -> bool:
    found = 0
    for number in range(3, 256):
        with suppress(OSError):
            os.fstat(number)
            found += 1
    return found > 0


def _core(_bait: Bait) -> bool:
    return resource.getrlimit(resource.RLIMIT_CORE) != (0, 0)


def _large_file(_bait: Bait) -> bool:
    with Path("large").open("wb", buffering=0) as file:
        file.seek(2 * _LIMIT_BYTES)
        return file.write(b"x") == 1


def _many_files(_bait: Bait) -> bool:
    opened: list[int] = []
    try:
        opened.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(2048))
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return True


def _memory(_bait: Bait) -> bool:
    mmap.mmap(-1, _TOO_MUCH_BYTES).close()
    return True


def _read_secret(bait: Bait) -> bool:
    return bool(Path(bait.secret).read_bytes())


def _write_outside(bait: Bait) -> bool:
    Path(bait.outside, "canary").write_text("was here")
    return True


def _read_environment_of_worker(bait: Bait) -> bool:
    return bool(Path(f"/proc/{bait.keeper}/environ").read_bytes())


def _read_memory_of_worker(bait: Bait) -> bool:
    with Path(f"/proc/{bait.keeper}/mem").open("rb"):
        return True


def _connect(bait: Bait) -> bool:
    with socket.create_connection(("127.0.0.1", bait.port), timeout=5):
        return True


def _signal(bait: Bait) -> bool:
    os.kill(bait.keeper, 0)
    return True


def _socket(family: int) -> Probe:
    def probe(_bait: Bait) -> bool:
        socket.socket(family, socket.SOCK_STREAM).close()
        return True

    return probe


def _pair(_bait: Bait) -> bool:
    for end in socket.socketpair():
        end.close()
    return True


def _fork(_bait: Bait) -> bool:
    for _ in range(_FORKS):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
    return True


def _change_mode(bait: Bait) -> bool:
    Path(bait.secret).chmod(0o600)
    return True


def _call(name: str, *arguments: object) -> Probe:
    """Return a probe that makes a system call which the kernel itself finds wrong, or harmless."""

    def probe(_bait: Bait) -> bool:
        number = seccomp.call_number(name)
        if number is None:  # without the library there is no such wall either
            return True
        libc = ctypes.CDLL(None, use_errno=True)
        # A plain int fills half of what the kernel reads, and chance the rest.
        whole = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
        result = int(libc.syscall(number, *whole))
        return result >= 0 or ctypes.get_errno() not in _UNTRIED

    return probe


def _attach(bait: Bait) -> bool:
    return _call("ptrace", _PTRACE_SEIZE, bait.keeper, None, None)(bait)


class _Piece(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _read_across(bait: Bait) -> bool:
    room = ctypes.create_string_buffer(1)
    # Nothing is mapped at the address 1; the kernel finds out after it has let this process in.
    here, there = _Piece(ctypes.addressof(room), 1), _Piece(1, 1)
    pieces = ctypes.byref(here), 1, ctypes.byref(there), 1, 0
    return _call("process_vm_readv", bait.keeper, *pieces)(bait)


PROBES: Mapping[str, Probe] = {
    "environment": _environment,
    "descriptors": _descriptors,
    "core-dump": _core,
    "large-file": _large_file,
    "many-files": _many_files,
    "memory": _memory,
    "read-other-job": _read_secret,
    "write-outside": _write_outside,
    "worker-environment": _read_environment_of_worker,
    "worker-memory": _read_memory_of_worker,
    "connect": _connect,
    "signal": _signal,
    "socket-inet": _socket(socket.AF_INET),
    "socket-unix": _socket(socket.AF_UNIX),
    "socket-pair": _pair,
    "fork": _fork,
    "change-mode": _change_mode,
    "ptrace": _attach,
    "read-across": _read_across,
    "namespace": _call("unshare", _NEW_USER),
    "mount": _call("mount", None, None, None, 0, None),
    "bpf": _call("bpf", -1, None, 0),
    "io-uring": _call("io_uring_setup", 0, None),
    "keyring": _call("keyctl", -1, 0, 0, 0, 0),
    "userfaultfd": _call("userfaultfd", -1),
    "perf-event": _call("perf_event_open", None, 0, -1, -1, 0),
    "kernel-module": _call("init_module", None, 0, None),
    "kexec": _call("kexec_load", -1, -1, None, -1),
}


def attempt(probe: Probe, bait: Bait) -> bool:
    """Return whether *probe* gets through."""
    try:
        return probe(bait)
    except (OSError, MemoryError, OverflowError, ValueError):
        return False


def say(name: str, *, through: bool) -> str:
    """Return what is said of an attempt."""
    return json.dumps({"probe": name, "through": through})


def main(parent: int, jail: Jail, bait: Bait) -> None:
    """Enter the jail and try everything."""
    sandbox.enter(parent, jail)
    sandbox.limit(jail, file_bytes=_LIMIT_BYTES, memory_bytes=0, cpu_seconds=60)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, probe in PROBES.items():
        if name == "memory" and jail.stage is not Stage.CONVERT:
            continue  # this stage promises none
        print(say(name, through=attempt(probe, bait)), flush=True)  # noqa: T201 - how it answers
    script = f"print({say(LAST, through=True)!r})"
    with suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", script])  # noqa: S606 - to be stopped
    print(say(LAST, through=False), flush=True)  # noqa: T201 - how it answers


if __name__ == "__main__":
    main(int(sys.argv[1]), Jail.from_json(sys.argv[2]), Bait(**json.loads(sys.argv[3])))
