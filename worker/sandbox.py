"""
What keeps a job's process in its place.

A child gets an environment of a few named variables, a home of its own that is on no import path, no
descriptors but its pipes and its error file, and dies with its parent. Then the layers of ``worker/jail``
close around it, before it reads a byte that a client sent. What no layer covers: a GPU's driver, which
takes what the process gives it, and the processor itself.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from worker.jail import landlock, limits, paths, seccomp

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

_PASSED_ON = (
    "CUDA_VISIBLE_DEVICES",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PATH",
    "TZ",
)
"""What torch and the loader read. Not passed on: addresses and passwords of database and broker."""


class Layer(StrEnum):
    """A wall of the jail."""

    PROCESS = "process"  # exec, the environment, the descriptors; always there
    LIMITS = "limits"  # files, open files, processor time, no core dump
    MEMORY = "memory"  # a cap on address space, in the stage that parses
    LANDLOCK = "landlock"  # files, TCP, signals
    SECCOMP = "seccomp"  # system calls


LAYERS = frozenset(Layer)


class Stage(StrEnum):
    """What a child is for, which decides what its jail lets through."""

    CONVERT = "convert"  # parses what a client sent, on the CPU
    PURIFY = "purify"  # computes on what the conversion left, on the worker's device


@dataclass(frozen=True, kw_only=True)
class Jail:
    """
    The jail of one child.

    Attributes:
        home: The one folder in which it may write.
        gpu: Whether it may reach a GPU.
        layers: What is to be put up; a worker always asks for all of them.
    """

    home: Path
    stage: Stage
    gpu: bool
    layers: frozenset[Layer] = LAYERS

    def to_json(self) -> str:
        """Return the jail as an argument of a command line."""
        return json.dumps(
            {
                "home": str(self.home),
                "stage": self.stage,
                "gpu": self.gpu,
                "layers": sorted(self.layers),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what ``to_json`` wrote."""
        found = json.loads(text)
        return cls(
            home=Path(found["home"]),
            stage=Stage(found["stage"]),
            gpu=bool(found["gpu"]),
            layers=frozenset(map(Layer, found["layers"])),
        )

    @property
    def has_memory_cap(self) -> bool:
        """Whether address space is capped; a GPU's driver and torch's own pool map too much for that."""
        return self.stage is Stage.CONVERT and Layer.MEMORY in self.layers


def scrubbed_environment(folder: Path) -> dict[str, str]:
    """Return the whole environment of a process of ours that works in *folder*."""
    return {
        **{name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        # cuBLAS is deterministic only with a workspace of a fixed size.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def child_environment(jail: Jail) -> dict[str, str]:
    """Return the whole environment of a job's process."""
    found = scrubbed_environment(jail.home)
    if not jail.gpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    if jail.stage is Stage.CONVERT:
        # Each thread may map tens of megabytes for itself, which a cap on memory would have to allow.
        found["OMP_NUM_THREADS"] = "1"
    return found


def die_with_parent(parent: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """
    Make the kernel send *sig* to this process when its parent ends, where it has a way to.

    The parent may have ended before this call; then there is nobody to wait for.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def missing() -> Mapping[Layer, str]:
    """Return the layers that this platform lacks, and why."""
    found = {}
    if not limits.has_memory_cap():
        found[Layer.MEMORY] = "not Linux"
    if landlock.abi() == 0:
        found[Layer.LANDLOCK] = "not in this kernel, or turned off"
    if (why := seccomp.missing()) is not None:
        found[Layer.SECCOMP] = why
    return found


def settle(parent: int) -> None:
    """Tie this process to its parent, and keep what it writes and what is left of it to itself."""
    die_with_parent(parent)
    os.umask(0o077)
    limits.leave_no_core()


def enter(parent: int, jail: Jail) -> None:
    """
    Confine this process before it reads anything that a client sent, and before it has threads.

    What the platform lacks is left out: whether jobs may run without it, the worker has decided.

    Raises:
        OSError: A layer that the platform has cannot be put up.
    """
    settle(parent)
    absent = missing()
    wanted = jail.layers - absent.keys()
    if Layer.LIMITS in wanted:
        limits.limit_from_the_start(gpu=jail.gpu)
    if wanted & {Layer.LANDLOCK, Layer.SECCOMP}:
        _gain_no_rights()
    if Layer.LANDLOCK in wanted:
        landlock.restrict(paths.rules(jail.home, gpu=jail.gpu))
    if Layer.SECCOMP in wanted:
        seccomp.restrict(may_map_files=jail.gpu)


def limit(jail: Jail, *, file_bytes: int, memory_bytes: int, cpu_seconds: int) -> None:
    """Set the limits that depend on the job: the largest file, the memory and the processor time."""
    if Layer.LIMITS in jail.layers:
        limits.limit_for_order(
            file_bytes=file_bytes,
            cpu_seconds=cpu_seconds,
            memory_bytes=memory_bytes if jail.has_memory_cap else None,
        )


def _gain_no_rights() -> None:
    """Give up what a set-user-id program would add; without it neither wall below can be put up."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
