"""
Folders that belong to a living process.

A process that dies leaves its temporary files behind. Each such process owns one folder whose lock file
it holds; the lock ends with the process, however that ends, and whoever comes next sweeps the folder.
"""

import fcntl
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

_LOCK = ".lock"


class ProcessFolder:
    """A folder of this process alone, under *root*; ``close()`` removes it."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        # Made and locked under a hidden name, which the sweep leaves alone, and then renamed.
        hidden = root / f".{self.path.name}"
        hidden.mkdir(mode=0o700)
        self._lock = os.open(hidden / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        hidden.rename(self.path)

    def close(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep_dead_folders(root: Path) -> int:
    """Remove the folders under *root* whose process is gone; return how many there were."""
    removed = 0
    for folder in root.glob("[!.]*"):
        with suppress(OSError):  # held by a living process, or swept by somebody else
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed += 1
            finally:
                os.close(lock)
    return removed
