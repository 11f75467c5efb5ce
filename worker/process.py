"""A child process as the supervisor sees it: start it, give it a job, watch it, end it."""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from common.jobs import QUEUED_PROGRESS
from worker import sandbox

_MAX_LINE_BYTES = 4096
_LAST_WORDS_BYTES = 4096
_PHASES = frozenset({"load", "measure", "purify", "measure again", "save"})


class Child:
    """
    One fresh process for one job.

    It may be started before there is a job: it then waits, with everything imported.
    """

    def __init__(self, process: subprocess.Popen[bytes], home: Path, complaints: BinaryIO) -> None:
        self._process = process
        self._home = home
        self._complaints = complaints
        self.progress: dict[str, Any] = {**QUEUED_PROGRESS, "phase": "starting"}
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    @classmethod
    def start(cls, folder: Path) -> "Child":
        """
        Start a child with a home of its own below *folder*, which goes when the child goes.

        ``-P`` keeps its working directory off the import path: whatever one job may write there must
        never be imported by the next one.
        """
        home = Path(tempfile.mkdtemp(prefix="child-", dir=folder))
        complaints = (home / "stderr").open("w+b")
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-m", "worker.child", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            cwd=home,
            env=sandbox.child_environment(home),
            start_new_session=True,
        )
        return cls(process, home, complaints)

    def give(self, order: dict[str, Any]) -> None:
        """Hand the job over; a child that is already gone is noticed by ``wait``."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Wait up to *seconds*; return whether the child has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def last_words(self) -> str:
        """The end of what it wrote on standard error, for our log."""
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, size - _LAST_WORDS_BYTES))
        return self._complaints.read(_LAST_WORDS_BYTES).decode(errors="replace")

    def kill(self) -> None:
        """End the child now, if it has not ended; remove its home and close its pipes."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._complaints.close()
        shutil.rmtree(self._home, ignore_errors=True)

    @property
    def is_alive(self) -> bool:
        """Whether the child is running."""
        return self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The exit status, negative for a signal; ``None`` while it runs."""
        return self._process.poll()

    def _read(self, pipe: IO[bytes]) -> None:
        """Keep the newest progress; whatever does not look like progress is passed over."""
        while line := pipe.readline(_MAX_LINE_BYTES):
            with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                message = json.loads(line)
                fraction = float(message["fraction"])
                if message["phase"] in _PHASES and math.isfinite(fraction):
                    self.progress = {
                        "phase": message["phase"],
                        "fraction": min(max(fraction, 0.0), 1.0),
                        "step": int(message["step"]),
                        "total": int(message["total"]),
                        "eta_seconds": None,
                    }
