"""The sweep as a habit: what every worker and the service do every few seconds."""

import time

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common import jobs, retention
from common.blobs import BlobStore
from common.db import Database
from common.queue import Doorbell
from common.settings import Settings

_SLOW_SWEEP_SECONDS = 60.0

log = structlog.get_logger(__name__)


class Sweeper:
    """
    Sweeps when a sweep is due.

    The walk over the stored outputs and the forgetting of old keys are slow and never urgent, so
    they come once a minute.
    """

    def __init__(
        self, settings: Settings, database: Database, store: BlobStore, bell: Doorbell
    ) -> None:
        self._settings = settings
        self._database = database
        self._store = store
        self._bell = bell
        self._next = self._next_slow = time.monotonic()

    def sweep_if_due(self) -> None:
        """Sweep if the last sweep is long enough ago; a database that is away is only logged."""
        at = time.monotonic()
        if at < self._next:
            return
        self._next = at + self._settings.sweep_seconds
        try:
            self.sweep()
            if at >= self._next_slow:
                self._next_slow = at + _SLOW_SWEEP_SECONDS
                self.sweep_slowly()
        except (SQLAlchemyError, OSError) as exc:
            log.warning("sweep-failed", error=str(exc).splitlines()[0])

    def sweep(self) -> None:
        """Sweep now, and ring again for jobs whose first ring may have been lost."""
        with self._database.write() as session:
            swept = jobs.sweep(
                session,
                self._store,
                retention_seconds=self._settings.retention_seconds,
                orphan_grace_seconds=self._settings.orphan_grace_seconds,
            )
        if swept is None:
            return
        if swept.requeued or swept.ended or swept.purged or swept.orphans:
            log.info(
                "swept",
                requeued=swept.requeued,
                ended=swept.ended,
                purged=swept.purged,
                orphans=swept.orphans,
            )
        if swept.waiting and self._bell.is_silent():
            for job_id in swept.waiting:
                self._bell.ring(job_id)

    def sweep_slowly(self) -> None:
        """Delete outputs that no job names and forget what nobody may ask for any more."""
        with self._database.write() as session:
            retention.sweep_outputs(session, self._store)
            retention.forget_idempotency(
                session, older_than_seconds=self._settings.idempotency_seconds
            )
