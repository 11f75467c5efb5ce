"""
The life of a job: every change of its state is made here, by one conditional statement each.

    queued ──claim──▶ running ──finish──▶ succeeded
      ▲                  │├─────fail─────▶ failed
      └─release, sweep───┘└─stop, sweep──▶ cancelled

The row is the truth: a message about a job only makes somebody look at its row. A worker holds a running
job through a lease (a fresh token and a time on the database's clock); every statement of the worker
names the token, so a worker that lost its lease can change nothing. Terminal states are final.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, func, or_, select, text, update
from sqlalchemy.orm import Session

from common import artefacts, quotas, retention
from common.artefacts import Artefact
from common.blobs import BlobStore
from common.db import (
    IdempotencyKey,
    Job,
    JobBlob,
    State,
    is_postgres,
    now,
)
from common.errors import (
    AlreadyEnded,
    CancelledByClient,
    DeadlinePassed,
    IdempotencyMismatch,
    NotFound,
    OutOfMemory,
    Problem,
    Refused,
    WorkerLost,
)

MAX_ATTEMPTS = 3
"""Attempts that may end by a death of worker or child; a poisonous job must not come back for ever."""

MAX_MEMORY_FAILURES = 2
"""Attempts that may end out of memory: the second one rules out a crowded device."""

_RING_LIMIT = 100
_SWEEP_LOCK = 0x53574550  # any constant of ours

QUEUED_PROGRESS: Mapping[str, Any] = {
    "phase": "queued",
    "fraction": 0.0,
    "step": 0,
    "total": 0,
    "eta_seconds": None,
}


# Create --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What a request asks for, checked and stored."""

    tenant: str
    request_id: str
    spec: dict[str, Any]
    model_sha256: str
    model_bytes: int  # what it will leave is about as large
    blobs: Mapping[str, str]  # role -> blob key
    client_metadata: dict[str, Any]
    priority: int = 0
    cancel_after_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """A client's promise that requests under one key are the same request."""

    token: str
    key: str
    fingerprint: str


def find_replay(session: Session, tenant: str, idempotency: Idempotency) -> Job | None:
    """
    Return the job that this key made before, if any.

    Raises:
        IdempotencyMismatch: The key was used with another payload.
    """
    row = session.get(IdempotencyKey, (tenant, idempotency.token, idempotency.key))
    if row is None:
        return None
    if not secrets.compare_digest(row.fingerprint, idempotency.fingerprint):
        raise IdempotencyMismatch
    return session.get_one(Job, row.job_id)


def is_key_known(session: Session, tenant: str, token: str, key: str) -> bool:
    """Return whether a request under this key will be answered by an earlier job."""
    return session.get(IdempotencyKey, (tenant, token, key)) is not None


def create(
    session: Session,
    new: NewJob,
    *,
    max_active_jobs: int,
    max_stored_bytes: int = 0,
    idempotency: Idempotency | None = None,
) -> Job:
    """
    Insert a queued job with its claims on stored files, which have been reserved before.

    Raises:
        QuotaExceeded: The tenant has too many unfinished jobs.
        InsufficientStorage: The tenant's files take up too much.
        sqlalchemy.exc.IntegrityError: Another request has just used the same idempotency key.
    """
    quotas.take_turns(session, new.tenant)
    quotas.check_active_jobs(session, new.tenant, max_active_jobs=max_active_jobs)
    quotas.check_storage(
        session,
        new.tenant,
        adding_bytes=new.model_bytes,
        max_stored_bytes=max_stored_bytes,
    )
    deadline = new.cancel_after_seconds
    job = Job(
        id=f"job_{secrets.token_hex(12)}",
        tenant=new.tenant,
        state=State.QUEUED,
        created_at=now(),
        deadline_at=None if deadline is None else now(deadline),
        request_id=new.request_id,
        spec=new.spec,
        priority=new.priority,
        model_sha256=new.model_sha256,
        client_metadata=new.client_metadata,
        attempt=0,
        memory_failures=0,
        cancel_requested=False,
        progress=dict(QUEUED_PROGRESS),
        stored_bytes=new.model_bytes,
    )
    session.add(job)
    session.flush()
    session.add_all(
        JobBlob(job_id=job.id, role=role, blob_key=key) for role, key in new.blobs.items()
    )
    if idempotency is not None:
        session.add(
            IdempotencyKey(
                tenant=new.tenant,
                token=idempotency.token,
                key=idempotency.key,
                fingerprint=idempotency.fingerprint,
                job_id=job.id,
                created_at=now(),
            )
        )
    session.flush()
    session.refresh(job)
    return job


# Read ----------------------------------------------------------------------------------------------


