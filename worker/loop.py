"""
The polling door: look for a queued job, run it, look again; sweep and show a sign of life on the way.

It is all there is in embedded mode. Beside a Celery consumer it is the second door, which makes progress
when the first is deaf.
"""

import importlib.metadata
import platform
import threading
import time
from collections.abc import Mapping

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common import __version__, workers
from common.db import Database
from common.settings import Settings
from common.sweeper import Sweeper
from worker.roster import Roster
from worker.supervisor import Supervisor

_SIGN_OF_LIFE_SECONDS = 10.0
_MAX_BACKOFF_SECONDS = 30.0
_UNRUNG_SECONDS = 0.25

log = structlog.get_logger(__name__)


class Loop:
    """Polls until it is told to stop."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        supervisor: Supervisor,
        sweeper: Sweeper,
        roster: Roster,
    ) -> None:
        self._settings = settings
        self._database = database
        self._supervisor = supervisor
        self._sweeper = sweeper
        self._roster = roster
        self._stopped = threading.Event()

    def run(self) -> None:
        """Poll until ``stop``; a database that is away makes it wait, not fail."""
        self._supervisor.try_sandbox()  # before anybody hears of this worker
        housekeeper = threading.Thread(target=self._keep_house, name="housekeeper", daemon=True)
        housekeeper.start()
        # Without a broker nobody rings, so the looks come closer together.
        shortest = self._settings.poll_seconds
        if self._settings.broker_url is None:
            shortest = min(shortest, _UNRUNG_SECONDS)
        pause = shortest
        while not self._stopped.is_set():
            try:
                while self._supervisor.run() and not self._stopped.is_set():
                    pass
                pause = shortest
            except SQLAlchemyError as exc:
                pause = min(pause * 2, _MAX_BACKOFF_SECONDS)
                log.warning("poll-failed", error=str(exc).splitlines()[0], again_in_seconds=pause)
            self._stopped.wait(pause)
        housekeeper.join()
        self._withdraw()

    def stop(self) -> None:
        """Return from ``run`` when the present job has ended or was handed back."""
        self._supervisor.leave(grace_seconds=self._settings.grace_seconds)
        self._stopped.set()

    def _keep_house(self) -> None:
        """Sweep, and say that this worker is there, also while a job runs."""
        announced = False
        seen = 0.0
        shown: tuple[str | None, Mapping[str, str] | None] | None = None
        while not self._stopped.is_set():
            self._sweeper.sweep_if_due()
            self._supervisor.sweep_scratch()
            self._roster.step()
            at = time.monotonic()
            standing = (self._supervisor.problem, self._supervisor.sandbox)
            if not announced or standing != shown or at - seen > _SIGN_OF_LIFE_SECONDS:
                announced = self._show(announced=announced)
                seen, shown = at, standing
            self._stopped.wait(1.0)
        self._roster.close()

    def _show(self, *, announced: bool) -> bool:
        try:
            with self._database.write() as session:
                if not announced:
                    workers.announce(
                        session,
                        self._supervisor.name,
                        device=self._settings.device,
                        versions=_versions(),
                    )
                workers.touch(
                    session,
                    self._supervisor.name,
                    problem=self._supervisor.problem,
                    sandbox=self._supervisor.sandbox,
                )
        except SQLAlchemyError as exc:
            log.warning("sign-of-life-failed", error=str(exc).splitlines()[0])
            return announced
        return True

    def _withdraw(self) -> None:
        try:
            with self._database.write() as session:
                workers.withdraw(session, self._supervisor.name)
        except SQLAlchemyError as exc:
            log.warning("sign-of-life-failed", error=str(exc).splitlines()[0])


def _versions() -> dict[str, str]:
    """Return the versions that decide a result, without importing torch here."""
    return {
        "weightwash": __version__,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "numpy": importlib.metadata.version("numpy"),
    }
