"""What the service does beside answering: sweep, and keep its embedded worker alive."""

import os
import subprocess
import sys
import threading
import time

import structlog

from common.settings import Settings
from common.sweeper import Sweeper

_LOOK_SECONDS = 0.5
_RESTART_SECONDS = 1.0
_KILL_SECONDS = 5.0

log = structlog.get_logger(__name__)


class Housekeeper:
    """
    A thread that sweeps and, in embedded mode, owns the worker process.

    The kernel ends the worker with the *thread* that started it, so it is one thread that starts it,
    watches it and outlives it.
    """

    def __init__(self, sweeper: Sweeper, settings: Settings) -> None:
        self._sweeper = sweeper
        self._settings = settings
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="housekeeper")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the worker in good order and wait for the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        worker: subprocess.Popen[bytes] | None = None
        start_at = time.monotonic()
        while not self._stopped.is_set():
            if self._settings.embedded_workers:
                if worker is not None and worker.poll() is not None:
                    log.error("worker-died", exit_status=worker.returncode)
                    worker = None
                    start_at = time.monotonic() + _RESTART_SECONDS
                if worker is None and time.monotonic() >= start_at:
                    worker = self._start_worker()
            self._sweeper.sweep_if_due()
            self._stopped.wait(_LOOK_SECONDS)
        if worker is not None:
            self._stop_worker(worker)

    def _start_worker(self) -> subprocess.Popen[bytes]:
        """Start the worker by name: the service knows nothing else of it."""
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "poll", "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
        )

    def _stop_worker(self, worker: subprocess.Popen[bytes]) -> None:
        worker.terminate()
        try:
            worker.wait(self._settings.grace_seconds + _KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("worker-killed")
            worker.kill()
            worker.wait()