def get(session: Session, tenant: str, job_id: str) -> Job:
    """
    Return a tenant's job.

    Raises:
        NotFound: There is none, or it is another tenant's: the two answers are alike.
    """
    job = session.get(Job, job_id)
    if job is None or job.tenant != tenant:
        raise NotFound(f"There is no job {job_id!r}.")
    return job


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which jobs a list holds."""

    state: str | None = None
    verdict: str | None = None
    sha256: str | None = None


def page(
    session: Session, tenant: str, wanted: Filter, *, limit: int, after: str | None
) -> tuple[list[Job], bool]:
    """
    Return a tenant's jobs, newest first, and whether there are more behind them.

    Raises:
        NotFound: The job *after* does not exist.
    """
    query = select(Job).where(Job.tenant == tenant)
    if wanted.state is not None:
        query = query.where(Job.state == wanted.state)
    if wanted.verdict is not None:
        query = query.where(Job.verdict == wanted.verdict)
    if wanted.sha256 is not None:
        query = query.where(Job.model_sha256 == wanted.sha256)
    if after is not None:
        last = get(session, tenant, after)
        query = query.where(
            or_(
                Job.created_at < last.created_at,
                and_(Job.created_at == last.created_at, Job.id < last.id),
            )
        )
    query = query.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
    found = list(session.scalars(query))
    return found[:limit], len(found) > limit


def is_expired(session: Session, job: Job) -> bool:
    """Return whether the job's files are gone, or may be gone at any moment."""
    if job.purged_at is not None:
        return True
    return bool(session.scalar(select(Job.expires_at <= now()).where(Job.id == job.id)))


# Work ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to work on a job, for as long as it is renewed."""

    job_id: str
    tenant: str
    token: str
    attempt: int
    spec: dict[str, Any]
    blobs: Mapping[str, str]
    request_id: str


class Standing(StrEnum):
    """What a worker learns when it looks at its job."""

    HELD = "held"  # go on
    CANCELLED = "cancelled"  # the client or a deadline wants it to stop
    LOST = "lost"  # the lease is somebody else's; drop the work


