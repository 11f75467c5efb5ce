"""
The files that a job's process needs beside its own folder.

Named one by one: whatever is not here cannot be read. In particular not the folder that holds jobs, nor
the data folder, nor other processes' corners of ``/proc``.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from worker.jail.landlock import DEVICE, READ, WORK, Access

_PACKAGES = ("common", "worker")
_PROJECT = Path(__file__).resolve().parents[2]

_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_SYSTEM = (
    # What torch, its libraries and the C library look up: processors, memory, the time zone.
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/version",
    "/proc/filesystems",
    "/proc/sys/vm",
    "/proc/sys/kernel/osrelease",
    "/sys/devices/system",
    "/sys/kernel/mm/transparent_hugepage",
    "/etc/localtime",
    "/usr/share/zoneinfo",
)
_PLAIN_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_GPU_FILES = (
    "/proc/driver/nvidia",
    "/proc/driver/nvidia-uvm",
    "/proc/devices",
    "/proc/modules",
    "/sys/bus/pci",
    "/sys/class/drm",
    "/sys/devices",
    "/sys/module",
    "/usr/local/cuda",
    "/usr/local/nvidia",
    "/usr/share/nvidia",
    "/etc/nvidia",
)
_GPU_DEVICES = ("nvidia*", "nvidia-caps/*")


def has_gpu() -> bool:
    """Return whether this machine shows an NVIDIA GPU's devices."""
    return Path("/dev/nvidiactl").exists()


def rules(home: Path, *, gpu: bool) -> Iterator[tuple[Path, Access]]:
    """Return what a job's process with the folder *home* may touch."""
    yield home, WORK
    # Its own corner of /proc: threads read their stacks' bounds and their names there.
    yield Path("/proc/self"), READ | Access.WRITE_FILE
    for name in _PLAIN_DEVICES:
        yield Path(name), DEVICE
    for path in (*map(Path, (*_LIBRARIES, *_SYSTEM)), *_import_path(home), *_loader_path(home)):
        yield path, READ
    if gpu:
        for name in _GPU_FILES:
            yield Path(name), READ
        for pattern in _GPU_DEVICES:
            for device in Path("/dev").glob(pattern):
                yield device, DEVICE


def _import_path(home: Path) -> Iterator[Path]:
    """Return the folders that Python imports from, the project's own cut down to what a job uses."""
    for name in ("stdlib", "platstdlib", "purelib", "platlib"):
        yield Path(sysconfig.get_path(name))
    yield Path(sys.prefix) / "pyvenv.cfg"
    yield Path(sys.base_prefix) / "lib"
    for entry in filter(None, sys.path):
        path = Path(entry).resolve()
        if path == _PROJECT:
            # It may hold the data folder.
            yield from (path / name for name in _PACKAGES)
        elif not home.is_relative_to(path):
            yield path


def _loader_path(home: Path) -> Iterator[Path]:
    for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if entry and not home.is_relative_to(Path(entry).resolve()):
            yield Path(entry)
