"""Resource limits: what a job's process may take, counted by the kernel."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

CONVERT_SECONDS = 60.0
"""What the conversion of uploaded files may take, by the clock."""

_FREE_BYTES = 1 << 30
"""What Python, torch's threads and their stacks may map beyond what the files need."""
_OPEN_FILES = 256
_OPEN_FILES_GPU = 1024


def leave_no_core() -> None:
    """Allow no core dump: it would hold what a client sent."""
    _lower(resource.RLIMIT_CORE, 0)


def limit_from_the_start(*, gpu: bool) -> None:
    """Allow no message queue, and no more open files than a job needs."""
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES_GPU if gpu else _OPEN_FILES)
    if sys.platform.startswith("linux"):
        _lower(resource.RLIMIT_MSGQUEUE, 0)


def limit_for_order(*, file_bytes: int, cpu_seconds: int, memory_bytes: int | None) -> None:
    """
    Set what depends on the job, before any of its bytes is read.

    Args:
        file_bytes: The largest file that may be written.
        cpu_seconds: A backstop to the supervisor's clock, over all threads.
        memory_bytes: Address space beyond what is mapped now, or ``None`` for no cap: a GPU's driver
            maps more than any machine has.
    """
    _lower(resource.RLIMIT_FSIZE, file_bytes)
    _lower(resource.RLIMIT_CPU, cpu_seconds)
    if memory_bytes is not None and has_memory_cap():
        _lower(resource.RLIMIT_AS, _mapped_bytes() + _FREE_BYTES + memory_bytes)


def has_memory_cap() -> bool:
    """Return whether the platform heeds a cap on address space."""
    return sys.platform.startswith("linux")


def _lower(which: int, wanted: int) -> None:
    """Set soft and hard limit; one that is lower already stays."""
    _, hard = resource.getrlimit(which)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(ValueError):  # a platform that knows the limit and takes no number for it
        resource.setrlimit(which, (limit, limit))


def _mapped_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