def claim(
    session: Session, *, worker: str, lease_seconds: float, job_id: str | None = None
) -> Lease | None:
    """Take the queued job *job_id*, or the first in the queue; return ``None`` if there is none."""
    token = secrets.token_hex(16)
    candidate = select(Job.id).where(
        Job.state == State.QUEUED,
        Job.cancel_requested.is_(False),
        or_(Job.deadline_at.is_(None), Job.deadline_at > now()),
    )
    if job_id is not None:
        candidate = candidate.where(Job.id == job_id)
    candidate = candidate.order_by(Job.priority.desc(), Job.created_at).limit(1)
    row = session.execute(
        update(Job)
        .where(
            Job.state == State.QUEUED,
            Job.id == candidate.with_for_update(skip_locked=True).scalar_subquery(),
        )
        .values(
            state=State.RUNNING,
            attempt=Job.attempt + 1,
            worker=worker,
            lease_token=token,
            lease_until=now(lease_seconds),
            started_at=func.coalesce(Job.started_at, now()),
            progress={**QUEUED_PROGRESS, "phase": "starting"},
        )
        .returning(Job.id, Job.tenant, Job.attempt, Job.spec, Job.request_id)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        return None
    blobs = session.execute(select(JobBlob.role, JobBlob.blob_key).where(JobBlob.job_id == row.id))
    return Lease(
        job_id=row.id,
        tenant=row.tenant,
        token=token,
        attempt=row.attempt,
        spec=row.spec,
        blobs={role: key for role, key in blobs},  # noqa: C416 - dict() mistakes a result for a mapping
        request_id=row.request_id,
    )


def heartbeat(
    session: Session, lease: Lease, *, lease_seconds: float, progress: Mapping[str, Any]
) -> Standing:
    """Renew the lease and publish the progress."""
    row = _update_held(
        session, lease, {"lease_until": now(lease_seconds), "progress": dict(progress)}
    )
    return _standing(row)


def standing(session: Session, lease: Lease) -> Standing:
    """Look whether the lease is still held and nobody wants the job to stop."""
    row = session.execute(select(Job.cancel_requested).where(_held(lease))).first()
    return _standing(row)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished job leaves."""

    verdict: str | None
    remediation: str | None
    report: dict[str, Any]
    output_key: str
    output_sha256: str
    output_bytes: int
    artefacts: Mapping[str, Artefact] = field(default_factory=dict)
    beside_bytes: int = 0  # what the artefacts take up as they are stored


def finish(
    session: Session, lease: Lease, outcome: Outcome, *, retention_seconds: float
) -> Standing:
    """End the job with a model; anything but ``HELD`` says that nothing was changed."""
    row = session.execute(
        update(Job)
        .where(_held(lease), Job.cancel_requested.is_(False))
        .values(
            **_ending(
                State.SUCCEEDED,
                retention_seconds,
                stored_bytes=outcome.output_bytes + outcome.beside_bytes,
            ),
            verdict=outcome.verdict,
            remediation=outcome.remediation,
            report=outcome.report,
            output_key=outcome.output_key,
            output_sha256=outcome.output_sha256,
            output_bytes=outcome.output_bytes,
            artefacts=artefacts.as_row(outcome.artefacts),
            progress=_finished_progress(State.SUCCEEDED),
        )
        .returning(Job.cancel_requested)
        .execution_options(synchronize_session=False)
    ).first()
    if row is None:
        return standing(session, lease)
    _forget_blobs(session, lease.job_id)
    return Standing.HELD


def fail(
    session: Session,
    lease: Lease,
    problem: Problem,
    *,
    retention_seconds: float,
    report: dict[str, Any] | None = None,
) -> bool:
    """End the job with an error; return whether the lease was still held."""
    values: dict[str, Any] = {
        **_ending(State.FAILED, retention_seconds),
        "error": problem.as_dict(),
        "report": report,
        "progress": _finished_progress(State.FAILED),
    }
    return _update_held(session, lease, values, forget_blobs=True) is not None


def retry(session: Session, lease: Lease, problem: Problem, *, retention_seconds: float) -> bool:
    """
    Queue the job again after *problem*, or fail it when its attempts are used up.

    A crash is tried until ``MAX_ATTEMPTS``, lack of memory until ``MAX_MEMORY_FAILURES``; what the
    client sent (``Refused``) is never tried twice. Return whether the lease was still held.
    """
    if isinstance(problem, OutOfMemory):
        failures = session.scalar(select(Job.memory_failures + 1).where(_held(lease)))
        exhausted = failures is None or failures >= MAX_MEMORY_FAILURES
        values: dict[str, Any] = {"memory_failures": Job.memory_failures + 1}
    else:
        exhausted = lease.attempt >= MAX_ATTEMPTS
        values = {}
    if exhausted or isinstance(problem, Refused):
        return fail(session, lease, problem, retention_seconds=retention_seconds)
    return _update_held(session, lease, {**values, **_REQUEUED}) is not None


def release(session: Session, lease: Lease) -> bool:
    """Hand the job back without using up an attempt: its worker is going away."""
    return _update_held(session, lease, {**_REQUEUED, "attempt": Job.attempt - 1}) is not None


def stop(session: Session, lease: Lease, *, retention_seconds: float) -> bool:
    """End the job as cancelled: its worker has stopped, as it was asked to."""
    return _cancel_where(session, _held(lease), retention_seconds) > 0


# Cancel --------------------------------------------------------------------------------------------


def cancel(session: Session, tenant: str, job_id: str, *, retention_seconds: float) -> Job:
    """
    Cancel a queued job at once, or ask the worker of a running one to stop.

    Raises:
        NotFound: There is no such job.
        AlreadyEnded: The job has ended otherwise.
    """
    job = get(session, tenant, job_id)
    _request_cancel(session, job_id, retention_seconds)
    session.refresh(job)  # only now: the job may have ended since it was read above
    if State(job.state).is_terminal and job.state != State.CANCELLED:
        raise AlreadyEnded(f"The job ended as {job.state}.")
    return job


def purge(session: Session, tenant: str, job_id: str, *, retention_seconds: float) -> Job:
    """
    Make the job's files expire now; a job that has not ended is cancelled first.

    Raises:
        NotFound: There is no such job.
    """
    job = get(session, tenant, job_id)
    _request_cancel(session, job_id, retention_seconds)
    session.execute(update(Job).where(Job.id == job_id).values(expires_at=now()))
    session.refresh(job)
    return job


def _request_cancel(session: Session, job_id: str, retention_seconds: float) -> None:
    session.execute(
        update(Job)
        .where(Job.id == job_id, Job.state.in_([State.QUEUED, State.RUNNING]))
        .values(cancel_requested=True)
        .execution_options(synchronize_session=False)
    )
    _cancel_where(session, and_(Job.id == job_id, Job.state == State.QUEUED), retention_seconds)


# Sweep ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What one sweep did, and which jobs wait for a worker."""

    requeued: int = 0
    ended: int = 0
    purged: int = 0
    orphans: int = 0
    waiting: Sequence[str] = ()


def sweep(
    session: Session, store: BlobStore, *, retention_seconds: float, orphan_grace_seconds: float
) -> Swept | None:
    """Put right what deaths, deadlines and time left behind; ``None`` if another one is at it."""
    if is_postgres(session):
        got_it = session.scalar(text("SELECT pg_try_advisory_xact_lock(:l)"), {"l": _SWEEP_LOCK})
        if not got_it:
            return None
    requeued, lost = _sweep_leases(session, retention_seconds)
    late = _sweep_deadlines(session, retention_seconds)
    purged = retention.sweep_expired(session, store)
    orphans = retention.sweep_uploads(session, store, orphan_grace_seconds)
    waiting = session.scalars(
        select(Job.id)
        .where(Job.state == State.QUEUED)
        .order_by(Job.priority.desc(), Job.created_at)
        .limit(_RING_LIMIT)
    ).all()
    return Swept(
        requeued=requeued, ended=lost + late, purged=purged, orphans=orphans, waiting=waiting
    )


def _sweep_leases(session: Session, retention_seconds: float) -> tuple[int, int]:
    expired = and_(Job.state == State.RUNNING, Job.lease_until < now())
    cancelled = _cancel_where(
        session, and_(expired, Job.cancel_requested.is_(True)), retention_seconds
    )
    requeued = session.execute(
        update(Job)
        .where(expired, Job.attempt < MAX_ATTEMPTS)
        .values(**_REQUEUED)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).all()
    lost = _end_where(
        session,
        expired,
        {
            **_ending(State.FAILED, retention_seconds),
            "error": WorkerLost().as_dict(),
            "progress": _finished_progress(State.FAILED),
        },
    )
    return len(requeued), cancelled + lost


def _sweep_deadlines(session: Session, retention_seconds: float) -> int:
    late = Job.deadline_at <= now()
    session.execute(
        update(Job)
        .where(Job.state == State.RUNNING, late)
        .values(cancel_requested=True)
        .execution_options(synchronize_session=False)
    )
    # A worker that handed its job back may not have heard of the cancel.
    unwanted = or_(late, Job.cancel_requested.is_(True))
    return _cancel_where(session, and_(Job.state == State.QUEUED, unwanted), retention_seconds)


# Statements that several of the above share --------------------------------------------------------


_REQUEUED: dict[str, Any] = {
    "state": State.QUEUED,
    "worker": None,
    "lease_token": None,
    "lease_until": None,
    "progress": dict(QUEUED_PROGRESS),
}


def _held(lease: Lease) -> ColumnElement[bool]:
    return and_(Job.id == lease.job_id, Job.state == State.RUNNING, Job.lease_token == lease.token)


def _standing(row: Row[bool] | None) -> Standing:
    if row is None:
        return Standing.LOST
    return Standing.CANCELLED if row.cancel_requested else Standing.HELD


def _update_held(
    session: Session, lease: Lease, values: dict[str, Any], *, forget_blobs: bool = False
) -> Row[bool] | None:
    row = session.execute(
        update(Job)
        .where(_held(lease))
        .values(**values)
        .returning(Job.cancel_requested)
        .execution_options(synchronize_session=False)
    ).first()
    if row is not None and forget_blobs:
        _forget_blobs(session, lease.job_id)
    return row


def _ending(state: State, retention_seconds: float, *, stored_bytes: int = 0) -> dict[str, Any]:
    return {
        "state": state,
        "stored_bytes": stored_bytes,
        "finished_at": now(),
        # An expiry that is already set is a client's DELETE, which the end of the job must not undo.
        "expires_at": func.coalesce(Job.expires_at, now(retention_seconds)),
        "worker": None,
        "lease_token": None,
        "lease_until": None,
    }


def _finished_progress(state: State) -> dict[str, Any]:
    fraction = 1.0 if state is State.SUCCEEDED else None
    return {**QUEUED_PROGRESS, "phase": state.value, "fraction": fraction}


def _end_where(session: Session, which: ColumnElement[bool], values: dict[str, Any]) -> int:
    ended = session.execute(
        update(Job)
        .where(which)
        .values(**values)
        .returning(Job.id)
        .execution_options(synchronize_session=False)
    ).all()
    for row in ended:
        _forget_blobs(session, row.id)
    return len(ended)


def _cancel_where(session: Session, which: ColumnElement[bool], retention_seconds: float) -> int:
    late = and_(Job.deadline_at.is_not(None), Job.deadline_at <= now())
    reasons: Sequence[tuple[ColumnElement[bool], Problem]] = (
        (and_(which, late), DeadlinePassed()),
        (which, CancelledByClient()),  # those that the line above has not ended
    )
    return sum(
        _end_where(
            session,
            condition,
            {
                **_ending(State.CANCELLED, retention_seconds),
                "error": problem.as_dict(),
                "progress": _finished_progress(State.CANCELLED),
            },
        )
        for condition, problem in reasons
    )


def _forget_blobs(session: Session, job_id: str) -> None:
    session.execute(delete(JobBlob).where(JobBlob.job_id == job_id))
