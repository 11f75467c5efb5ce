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
from worker.child import ANSWERED, INBOX, OUTBOX
from worker.leavings import ChildResult, copy_plain, read_result
from worker.sandbox import LAYERS, Jail, Layer, Stage

_MAX_LINE_BYTES = 4096
_LAST_WORDS_BYTES = 4096
_LAST_BREATH_SECONDS = 1.0
_STARTING = "starting"
_PHASES = frozenset({"load", "measure", "purify", "measure again", "save"})


class Child:
    """
    One fresh process for one job, in its jail.

    It may be started before there is a job: it then waits, with everything imported.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], jail: Jail, complaints: BinaryIO, outbox: int
    ) -> None:
        self._process = process
        self._home = jail.home
        self._complaints = complaints
        self._outbox = outbox
        self._answered = threading.Event()
        self.progress: dict[str, Any] = {**QUEUED_PROGRESS, "phase": _STARTING}
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    @classmethod
    def start(
        cls, folder: Path, stage: Stage, *, gpu: bool = False, layers: frozenset[Layer] = LAYERS
    ) -> "Child":
        """
        Start a child with a home of its own below *folder*, which goes when the child goes.

        ``-P`` keeps its working directory off the import path: whatever one job may write there must
        never be imported by the next one.

        Args:
            gpu: Whether its jail leaves a way to a GPU.
            layers: The walls of its jail, where the platform has them.
        """
        home = Path(tempfile.mkdtemp(prefix="child-", dir=folder)).resolve()
        for box in (INBOX, OUTBOX):
            (home / box).mkdir(mode=0o700)
        # Opened before anybody else can have put something else in its place.
        outbox = os.open(home / OUTBOX, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        jail = Jail(home=home, stage=stage, gpu=gpu, layers=layers)
        complaints = (home / "stderr").open("w+b")
        process = subprocess.Popen(
            [
                sys.executable,
                *("-P", "-s", "-m", "worker.child", str(os.getpid()), jail.to_json()),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            cwd=home,
            env=sandbox.child_environment(jail),
            start_new_session=True,
        )
        return cls(process, jail, complaints, outbox)

    @property
    def inbox(self) -> Path:
        """The folder for what the next order is about; only to be written to before it is given."""
        return self._home / INBOX

    def give(self, order: dict[str, Any]) -> None:
        """Hand an order over; a child that is already gone is noticed by ``wait``."""
        assert self._process.stdin is not None
        self._answered.clear()
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        if not self._reader.is_alive():
            self._answered.set()

    @property
    def has_begun(self) -> bool:
        """Whether it is at work; before its first order it says nothing."""
        return bool(self.progress["phase"] != _STARTING)

    def wait(self, seconds: float) -> bool:
        """Wait up to *seconds*; return whether the child has answered its order, or has ended."""
        return self._answered.wait(seconds)

    def take(self, name: str, target: Path, *, limit: int) -> None:
        """
        Copy the plain file *name* that the child left to the new file *target*.

        Raises:
            InternalError: It is larger than *limit*.
            OSError: It is missing, or no plain file.
        """
        copy_plain(name, target, limit=limit, folder=self._outbox)

    def result(self) -> ChildResult | None:
        """Return how the child answered, or ``None`` if that is no answer."""
        return read_result(self._outbox)

    def stop(self) -> None:
        """End the child now, if it has not ended by itself; what it left stays."""
        if not self._reader.is_alive():  # it has closed its pipe, so that it is about to end
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LAST_BREATH_SECONDS)
        self._process.kill()
        self._process.wait()
        self._reader.join()

    @property
    def last_words(self) -> str:
        """The end of what it wrote on standard error, for our log."""
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, size - _LAST_WORDS_BYTES))
        return self._complaints.read(_LAST_WORDS_BYTES).decode(errors="replace")

    def kill(self) -> None:
        """End the child, if it has not ended; remove its home and close its pipes."""
        self.stop()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        self._complaints.close()
        if self._outbox >= 0:
            os.close(self._outbox)
            self._outbox = -1
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
                if message == ANSWERED:
                    self._answered.set()
                    continue
                fraction = float(message["fraction"])
                if message["phase"] in _PHASES and math.isfinite(fraction):
                    self.progress = {
                        "phase": message["phase"],
                        "fraction": min(max(fraction, 0.0), 1.0),
                        "step": int(message["step"]),
                        "total": int(message["total"]),
                        "eta_seconds": None,
                    }
        self._answered.set()  # it has ended, or says nothing more
