"""
Carry one job at a time from its claim to its end.

The supervisor holds the lease and talks to the database and the blob store; a child process does the
work (``child.py``). The supervisor never imports torch, trusts nothing that the child leaves behind, and
is called through one function, whatever rang: ``run``.
"""

import errno
import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common import jobs
from common.blobs import BlobStore, artefact_key, output_key
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
from worker.artefacts import check_candidates, make_trigger_files
from worker.child import OUTPUT
from worker.keeper import Ended, LeaseKeeper
from worker.leavings import as_problem, digest_output, read_result
from worker.process import Child

_TICK_SECONDS = 0.1
_BROKEN_SPARE_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20

log = structlog.get_logger(__name__)


class _Interrupted(Exception):
    """The work is over before the child has ended by itself."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self.ended = ended


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
        self._warm_up_at = self._spare_since = 0.0
        self.problem: str | None = None  # why this worker may be unable to work, for /readyz

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
            if self._spare is None:
                return False  # this worker cannot work: leave the job to another one
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
    def folder(self) -> Path:
        """This worker's own folder; it goes with the worker."""
        return self._scratch.path

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
        if self._spare is not None and not self._spare.is_alive:
            status, words = self._spare.exit_status, self._spare.last_words
            self._spare.kill()
            self._spare = None
            self._warm_up_at = time.monotonic() + _BROKEN_SPARE_SECONDS
            self.problem = f"a job process ended with the status {status} before it had a job"
            log.error("spare-died", exit_status=status, last_words=words)
        if self._spare is None and time.monotonic() >= self._warm_up_at:
            self._spare = Child.start(self._scratch.path)
            self._spare_since = time.monotonic()
        if self._spare and time.monotonic() - self._spare_since > _BROKEN_SPARE_SECONDS:
            self.problem = None  # a child that lives this long has imported everything

    def _carry(self, lease: Lease) -> None:
        folder = self._scratch.path / f"{lease.job_id}-{lease.attempt}"
        child, self._spare = self._spare, None
        assert child is not None
        try:
            folder.mkdir(mode=0o700)
            self._attempt(lease, folder, child)
        except Problem as problem:
            self._retry(lease, problem)
        except SQLAlchemyError:
            # The lease runs out by itself, and the sweep finds the job.
            log.exception("job-database-failed")
        except (
            Exception
        ) as exc:  # a bug, or a full disk: the job's misfortune, not the worker's end
            log.exception("attempt-broken")
            full = isinstance(exc, OSError) and exc.errno == errno.ENOSPC
            self._retry(lease, NoSpace() if full else InternalError())
        finally:
            child.kill()
            shutil.rmtree(folder, ignore_errors=True)

    def _attempt(self, lease: Lease, folder: Path, child: Child) -> None:
        keeper = LeaseKeeper(
            self._settings,
            self._database,
            lease,
            progress=lambda: child.progress,
            leave_at=lambda: self._leave_at,
        )
        try:
            with keeper:
                outcome = self._work(lease, folder, child, keeper)
        except _Interrupted as interrupted:
            log.info("job-interrupted", why=interrupted.ended.name.lower())
            self._obey(lease, interrupted.ended)
        else:
            self._finish(lease, outcome)

    def _work(self, lease: Lease, folder: Path, child: Child, keeper: LeaseKeeper) -> Outcome:
        """Copy the files in, let the child work, and store what it made."""
        spec = JobSpec.model_validate(lease.spec)
        for role, file in spec.roles.items():
            self._fetch(lease.blobs[role], file.sha256, folder / role, keeper)
        child.give(
            {
                "folder": str(folder),
                "spec": spec.model_dump(mode="json"),
                "device": self._settings.device,
                "threads": self._settings.threads,
            }
        )
        while not child.wait(_TICK_SECONDS):
            _check(keeper)
        log.info("child-ended", exit_status=child.exit_status)
        result = read_result(folder)
        if result is None:
            log.error("child-crashed", exit_status=child.exit_status, last_words=child.last_words)
            raise JobCrashed(_describe_death(child.exit_status))
        if result.problem is not None:
            raise as_problem(result.problem)
        output = folder / OUTPUT
        sha256, size = digest_output(output, limit=spec.model.bytes * 2 + (1 << 20))
        artefacts = {
            **check_candidates(folder, result.evidence, check=lambda: _check(keeper)),
            **make_trigger_files(folder, result.evidence, spec),
        }
        beside_bytes = sum((folder / name).stat().st_size for name in artefacts)
        key = output_key(lease.job_id, lease.attempt, lease.token)
        self._store.put(key, output)
        for name in artefacts:
            self._store.put(artefact_key(key, name), folder / name)
        return Outcome(
            verdict=result.verdict,
            remediation=result.remediation,
            report=result.report or {},
            output_key=key,
            output_sha256=sha256,
            output_bytes=size,
            artefacts=artefacts,
            beside_bytes=beside_bytes,
        )

    def _obey(self, lease: Lease, ended: Ended) -> None:
        """Do what the reason for the interruption asks for."""
        match ended:
            case Ended.CANCELLED:
                self._write(jobs.stop, lease, retention_seconds=self._settings.retention_seconds)
            case Ended.GOING_AWAY:
                self._write(jobs.release, lease)
            case Ended.TOO_LATE:
                limit = self._settings.time_limit_seconds
                self._fail(lease, TimeLimitExceeded(f"The job took longer than {limit} s."))
            case Ended.LOST | Ended.BY_ITSELF:
                log.warning("lease-lost")

    def _fetch(self, key: str, sha256: str, target: Path, keeper: LeaseKeeper) -> None:
        """Copy a blob to *target* and make sure that it is what was uploaded."""
        digest = hashlib.sha256()
        try:
            with self._store.open(key) as source, target.open("xb") as copy:
                while chunk := source.read(_CHUNK_BYTES):
                    _check(keeper)
                    digest.update(chunk)
                    copy.write(chunk)
        except FileNotFoundError as exc:
            raise InternalError("An uploaded file is missing from the store.") from exc
        if digest.hexdigest() != sha256:
            raise InternalError("An uploaded file was changed in the store.")

    def _finish(self, lease: Lease, outcome: Outcome) -> None:
        # If the commit itself fails, nobody knows whether the row names the blob: the sweep looks.
        with self._database.write() as session:
            standing = jobs.finish(
                session, lease, outcome, retention_seconds=self._settings.retention_seconds
            )
        if standing is not Standing.HELD:
            self._store.delete(outcome.output_key)
            for name in outcome.artefacts:
                self._store.delete(artefact_key(outcome.output_key, name))
        if standing is Standing.CANCELLED:
            self._write(jobs.stop, lease, retention_seconds=self._settings.retention_seconds)
        log.info("job-finished", standing=standing, output_sha256=outcome.output_sha256)

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


def _check(keeper: LeaseKeeper) -> None:
    """Stop the work here if the keeper has seen a reason to."""
    if keeper.ended is not None:
        raise _Interrupted(keeper.ended)


def _describe_death(exit_status: int | None) -> str:
    if exit_status == -signal.SIGKILL:
        return "The job's process was killed, as the kernel does when memory runs out."
    return f"The job's process ended with the status {exit_status}."
