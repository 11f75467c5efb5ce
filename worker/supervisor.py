"""
Carry one job at a time from its claim to its end.

The supervisor holds the lease and talks to the database and the blob store; a child process does the
work (``child.py``). The supervisor never imports torch, trusts nothing that the child leaves behind, and
is called through one function, whatever rang: ``run``.
"""

import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
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
from worker.jail import paths
from worker.jail.inspection import inspect
from worker.jail.verdict import Verdict
from worker.joining import with_candidates
from worker.keeper import Ended, LeaseKeeper
from worker.pair import Pair

_BROKEN_SPARE_SECONDS = 10.0
_UNSAFE_SECONDS = 60.0
_CHUNK_BYTES = 1 << 20

log = structlog.get_logger(__name__)


class _Interrupted(Exception):
    """The work is over before the child has ended by itself."""

    def __init__(self, ended: Ended) -> None:
        super().__init__(ended)
        self.ended = ended


class Supervisor:
    """
    A worker's hands: one device, one job at a time, a spare pair of children that wait for the next.

    Law: when ``run`` returns, the job it claimed has ended, is queued again, or is somebody else's;
    its children are gone, and so are its files.
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
        self._spare: Pair | None = None
        self._gpu = settings.device != "cpu" and paths.has_gpu()
        self._leave_at: float | None = None
        self._warm_up_at = self._spare_since = 0.0
        self._inspect_at = 0.0
        self._inspected: Verdict | None = None
        self._unsafe: str | None = None
        self._broken: str | None = None

    def run(self, job_id: str | None = None) -> bool:
        """
        Claim the queued job *job_id*, or the first in the queue, and carry it to its end.

        Return false when there is nothing to claim, or when this worker has a job already: the row
        stays queued, and whoever is free finds it.
        """
        if self._leave_at is not None or not self._busy.acquire(blocking=False):
            return False
        try:
            if not self.try_sandbox():
                return False  # a job that waits is better off than one that is not confined
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

    @property
    def problem(self) -> str | None:
        """Why this worker may be unable to work, for ``/readyz``."""
        return self._unsafe or self._broken

    @property
    def sandbox(self) -> Mapping[str, str] | None:
        """How each wall of the jail holds, for ``/readyz``; ``None`` before it was tried."""
        if self._inspected is None:
            return None
        return {str(layer): state for layer, state in self._inspected.layers.items()}

    def try_sandbox(self) -> bool:
        """Return whether jobs may run in the jail, which is tried before the first of them."""
        if self._inspected is not None and self._unsafe is None:
            return True
        if time.monotonic() < self._inspect_at:
            return False
        self._inspected = inspect(self._scratch.path, gpu=self._gpu)
        self._unsafe = self._inspected.problem(required=self._settings.requires_sandbox)
        self._inspect_at = time.monotonic() + _UNSAFE_SECONDS
        if self._unsafe is not None:
            log.error("jobs-refused", why=self._unsafe, sandbox=self.sandbox)
        else:
            log.info("sandbox-tried", sandbox=self.sandbox)
        return self._unsafe is None

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
        if self._spare is not None and (broken := self._spare.broken) is not None:
            status, words = broken.exit_status, broken.last_words
            self._spare.kill()
            self._spare = None
            self._warm_up_at = time.monotonic() + _BROKEN_SPARE_SECONDS
            self._broken = f"a job process ended with the status {status} before it had a job"
            log.error("spare-died", exit_status=status, last_words=words)
        if self._spare is None and time.monotonic() >= self._warm_up_at:
            self._spare = Pair(self._scratch.path, gpu=self._gpu)
            self._spare_since = time.monotonic()
        if self._spare and time.monotonic() - self._spare_since > _BROKEN_SPARE_SECONDS:
            self._broken = None  # children that live this long have imported everything

    def _carry(self, lease: Lease) -> None:
        folder = self._scratch.path / f"{lease.job_id}-{lease.attempt}"
        pair, self._spare = self._spare, None
        assert pair is not None
        try:
            folder.mkdir(mode=0o700)
            self._attempt(lease, folder, pair)
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
            pair.kill()
            shutil.rmtree(folder, ignore_errors=True)

    def _attempt(self, lease: Lease, folder: Path, pair: Pair) -> None:
        keeper = LeaseKeeper(
            self._settings,
            self._database,
            lease,
            progress=lambda: pair.progress,
            leave_at=lambda: self._leave_at,
        )
        try:
            with keeper:
                outcome = self._work(lease, folder, pair, keeper)
        except _Interrupted as interrupted:
            log.info("job-interrupted", why=interrupted.ended.name.lower())
            self._obey(lease, interrupted.ended)
        else:
            self._finish(lease, outcome)

    def _work(self, lease: Lease, folder: Path, pair: Pair, keeper: LeaseKeeper) -> Outcome:
        """Copy the files in, let the children work, and store what they made."""

        def check() -> None:
            _check(keeper)

        spec = JobSpec.model_validate(lease.spec)
        started = time.monotonic()
        # A backstop for all threads; the keeper's clock is what ends a job in time.
        cpu_seconds = int(self._settings.time_limit_seconds + 60) * (os.cpu_count() or 1)
        for role, file in spec.roles.items():
            self._fetch(lease.blobs[role], file.sha256, pair.converter.inbox / role, keeper)
        pair.convert(spec, cpu_seconds=cpu_seconds, check=check)
        result = pair.purify(
            spec,
            device=self._settings.device,
            threads=self._settings.threads,
            cpu_seconds=cpu_seconds,
            check=check,
        )
        report, evidence = result.report or {}, result.evidence
        packed = pair.pack(
            spec,
            folder=folder,
            candidates=len(evidence.candidates),
            cpu_seconds=cpu_seconds,
            check=check,
        )
        if evidence.trial is not None:
            pair.take_trial(folder)
        log.info("children-ended")
        files = packed.files or []
        with_candidates(report, [file.model_dump() for file in files])
        artefacts = {
            **check_candidates(folder, files, check=check),
            **make_trigger_files(folder, evidence, spec),
        }
        output = folder / OUTPUT
        size = output.stat().st_size
        with output.open("rb") as model:
            sha256 = hashlib.file_digest(model, "sha256").hexdigest()
        report["seconds"] = {
            **(report.get("seconds") or {}),
            "total": round(time.monotonic() - started, 3),
        }
        beside_bytes = sum((folder / name).stat().st_size for name in artefacts)
        key = output_key(lease.job_id, lease.attempt, lease.token)
        self._store.put(key, output)
        for name in artefacts:
            self._store.put(artefact_key(key, name), folder / name)
        return Outcome(
            verdict=result.verdict,
            remediation=result.remediation,
            report=report,
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
