"""
What keeps a job's process in its place.

A child gets an environment of a few named variables, a home of its own that is on no import path, no
descriptors but its pipes and its error file, no core dumps, and dies with its parent. It does not cover
the network, the file system or system calls.
"""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1

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


def child_environment(folder: Path) -> dict[str, str]:
    """Return the whole environment of a child that works in *folder*."""
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {
        **kept,
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        # cuBLAS is deterministic only with a workspace of a fixed size.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def die_with_parent(parent: int, sig: signal.Signals = signal.SIGKILL) -> None:
    """
    Make the kernel send *sig* to this process when its parent ends.

    The parent may have ended before this call; then there is nobody to wait for.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sig), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def enter(parent: int) -> None:
    """Confine this process before it reads anything that a client sent."""
    die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
