"""
Carry one job at a time from its claim to its end.

The supervisor holds the lease and talks to the database and the blob store; a child process does the
work (``child.py``). The supervisor never imports torch, trusts nothing that the child leaves behind, and
is called through one function, whatever rang: ``run``.
"""

import errno
import hashlib
import shutil
import threading
import time
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common import jobs
from common.blobs import BlobStore, output_key
from common.db import Database
from common.errors import (
    Fault,
    InternalError,
    JobCrashed,
    NoSpace,
    OutOfMemory,
    Problem,
    TimeLimitExceeded,
)
from common.folders import ProcessFolder, sweep_dead_folders
from common.jobs import Lease, Outcome, Standing
from common.settings import Settings
from common.spec import JobSpec
from worker.child import OUTPUT
from worker.leavings import as_problem, digest_output, read_result
from worker.process import Child

_TICK_SECONDS = 0.1
_CHUNK_BYTES = 1 << 20

log = structlog.get_logger(__name__)


class _Ended(Enum):
    """Why a child is no longer running."""

    BY_ITSELF = auto()
    CANCELLED = auto()
    LOST = auto()  # the lease is somebody else's
    TOO_LATE = auto()
    GOING_AWAY = auto()  # this worker has to stop


class Supervisor:
    """
    A worker's hands: one device, one job at a time, one spare child that waits for the next.

    Law: when ``run`` returns, the job it claimed has ended, is queued again, or is somebody else's;
    its child is gone, and so are its files.
    """

    def __init__(
        self, settings: Settings, database: Database, store: BlobStore, *, name: str
    ) -> None:
        self.name = name
        self._settings = settings
        self._database = database
        self._store = store
        self._scratch = ProcessFolder(settings.resolved_scratch_dir)
        self._busy = threading.Lock()
        self._spare: Child | None = None
        self._leave_at: float | None = None

    def run(self, job_id: str | None = None) -> bool:
        """
        Claim the queued job *job_id*, or the first in the queue, and carry it to its end.

        Return false when there is nothing to claim, or when this worker has a job already: the row
        stays queued, and whoever is free finds it.
        """
        if self._leave_at is not None or not self._busy.acquire(blocking=False):
            return False
        try:
            self._warm_up()
            with self._database.write() as session:
                lease = jobs.claim(
                    session,
                    worker=self.name,
                    lease_seconds=self._settings.lease_seconds,
                    job_id=job_id,
                )
            if lease is None:
                return False
            with structlog.contextvars.bound_contextvars(
                job_id=lease.job_id, request_id=lease.request_id, attempt=lease.attempt
            ):
                log.info("job-claimed", worker=self.name)
                self._carry(lease)
            return True
        finally:
            self._busy.release()

    def leave(self, *, grace_seconds: float) -> None:
        """Claim nothing more; hand a running job back when it has not ended in *grace_seconds*."""
        self._leave_at = time.monotonic() + grace_seconds

    @property
    def is_leaving(self) -> bool:
        """Whether this worker is asked to stop."""
        return self._leave_at is not None

    def sweep_scratch(self) -> None:
        """Remove what other workers on this machine left behind when they died."""
        if removed := sweep_dead_folders(self._settings.resolved_scratch_dir):
            log.info("scratch-swept", folders=removed)

    def close(self) -> None:
        """End the spare child and remove this worker's folder."""
        if self._spare is not None:
            self._spare.kill()
        self._scratch.close()

    def _warm_up(self) -> None:
        if self._spare is None or not self._spare.is_alive:
            self._spare = Child.start(self._scratch.path)

    def _carry(self, lease: Lease) -> None:
        folder = self._scratch.path / f"{lease.job_id}-{lease.attempt}"
        folder.mkdir(mode=0o700)
        try:
            self._attempt(lease, folder)
        except Problem as problem:
            self._retry(lease, problem)
        except OSError as exc:
            log.exception("job-storage-failed")
            self._retry(lease, NoSpace() if exc.errno == errno.ENOSPC else InternalError(str(exc)))
        except SQLAlchemyError:
            # The lease runs out by itself, and the sweep finds the job.
            log.exception("job-database-failed")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _attempt(self, lease: Lease, folder: Path) -> None:
        spec = JobSpec.model_validate(lease.spec)
        for role, file in spec.roles.items():
            self._fetch(lease.blobs[role], file.sha256, folder / role)
        assert self._spare is not None
        child, self._spare = self._spare, None
        try:
            child.give(
                {
                    "folder": str(folder),
                    "spec": spec.model_dump(mode="json"),
                    "device": self._settings.device,
                    "threads": self._settings.threads,
                }
            )
            ended = self._watch(lease, child)
        finally:
            child.kill()
        log.info("child-ended", why=ended.name.lower(), exit_status=child.exit_status)
        match ended:
            case _Ended.BY_ITSELF:
                self._finish(lease, spec, folder, child)
            case _Ended.CANCELLED:
                self._write(jobs.stop, lease, retention_seconds=self._settings.retention_seconds)
            case _Ended.GOING_AWAY:
                self._write(jobs.release, lease)
            case _Ended.TOO_LATE:
                self._fail(
                    lease,
                    TimeLimitExceeded(
                        f"The job took longer than {self._settings.time_limit_seconds} s."
                    ),
                )
            case _Ended.LOST:
                log.warning("lease-lost")

    def _fetch(self, key: str, sha256: str, target: Path) -> None:
        """Copy a blob to *target* and make sure that it is what was uploaded."""
        digest = hashlib.sha256()
        try:
            with self._store.open(key) as source, target.open("xb") as copy:
                while chunk := source.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
        except FileNotFoundError as exc:
            raise InternalError("An uploaded file is missing from the store.") from exc
        if digest.hexdigest() != sha256:
            raise InternalError("An uploaded file was changed in the store.")

    def _watch(self, lease: Lease, child: Child) -> _Ended:
        """Wait for the child; renew the lease, publish progress, obey cancel, limit and stop."""
        settings = self._settings
        started = time.monotonic()
        renewed = looked = started
        published = child.progress
        while not child.wait(_TICK_SECONDS):
            at = time.monotonic()
            if (must_end := self._must_end(at, started=started, renewed=renewed)) is not None:
                return must_end
            if at - looked < min(settings.cancel_poll_seconds, settings.heartbeat_seconds):
                continue
            looked = at
            is_due = at - renewed >= settings.heartbeat_seconds
            progress = child.progress
            standing = self._look(
                lease, started, progress if is_due or progress != published else None
            )
            match standing:
                case Standing.HELD:
                    if is_due or progress != published:
                        renewed, published = at, progress
                case Standing.CANCELLED:
                    return _Ended.CANCELLED
                case Standing.LOST:
                    return _Ended.LOST
                case None:
                    log.warning("heartbeat-failed")
        return _Ended.BY_ITSELF

    def _must_end(self, at: float, *, started: float, renewed: float) -> _Ended | None:
        """Return why the child must end now, as far as this worker knows by itself."""
        if at - started > self._settings.time_limit_seconds:
            return _Ended.TOO_LATE
        if self._leave_at is not None and at > self._leave_at:
            return _Ended.GOING_AWAY
        if at - renewed > self._settings.lease_seconds:
            return _Ended.LOST  # the database has not answered for a whole lease
        return None

    def _look(
        self, lease: Lease, started: float, progress: dict[str, Any] | None
    ) -> Standing | None:
        """Renew the lease with *progress*, or only look; ``None`` if the database is away."""
        try:
            if progress is None:
                with self._database.read() as session:
                    return jobs.standing(session, lease)
            with self._database.write() as session:
                return jobs.heartbeat(
                    session,
                    lease,
                    lease_seconds=self._settings.lease_seconds,
                    progress=with_eta(progress, elapsed_seconds=time.monotonic() - started),
                )
        except SQLAlchemyError:
            return None

    def _finish(self, lease: Lease, spec: JobSpec, folder: Path, child: Child) -> None:
        result = read_result(folder)
        if result is None:
            raise JobCrashed(f"The job's process ended with the status {child.exit_status}.")
        if result.problem is not None:
            raise as_problem(result.problem)
        output = folder / OUTPUT
        sha256, size = digest_output(output, limit=spec.model.bytes * 2 + (1 << 20))
        key = output_key(lease.job_id, lease.attempt, lease.token)
        self._store.put(key, output)
        # If the commit itself fails, nobody knows whether the row names the blob: the sweep looks.
        with self._database.write() as session:
            standing = jobs.finish(
                session,
                lease,
                Outcome(
                    verdict=result.verdict,
                    remediation=result.remediation,
                    report=result.report or {},
                    output_key=key,
                    output_sha256=sha256,
                    output_bytes=size,
                ),
                retention_seconds=self._settings.retention_seconds,
            )
        if standing is not Standing.HELD:
            self._store.delete(key)
        if standing is Standing.CANCELLED:
            self._write(jobs.stop, lease, retention_seconds=self._settings.retention_seconds)
        log.info("job-finished", standing=standing, output_sha256=sha256)

    def _retry(self, lease: Lease, problem: Problem) -> None:
        """Fail at once what the client sent; give anything else another chance."""
        if isinstance(problem, JobCrashed | OutOfMemory | NoSpace | InternalError):
            log.error("attempt-failed", code=problem.code, detail=problem.detail)
            self._write(
                jobs.retry, lease, problem, retention_seconds=self._settings.retention_seconds
            )
        else:
            self._fail(lease, problem)

    def _fail(self, lease: Lease, problem: Problem) -> None:
        level = log.error if isinstance(problem, Fault) else log.info
        level("job-failed", code=problem.code, detail=problem.detail)
        self._write(jobs.fail, lease, problem, retention_seconds=self._settings.retention_seconds)

    def _write(self, change: Callable[..., bool], *arguments: Any, **options: Any) -> None:
        with self._database.write() as session:
            if not change(session, *arguments, **options):
                log.warning("lease-lost")


def with_eta(progress: dict[str, Any], *, elapsed_seconds: float) -> dict[str, Any]:
    """Return *progress* with the seconds that are left if the job goes on at its present pace."""
    fraction = progress["fraction"]
    eta = None
    if fraction >= 0.05:  # before that, the pace is that of loading
        eta = round(elapsed_seconds * (1 - fraction) / fraction)
    return {**progress, "eta_seconds": eta}
