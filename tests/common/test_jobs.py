"""The laws of a job's life, on both databases."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from common import jobs, retention
from common.artefacts import Artefact
from common.blobs import FileBlobStore, artefact_key, output_key, upload_key
from common.db import Blob, Database, IdempotencyKey, Job, JobBlob, State, Worker, now
from common.errors import (
    AlreadyEnded,
    DamagedFile,
    IdempotencyMismatch,
    InternalError,
    JobCrashed,
    NotFound,
    OutOfMemory,
    Problem,
    QuotaExceeded,
    Refused,
)
from common.jobs import Filter, Idempotency, Lease, NewJob, Outcome, Standing, Swept

LEASE_SECONDS = 45.0
RETENTION_SECONDS = 600.0
GRACE_SECONDS = 600.0
MODEL = upload_key("acme", "a" * 64)
SAMPLES = upload_key("acme", "b" * 64)
ONCE = Idempotency(token="t1", key="build-7", fingerprint="f" * 64)

OUTCOME = Outcome(
    verdict="backdoored",
    remediation="purified",
    report={"figures": [1, 2]},
    output_key="outputs/job_x/1-t",
    output_sha256="c" * 64,
    output_bytes=3,
    artefacts={"candidate-0": Artefact(sha256="d" * 64, bytes=3)},
)

Ending = Callable[[Database, str], object]


def create(
    database: Database,
    *,
    tenant: str = "acme",
    model_sha256: str = "a" * 64,
    priority: int = 0,
    cancel_after_seconds: float | None = None,
    blobs: Mapping[str, str] | None = None,
    max_active_jobs: int = 1000,
    idempotency: Idempotency | None = None,
) -> str:
    """Create a job in a transaction of its own and return its id."""
    new = NewJob(
        tenant=tenant,
        request_id="req_1",
        spec={"method": "none", "nested": {"seed": 1}},
        model_sha256=model_sha256,
        model_bytes=3,
        blobs={"model": MODEL, "samples": SAMPLES} if blobs is None else blobs,
        client_metadata={"commit": "abc"},
        priority=priority,
        cancel_after_seconds=cancel_after_seconds,
    )
    with database.write() as session:
        job = jobs.create(session, new, max_active_jobs=max_active_jobs, idempotency=idempotency)
        return job.id


def claim(
    database: Database, job_id: str | None = None, *, seconds: float = LEASE_SECONDS
) -> Lease | None:
    """Claim in a transaction of its own; negative *seconds* give a lease that has run out."""
    with database.write() as session:
        return jobs.claim(session, worker="w1", lease_seconds=seconds, job_id=job_id)


def running(database: Database, *, seconds: float = LEASE_SECONDS, **how: Any) -> Lease:
    """Create a job and claim it."""
    lease = claim(database, create(database, **how), seconds=seconds)
    assert lease is not None
    return lease


def row(database: Database, job_id: str) -> Job:
    """Return the job's row as it is stored."""
    with database.read() as session:
        return session.get_one(Job, job_id)


def snapshot(database: Database, job_id: str) -> dict[str, Any]:
    """Return every column of the job's row."""
    job = row(database, job_id)
    return {attribute.key: getattr(job, attribute.key) for attribute in Job.__mapper__.column_attrs}


def blobs_of(database: Database, job_id: str) -> set[str]:
    """Return the keys that the job still needs."""
    with database.read() as session:
        found = session.scalars(select(JobBlob.blob_key).where(JobBlob.job_id == job_id))
        return set(found)


def heartbeat(database: Database, lease: Lease, **progress: Any) -> Standing:
    """Renew the lease in a transaction of its own."""
    with database.write() as session:
        return jobs.heartbeat(session, lease, lease_seconds=LEASE_SECONDS, progress=progress)


def standing(database: Database, lease: Lease) -> Standing:
    """Look at the lease."""
    with database.read() as session:
        return jobs.standing(session, lease)


def finish(database: Database, lease: Lease, *, outcome: Outcome = OUTCOME) -> Standing:
    """Finish in a transaction of its own."""
    with database.write() as session:
        return jobs.finish(session, lease, outcome, retention_seconds=RETENTION_SECONDS)


def fail(database: Database, lease: Lease, problem: Problem | None = None) -> bool:
    """Fail in a transaction of its own."""
    with database.write() as session:
        return jobs.fail(
            session, lease, problem or DamagedFile(), retention_seconds=RETENTION_SECONDS
        )


def retry(database: Database, lease: Lease, problem: Problem) -> bool:
    """Retry in a transaction of its own."""
    with database.write() as session:
        return jobs.retry(session, lease, problem, retention_seconds=RETENTION_SECONDS)


def release(database: Database, lease: Lease) -> bool:
    """Release in a transaction of its own."""
    with database.write() as session:
        return jobs.release(session, lease)


def stop(database: Database, lease: Lease) -> bool:
    """Stop in a transaction of its own."""
    with database.write() as session:
        return jobs.stop(session, lease, retention_seconds=RETENTION_SECONDS)


def cancel(database: Database, job_id: str, *, tenant: str = "acme") -> Job:
    """Cancel in a transaction of its own."""
    with database.write() as session:
        return jobs.cancel(session, tenant, job_id, retention_seconds=RETENTION_SECONDS)


def purge(database: Database, job_id: str, *, tenant: str = "acme") -> Job:
    """Purge in a transaction of its own."""
    with database.write() as session:
        return jobs.purge(session, tenant, job_id, retention_seconds=RETENTION_SECONDS)


def sweep(
    database: Database, store: FileBlobStore, *, grace_seconds: float = GRACE_SECONDS
) -> Swept:
    """Sweep in a transaction of its own; a negative grace makes every upload an old one."""
    with database.write() as session:
        swept = jobs.sweep(
            session,
            store,
            retention_seconds=RETENTION_SECONDS,
            orphan_grace_seconds=grace_seconds,
        )
    assert swept is not None
    return swept


def reserve(database: Database, *keys: str) -> None:
    """Reserve in a transaction of its own."""
    with database.write() as session:
        retention.reserve_blobs(session, dict.fromkeys(keys, 3))


def put(store: FileBlobStore, key: str, content: bytes = b"abc") -> None:
    """Store *content* under *key*."""
    path = store.folder.parent / "incoming"
    path.write_bytes(content)
    store.put(key, path)


def change(database: Database, job_id: str, **values: Any) -> None:
    """Write to a row directly: what time alone would bring about."""
    with database.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(**values))


def let_the_lease_run_out(database: Database, job_id: str) -> None:
    """Move the end of the lease into the past."""
    change(database, job_id, lease_until=now(-1))


# Create --------------------------------------------------------------------------------------------


def test_created_job_is_queued_and_complete(database: Database) -> None:
    """A created job is queued, untouched, and holds what was asked for."""
    job_id = create(database, priority=3)
    job = row(database, job_id)
    assert job.state == State.QUEUED
    assert (job.attempt, job.memory_failures, job.cancel_requested) == (0, 0, False)
    assert job.spec == {"method": "none", "nested": {"seed": 1}}
    assert job.client_metadata == {"commit": "abc"}
    assert job.priority == 3
    assert job.progress == dict(jobs.QUEUED_PROGRESS)
    assert job.created_at.utcoffset() == timedelta(0)
    assert [job.started_at, job.finished_at, job.expires_at, job.deadline_at] == [None] * 4
    assert blobs_of(database, job_id) == {MODEL, SAMPLES}


def test_write_that_raises_leaves_nothing(database: Database) -> None:
    """A write block that raises leaves nothing of what it wrote."""

    def half_a_write() -> None:
        with database.write() as session:
            retention.reserve_blobs(session, {MODEL: 3})
            lease = jobs.claim(session, worker="w", lease_seconds=LEASE_SECONDS, job_id=job_id)
            assert lease is not None
            raise RuntimeError

    job_id = create(database)
    before = snapshot(database, job_id)
    with pytest.raises(RuntimeError):
        half_a_write()
    assert snapshot(database, job_id) == before
    with database.read() as session:
        assert session.get(Blob, MODEL) is None


def test_quota_counts_unfinished_jobs_of_the_tenant(database: Database) -> None:
    """A tenant may have so many unfinished jobs, whatever others have; ended ones do not count."""
    create(database, tenant="other", max_active_jobs=2)
    lease = running(database, max_active_jobs=2)
    create(database, max_active_jobs=2)
    with pytest.raises(QuotaExceeded, match="2 jobs are unfinished; 2 are allowed"):
        create(database, max_active_jobs=2)
    assert fail(database, lease)
    create(database, max_active_jobs=2)


def test_quota_holds_under_a_race(database: Database) -> None:
    """Requests that arrive at once do not get past the quota together."""
    start = threading.Barrier(10)

    def attempt(_: int) -> bool:
        start.wait()
        try:
            create(database, max_active_jobs=4)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(10) as pool:
        assert sum(pool.map(attempt, range(10))) == 4


def test_idempotency_key_replays_the_job(database: Database) -> None:
    """The same key with the same fingerprint finds the job that it made, in its present state."""
    job_id = create(database, idempotency=ONCE)
    cancel(database, job_id)
    with database.read() as session:
        found = jobs.find_replay(session, "acme", ONCE)
    assert found is not None
    assert (found.id, found.state) == (job_id, State.CANCELLED)


@pytest.mark.parametrize(
    ("tenant", "token", "key"),
    [("other", "t1", "build-7"), ("acme", "t2", "build-7"), ("acme", "t1", "build-8")],
)
def test_idempotency_key_belongs_to_tenant_and_token(
    database: Database, tenant: str, token: str, key: str
) -> None:
    """Another tenant, token or key finds nothing."""
    create(database, idempotency=ONCE)
    asked = Idempotency(token=token, key=key, fingerprint=ONCE.fingerprint)
    with database.read() as session:
        assert jobs.find_replay(session, tenant, asked) is None


def test_idempotency_key_with_another_payload_is_refused(database: Database) -> None:
    """A key is bound to its first payload."""
    create(database, idempotency=ONCE)
    other = Idempotency(token="t1", key="build-7", fingerprint="0" * 64)
    with database.read() as session, pytest.raises(IdempotencyMismatch):
        jobs.find_replay(session, "acme", other)


def test_idempotency_key_makes_one_job_under_a_race(database: Database) -> None:
    """Requests under one key that arrive at once make one job; the others are told."""
    start = threading.Barrier(8)

    def attempt(_: int) -> str | None:
        start.wait()
        with suppress(IntegrityError):
            return create(database, idempotency=ONCE)
        return None

    with ThreadPoolExecutor(8) as pool:
        made = [job_id for job_id in pool.map(attempt, range(8)) if job_id]
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1
        found = jobs.find_replay(session, "acme", ONCE)
    assert found is not None
    assert made == [found.id]


def test_idempotency_keys_and_silent_workers_are_forgotten(database: Database) -> None:
    """A key is forgotten after its time and not before; so is a worker after a day."""
    create(database, idempotency=ONCE)
    with database.write() as session:
        for name, age in (("gone", 86_500.0), ("here", 10.0)):
            session.add(
                Worker(
                    name=name, device="cpu", versions={}, started_at=now(-age), seen_at=now(-age)
                )
            )
    with database.write() as session:
        retention.forget_idempotency(session, older_than_seconds=60)
    with database.read() as session:
        assert jobs.find_replay(session, "acme", ONCE) is not None
        assert list(session.scalars(select(Worker.name))) == ["here"]
    with database.write() as session:
        retention.forget_idempotency(session, older_than_seconds=-60)
    with database.read() as session:
        assert jobs.find_replay(session, "acme", ONCE) is None


# Read ----------------------------------------------------------------------------------------------


def test_another_tenants_job_does_not_exist(database: Database, store: FileBlobStore) -> None:
    """Another tenant's id answers exactly as an unknown one does, and changes nothing."""
    job_id = create(database)
    before = snapshot(database, job_id)
    with database.write() as session:
        for act in (
            lambda: jobs.get(session, "other", job_id),
            lambda: jobs.cancel(session, "other", job_id, retention_seconds=1),
            lambda: jobs.purge(session, "other", job_id, retention_seconds=1),
            lambda: jobs.page(session, "other", Filter(), limit=5, after=job_id),
        ):
            with pytest.raises(NotFound) as theirs:
                act()
            assert job_id in str(theirs.value)
        with pytest.raises(NotFound) as unknown:
            jobs.get(session, "other", "job_0")
        assert str(theirs.value).replace(job_id, "job_0") == str(unknown.value)
        assert jobs.page(session, "other", Filter(), limit=5, after=None) == ([], False)
    assert snapshot(database, job_id) == before


@pytest.mark.parametrize("same_moment", [False, True])
def test_pages_show_every_job_once_newest_first(database: Database, *, same_moment: bool) -> None:
    """Walking the cursor meets every job once, newest first, also where moments are equal."""
    created = [create(database) for _ in range(7)]
    for age, job_id in enumerate(reversed(created)):
        change(database, job_id, created_at=row(database, created[0]).created_at
               - timedelta(seconds=0 if same_moment else age))  # fmt: skip
    seen: list[str] = []
    with database.read() as session:
        more, after = True, None
        while more:
            found, more = jobs.page(session, "acme", Filter(), limit=3, after=after)
            assert len(found) == (3 if more else 1)
            seen += [job.id for job in found]
            after = seen[-1]
    assert seen == (sorted(created, reverse=True) if same_moment else created[::-1])


def test_page_says_exactly_whether_there_is_more(database: Database) -> None:
    """A page that ends with the last job has nothing behind it."""
    create(database)
    create(database)
    with database.read() as session:
        assert jobs.page(session, "acme", Filter(), limit=2, after=None)[1] is False
        assert jobs.page(session, "acme", Filter(), limit=1, after=None)[1] is True


def test_filters_narrow_the_list(database: Database) -> None:
    """State, verdict and model digest each narrow the list, alone and together."""
    done = running(database, model_sha256="d" * 64)
    finish(database, done)
    queued = create(database)

    def ids(**wanted: str) -> list[str]:
        with database.read() as session:
            found, _ = jobs.page(session, "acme", Filter(**wanted), limit=9, after=None)
            return [job.id for job in found]

    assert ids(state="queued") == [queued]
    assert ids(verdict="backdoored") == [done.job_id]
    assert ids(sha256="d" * 64) == [done.job_id]
    assert ids(state="queued", sha256="d" * 64) == []


# Claim ---------------------------------------------------------------------------------------------


def test_claim_starts_the_job(database: Database) -> None:
    """A claim makes the job running, counts the attempt and says all that a worker must know."""
    job_id = create(database)
    lease = claim(database)
    assert lease is not None
    job = row(database, job_id)
    assert (job.state, job.attempt, job.worker) == (State.RUNNING, 1, "w1")
    assert job.lease_token == lease.token
    assert job.lease_until is not None
    assert job.started_at is not None
    left = (job.lease_until - job.started_at).total_seconds()
    assert left == pytest.approx(LEASE_SECONDS, abs=1)
    assert job.progress["phase"] == "starting"
    assert (lease.job_id, lease.tenant, lease.attempt) == (job_id, "acme", 1)
    assert lease.spec == job.spec
    assert lease.blobs == {"model": MODEL, "samples": SAMPLES}
    assert lease.request_id == "req_1"


def test_nothing_to_claim_is_none(database: Database) -> None:
    """No queued job, an unknown id, a running job and an ended one all give no lease."""
    assert claim(database) is None
    assert claim(database, "job_0") is None
    lease = running(database)
    assert claim(database) is None
    assert claim(database, lease.job_id) is None
    finish(database, lease)
    assert claim(database, lease.job_id) is None


def test_claims_race_and_each_job_is_taken_once(database: Database) -> None:
    """Many workers at once get every job exactly once and lose none."""
    created = {create(database) for _ in range(30)}
    start = threading.Barrier(8)

    def work(_: int) -> list[str]:
        start.wait()
        taken = []
        while (lease := claim(database)) is not None:
            taken.append(lease.job_id)
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = [job_id for found in pool.map(work, range(8)) for job_id in found]
    assert len(taken) == 30
    assert set(taken) == created


def test_one_message_for_many_workers_gives_one_lease(database: Database) -> None:
    """A doubled message is harmless: of many claims of one id, one gets it."""
    job_id = create(database)
    start = threading.Barrier(8)

    def work(_: int) -> bool:
        start.wait()
        return claim(database, job_id) is not None

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 1
    assert row(database, job_id).attempt == 1


def test_higher_priority_first_then_older_first(database: Database) -> None:
    """The queue is ordered by priority, and by age within one."""
    low = create(database, priority=-1)
    old = create(database, priority=0)
    new = create(database, priority=0)
    high = create(database, priority=9)
    for age, job_id in enumerate((new, old, high, low)):
        change(database, job_id, created_at=now(-100.0 * (age + 1)))
    order = []
    while (lease := claim(database)) is not None:
        order.append(lease.job_id)
    assert order == [high, old, new, low]


def test_job_past_its_deadline_is_not_started(database: Database, store: FileBlobStore) -> None:
    """A queued job whose deadline has passed is never claimed; the sweep ends it."""
    job_id = create(database, cancel_after_seconds=-1)
    assert claim(database) is None
    assert claim(database, job_id) is None
    assert sweep(database, store).ended == 1
    job = row(database, job_id)
    assert job.state == State.CANCELLED
    assert job.error is not None
    assert job.error["code"] == "deadline-passed"
    assert blobs_of(database, job_id) == set()


def test_job_before_its_deadline_is_started(database: Database) -> None:
    """A deadline in the future changes nothing yet."""
    assert running(database, cancel_after_seconds=60).attempt == 1


# Lease ---------------------------------------------------------------------------------------------


def test_heartbeat_renews_and_carries_progress(database: Database) -> None:
    """A heartbeat moves the end of the lease and publishes the progress."""
    lease = running(database, seconds=1)
    before = row(database, lease.job_id).lease_until
    progress = {"phase": "purify", "fraction": 0.5, "step": 3, "total": 6, "eta_seconds": 9}
    assert heartbeat(database, lease, **progress) is Standing.HELD
    job = row(database, lease.job_id)
    assert job.progress == progress
    assert job.lease_until is not None
    assert before is not None
    assert job.lease_until - before > timedelta(seconds=LEASE_SECONDS - 5)


def test_heartbeat_and_standing_tell_of_a_cancel(database: Database) -> None:
    """A worker whose job shall stop learns it from both, and still holds its lease."""
    lease = running(database)
    assert standing(database, lease) is Standing.HELD
    cancel(database, lease.job_id)
    assert standing(database, lease) is Standing.CANCELLED
    assert heartbeat(database, lease) is Standing.CANCELLED


def test_finish_stores_the_outcome(database: Database) -> None:
    """A finished job has its outcome and an expiry, and needs no upload any more."""
    lease = running(database)
    assert finish(database, lease) is Standing.HELD
    job = row(database, lease.job_id)
    assert job.state == State.SUCCEEDED
    assert (job.verdict, job.remediation) == ("backdoored", "purified")
    assert job.report == {"figures": [1, 2]}
    assert (job.output_key, job.output_bytes) == ("outputs/job_x/1-t", 3)
    assert job.artefacts == {"candidate-0": {"sha256": "d" * 64, "bytes": 3}}
    assert job.finished_at is not None
    assert job.expires_at is not None
    kept = (job.expires_at - job.finished_at).total_seconds()
    assert kept == pytest.approx(RETENTION_SECONDS, abs=1)
    assert job.progress["fraction"] == 1.0
    assert (job.worker, job.lease_token, job.lease_until) == (None, None, None)
    assert blobs_of(database, lease.job_id) == set()


def test_finish_after_a_cancel_does_not_succeed(database: Database) -> None:
    """A cancel that came first wins: the worker is told, stops, and the job is cancelled."""
    lease = running(database)
    cancel(database, lease.job_id)
    assert finish(database, lease) is Standing.CANCELLED
    job = row(database, lease.job_id)
    assert (job.state, job.output_key) == (State.RUNNING, None)
    assert blobs_of(database, lease.job_id)
    assert stop(database, lease)
    job = row(database, lease.job_id)
    assert job.state == State.CANCELLED
    assert job.error is not None
    assert job.error["code"] == "cancelled"
    assert blobs_of(database, lease.job_id) == set()


def test_fail_stores_the_problem(database: Database) -> None:
    """A failed job holds the problem as a client reads it, and a report if there is one."""
    lease = running(database)
    with database.write() as session:
        assert jobs.fail(
            session,
            lease,
            DamagedFile("It is cut off."),
            retention_seconds=RETENTION_SECONDS,
            report={"figures": [0]},
        )
    job = row(database, lease.job_id)
    assert job.state == State.FAILED
    assert job.error == DamagedFile("It is cut off.").as_dict()
    assert job.report == {"figures": [0]}
    assert job.progress["fraction"] is None
    assert blobs_of(database, lease.job_id) == set()


LOSSES: Mapping[str, Callable[[Database, Lease, FileBlobStore], object]] = {
    "swept": lambda db, lease, store: sweep(db, store),
    "swept and claimed anew": lambda db, lease, store: (
        sweep(db, store),
        claim(db, lease.job_id),
    ),
    "released": lambda db, lease, store: release(db, lease),
    "finished": lambda db, lease, store: finish(db, lease),
    "failed": lambda db, lease, store: fail(db, lease),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_lost_lease_changes_nothing(database: Database, store: FileBlobStore, loss: str) -> None:
    """Whoever lost the lease is told so by every statement, and none of them writes."""
    lease = running(database, seconds=-1)
    LOSSES[loss](database, lease, store)
    before = snapshot(database, lease.job_id)
    blobs = blobs_of(database, lease.job_id)
    assert standing(database, lease) is Standing.LOST
    assert heartbeat(database, lease, phase="ghost") is Standing.LOST
    assert finish(database, lease) is Standing.LOST
    assert fail(database, lease) is False
    assert retry(database, lease, JobCrashed()) is False
    assert retry(database, lease, OutOfMemory()) is False
    assert retry(database, lease, DamagedFile()) is False
    assert release(database, lease) is False
    assert stop(database, lease) is False
    assert snapshot(database, lease.job_id) == before
    assert blobs_of(database, lease.job_id) == blobs


def test_invented_token_holds_nothing(database: Database) -> None:
    """A token that the claim did not give out is no lease."""
    lease = running(database)
    forged = Lease(
        job_id=lease.job_id,
        tenant=lease.tenant,
        token="0" * 32,
        attempt=lease.attempt,
        spec={},
        blobs={},
        request_id="r",
    )
    assert heartbeat(database, forged) is Standing.LOST
    assert finish(database, forged) is Standing.LOST
    assert heartbeat(database, lease) is Standing.HELD


# Retry ---------------------------------------------------------------------------------------------


def test_crash_is_retried_until_the_attempts_are_used_up(database: Database) -> None:
    """A crash puts the job back twice; the third is final."""
    job_id = create(database)
    for attempt in range(1, jobs.MAX_ATTEMPTS + 1):
        lease = claim(database, job_id)
        assert lease is not None
        assert lease.attempt == attempt
        assert retry(database, lease, JobCrashed())
        job = row(database, job_id)
        if attempt < jobs.MAX_ATTEMPTS:
            assert (job.state, job.attempt) == (State.QUEUED, attempt)
            assert (job.lease_token, job.worker) == (None, None)
            assert job.progress == dict(jobs.QUEUED_PROGRESS)
            assert blobs_of(database, job_id) == {MODEL, SAMPLES}
    assert row(database, job_id).state == State.FAILED
    assert row(database, job_id).error == JobCrashed().as_dict()
    assert blobs_of(database, job_id) == set()


def test_lack_of_memory_is_retried_once(database: Database) -> None:
    """The second time out of memory is final, with attempts left."""
    job_id = create(database)
    for failures in range(1, jobs.MAX_MEMORY_FAILURES + 1):
        assert row(database, job_id).state == State.QUEUED
        lease = claim(database, job_id)
        assert lease is not None
        assert retry(database, lease, OutOfMemory())
        assert failures == jobs.MAX_MEMORY_FAILURES or (
            row(database, job_id).memory_failures == failures
        )
    job = row(database, job_id)
    assert (job.state, job.error) == (State.FAILED, OutOfMemory().as_dict())


def test_mixed_failures_come_to_an_end(database: Database) -> None:
    """No order of crashes and memory failures keeps a job alive for ever."""
    job_id = create(database)
    problems: list[Problem] = [JobCrashed(), JobCrashed(), OutOfMemory(), JobCrashed()]
    for problem in problems:
        lease = claim(database, job_id)
        assert lease is not None
        assert retry(database, lease, problem)
    assert row(database, job_id).state == State.FAILED


@pytest.mark.parametrize("problem", [DamagedFile("x"), Refused("y")])
def test_bad_input_is_never_retried(database: Database, problem: Problem) -> None:
    """What the client sent fails the job at the first attempt."""
    lease = running(database)
    assert retry(database, lease, problem)
    job = row(database, lease.job_id)
    assert (job.state, job.attempt, job.error) == (State.FAILED, 1, problem.as_dict())


def test_release_does_not_use_up_an_attempt(database: Database) -> None:
    """A job that is handed back any number of times still has all its attempts."""
    job_id = create(database)
    for _ in range(jobs.MAX_ATTEMPTS + 2):
        lease = claim(database, job_id)
        assert lease is not None
        assert lease.attempt == 1
        assert release(database, lease)
        job = row(database, job_id)
        assert (job.state, job.attempt, job.lease_token) == (State.QUEUED, 0, None)
    assert blobs_of(database, job_id) == {MODEL, SAMPLES}


def test_first_start_is_kept_over_attempts(database: Database) -> None:
    """``started_at`` is the first start, however often the job starts again."""
    lease = running(database)
    started = row(database, lease.job_id).started_at
    release(database, lease)
    claim(database, lease.job_id)
    assert row(database, lease.job_id).started_at == started


# Cancel --------------------------------------------------------------------------------------------


def test_queued_job_is_cancelled_at_once(database: Database) -> None:
    """A job that nobody works on ends with the request."""
    job_id = create(database)
    job = cancel(database, job_id)
    assert job.state == State.CANCELLED
    assert job.error is not None
    assert job.error["code"] == "cancelled"
    assert job.finished_at is not None
    assert blobs_of(database, job_id) == set()
    assert claim(database, job_id) is None


def test_running_job_is_asked_to_stop(database: Database) -> None:
    """A running job goes on until its worker has heard of the cancel."""
    lease = running(database)
    job = cancel(database, lease.job_id)
    assert (job.state, job.cancel_requested) == (State.RUNNING, True)


def test_cancel_twice_is_harmless(database: Database) -> None:
    """A second cancel answers as the first one and changes nothing."""
    job_id = create(database)
    cancel(database, job_id)
    before = snapshot(database, job_id)
    assert cancel(database, job_id).state == State.CANCELLED
    assert snapshot(database, job_id) == before


@pytest.mark.parametrize("end", [finish, fail])
def test_ended_job_cannot_be_cancelled(
    database: Database, end: Callable[[Database, Lease], object]
) -> None:
    """A job that has ended otherwise says so."""
    lease = running(database)
    end(database, lease)
    before = snapshot(database, lease.job_id)
    with pytest.raises(AlreadyEnded):
        cancel(database, lease.job_id)
    assert snapshot(database, lease.job_id) == before


def test_cancel_that_loses_the_race_says_so(database: Database) -> None:
    """A job that ends while it is being cancelled is never reported as if it were cancelled."""
    if database.is_sqlite:
        pytest.skip("SQLite has one writer, so nothing can end in between")
    lease = running(database)
    with database.write() as session:
        jobs.get(session, "acme", lease.job_id)  # what the request has seen
        finish(database, lease)
        with pytest.raises(AlreadyEnded):
            jobs.cancel(session, "acme", lease.job_id, retention_seconds=RETENTION_SECONDS)


@pytest.mark.parametrize("hand_back", ["release", "retry", "memory", "sweep"])
def test_cancel_survives_a_worker_that_hands_back(
    database: Database, store: FileBlobStore, hand_back: str
) -> None:
    """A job that was asked to stop ends as cancelled, even if its worker hands it back unheard."""
    lease = running(database)
    cancel(database, lease.job_id)
    match hand_back:
        case "release":
            release(database, lease)
        case "retry":
            retry(database, lease, JobCrashed())
        case "memory":
            retry(database, lease, OutOfMemory())
        case "sweep":
            let_the_lease_run_out(database, lease.job_id)
    assert claim(database, lease.job_id) is None
    sweep(database, store)
    job = row(database, lease.job_id)
    assert job.state == State.CANCELLED
    assert job.error is not None
    assert job.error["code"] == "cancelled"
    assert blobs_of(database, lease.job_id) == set()


# Purge ---------------------------------------------------------------------------------------------


def test_purge_of_a_queued_job_cancels_and_expires_it(
    database: Database, store: FileBlobStore
) -> None:
    """A deleted queued job ends at once, and its files are gone with the next sweep."""
    job_id = create(database)
    assert purge(database, job_id).state == State.CANCELLED
    with database.read() as session:
        assert jobs.is_expired(session, jobs.get(session, "acme", job_id))
    assert sweep(database, store).purged == 1
    assert row(database, job_id).purged_at is not None


@pytest.mark.parametrize("end", [finish, fail, stop])
def test_purge_of_a_running_job_outlives_its_end(
    database: Database, store: FileBlobStore, end: Callable[[Database, Lease], object]
) -> None:
    """A running job that is deleted expires as soon as it has ended, however it ends."""
    lease = running(database)
    assert purge(database, lease.job_id).cancel_requested
    assert sweep(database, store).purged == 0
    if end is finish:
        assert finish(database, lease) is Standing.CANCELLED
        assert stop(database, lease)
    else:
        end(database, lease)
    assert sweep(database, store).purged == 1
    assert row(database, lease.job_id).report is None


def test_purge_of_a_finished_job_deletes_the_model_and_keeps_the_row(
    database: Database, store: FileBlobStore
) -> None:
    """After a delete the bytes and the report are gone, and the audit row says what happened."""
    lease = running(database)
    key = output_key(lease.job_id, 1, lease.token)
    put(store, key)
    put(store, artefact_key(key, "candidate-0"))
    outcome = Outcome(
        verdict="clean",
        remediation="unchanged",
        report={"figures": []},
        output_key=key,
        output_sha256="c" * 64,
        output_bytes=3,
        artefacts={"candidate-0": Artefact(sha256="d" * 64, bytes=3)},
    )
    finish(database, lease, outcome=outcome)
    with database.read() as session:
        assert not jobs.is_expired(session, jobs.get(session, "acme", lease.job_id))
    assert purge(database, lease.job_id).state == State.SUCCEEDED
    assert sweep(database, store).purged == 1
    assert list(store.keys("outputs")) == []
    job = row(database, lease.job_id)
    assert (job.state, job.verdict, job.report) == (State.SUCCEEDED, "clean", None)
    assert job.purged_at is not None
    assert sweep(database, store).purged == 0


# Sweep ---------------------------------------------------------------------------------------------


def test_sweep_of_nothing_does_nothing(database: Database, store: FileBlobStore) -> None:
    """An idle service has nothing to sweep."""
    assert sweep(database, store) == Swept(waiting=[])


def test_expired_lease_is_queued_again_until_the_attempts_are_used_up(
    database: Database, store: FileBlobStore
) -> None:
    """A vanished worker costs an attempt; the third ends the job as ``worker-lost``."""
    job_id = create(database)
    for attempt in range(1, jobs.MAX_ATTEMPTS + 1):
        lease = claim(database, job_id, seconds=-1)
        assert lease is not None
        assert lease.attempt == attempt
        swept = sweep(database, store)
        job = row(database, job_id)
        if attempt < jobs.MAX_ATTEMPTS:
            assert (swept.requeued, swept.ended, swept.waiting) == (1, 0, [job_id])
            assert (job.state, job.attempt, job.lease_token) == (State.QUEUED, attempt, None)
            assert blobs_of(database, job_id) == {MODEL, SAMPLES}
        else:
            assert (swept.requeued, swept.ended, swept.waiting) == (0, 1, [])
    assert job.state == State.FAILED
    assert job.error is not None
    assert job.error["code"] == "worker-lost"
    assert blobs_of(database, job_id) == set()


def test_living_lease_is_left_alone(database: Database, store: FileBlobStore) -> None:
    """A sweep does not touch a job whose worker is alive, nor its uploads."""
    lease = running(database)
    reserve(database, MODEL, SAMPLES)
    before = snapshot(database, lease.job_id)
    assert sweep(database, store, grace_seconds=-60) == Swept(waiting=[])
    assert snapshot(database, lease.job_id) == before


def test_renewed_lease_survives_the_sweep(database: Database, store: FileBlobStore) -> None:
    """A heartbeat that comes late but before the sweep saves the lease."""
    lease = running(database, seconds=-1)
    assert heartbeat(database, lease) is Standing.HELD
    assert sweep(database, store).requeued == 0
    assert standing(database, lease) is Standing.HELD


@pytest.mark.parametrize("attempts", [1, 3])
def test_expired_lease_of_a_cancelled_job_ends_it(
    database: Database, store: FileBlobStore, attempts: int
) -> None:
    """A job that was asked to stop is cancelled when its worker vanishes, not queued again."""
    job_id = create(database)
    for _ in range(attempts - 1):
        claim(database, job_id, seconds=-1)
        sweep(database, store)
    claim(database, job_id, seconds=-1)
    cancel(database, job_id)
    swept = sweep(database, store)
    assert (swept.requeued, swept.ended) == (0, 1)
    assert row(database, job_id).state == State.CANCELLED


def test_deadline_of_a_running_job_asks_it_to_stop(
    database: Database, store: FileBlobStore
) -> None:
    """A running job whose deadline passes is asked to stop, and the error names the deadline."""
    lease = running(database, cancel_after_seconds=60)
    change(database, lease.job_id, deadline_at=now(-1))
    assert standing(database, lease) is Standing.HELD
    sweep(database, store)
    assert standing(database, lease) is Standing.CANCELLED
    assert stop(database, lease)
    job = row(database, lease.job_id)
    assert job.state == State.CANCELLED
    assert job.error is not None
    assert job.error["code"] == "deadline-passed"


def test_deadline_of_an_ended_job_means_nothing(database: Database, store: FileBlobStore) -> None:
    """A deadline that passes after the end changes nothing."""
    lease = running(database, cancel_after_seconds=60)
    finish(database, lease)
    change(database, lease.job_id, deadline_at=now(-1))
    before = snapshot(database, lease.job_id)
    assert sweep(database, store).ended == 0
    assert snapshot(database, lease.job_id) == before


def test_sweep_names_waiting_jobs_in_the_queues_order(
    database: Database, store: FileBlobStore
) -> None:
    """The jobs to ring for come in the order in which they will be claimed."""
    low, high = create(database), create(database, priority=5)
    running_job = running(database, priority=9)
    waiting = sweep(database, store).waiting
    assert list(waiting) == [high, low]
    assert running_job.job_id not in waiting


def test_expired_result_is_deleted_and_its_row_kept(
    database: Database, store: FileBlobStore
) -> None:
    """After the retention the model is gone and the row remains; before it nothing is touched."""
    lease = running(database)
    key = output_key(lease.job_id, 1, lease.token)
    put(store, key)
    finish(database, lease, outcome=Outcome(**{**OUTCOME.__dict__, "output_key": key}))
    assert sweep(database, store).purged == 0
    assert list(store.keys("outputs")) == [key]
    change(database, lease.job_id, expires_at=now(-1))
    assert sweep(database, store).purged == 1
    assert list(store.keys("outputs")) == []
    assert row(database, lease.job_id).state == State.SUCCEEDED


def test_orphan_upload_is_deleted_after_the_grace(database: Database, store: FileBlobStore) -> None:
    """An upload that no job needs is deleted, file and row, once it has grown old."""
    reserve(database, MODEL)
    put(store, MODEL)
    assert sweep(database, store).orphans == 0
    assert list(store.keys("uploads")) == [MODEL]
    assert sweep(database, store, grace_seconds=-60).orphans == 1
    assert list(store.keys("uploads")) == []
    with database.read() as session:
        assert session.get(Blob, MODEL) is None


@pytest.mark.parametrize("state", ["queued", "running", "requeued"])
def test_upload_of_an_unfinished_job_is_never_an_orphan(
    database: Database, store: FileBlobStore, state: str
) -> None:
    """However old it is, an upload stays while an unfinished job needs it."""
    reserve(database, MODEL)
    put(store, MODEL)
    job_id = create(database)
    if state != "queued":
        lease = claim(database, job_id)
        assert lease is not None
        if state == "requeued":
            release(database, lease)
    assert sweep(database, store, grace_seconds=-60).orphans == 0
    assert list(store.keys("uploads")) == [MODEL]


def test_upload_that_two_jobs_share_stays_until_both_ended(
    database: Database, store: FileBlobStore
) -> None:
    """The end of one job does not take the file from under another."""
    reserve(database, MODEL)
    put(store, MODEL)
    first, second = create(database), create(database)
    cancel(database, first)
    assert sweep(database, store, grace_seconds=-60).orphans == 0
    cancel(database, second)
    assert sweep(database, store, grace_seconds=-60).orphans == 1


def test_touched_upload_is_young_again(database: Database, store: FileBlobStore) -> None:
    """A reservation of a known upload keeps it for another grace."""
    reserve(database, MODEL)
    with database.write() as session:
        session.execute(update(Blob).values(touched_at=now(-2 * GRACE_SECONDS)))
    reserve(database, MODEL)
    assert sweep(database, store).orphans == 0


class _SlowStore(FileBlobStore):
    """A store whose delete takes as long as the test wants."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.deleting = threading.Event()
        self.may_delete = threading.Event()

    def delete(self, key: str) -> None:
        """Say that the delete has begun, and wait."""
        self.deleting.set()
        assert self.may_delete.wait(20)
        super().delete(key)


def test_reservation_during_the_sweep_waits_and_stores_anew(
    database: Database, tmp_path: Path
) -> None:
    """A request that reserves what the sweep is deleting goes second, and its file stays."""
    store = _SlowStore(tmp_path / "blobs")
    reserve(database, MODEL)
    put(store, MODEL)
    reserved = threading.Event()

    def request() -> None:
        reserve(database, MODEL)
        reserved.set()
        put(store, MODEL, b"anew")

    with ThreadPoolExecutor(2) as pool:
        swept = pool.submit(sweep, database, store, grace_seconds=-60)
        assert store.deleting.wait(20)
        requested = pool.submit(request)
        assert not reserved.wait(0.3)
        store.may_delete.set()
        assert swept.result().orphans == 1
        requested.result()
    with store.open(MODEL) as file:
        assert file.read() == b"anew"
    with database.read() as session:
        assert session.get(Blob, MODEL) is not None
    assert sweep(database, store).orphans == 0


def test_sweep_during_a_reservation_leaves_the_file(
    database: Database, store: FileBlobStore
) -> None:
    """A sweep that meets an open reservation keeps its hands off."""
    reserve(database, MODEL)
    with database.write() as session:
        session.execute(update(Blob).values(touched_at=now(-2 * GRACE_SECONDS)))
    put(store, MODEL)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            retention.reserve_blobs(session, {MODEL: 3})
            swept = pool.submit(sweep, database, store)
            time.sleep(0.2)
        assert swept.result().orphans == 0
    assert list(store.keys("uploads")) == [MODEL]


def test_reservations_of_the_same_files_do_not_deadlock(database: Database) -> None:
    """Two requests that name the same files in another order both get through."""
    keys = [upload_key("acme", digit * 64) for digit in "0123456789"]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(lambda n: reserve(database, *(keys if n % 2 else keys[::-1])), range(24)),
        )
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Blob)) == 10


def test_one_sweep_at_a_time(database: Database, tmp_path: Path) -> None:
    """A second sweep does not run beside the first: it is turned away, or waits its turn."""
    store = _SlowStore(tmp_path / "blobs")
    reserve(database, MODEL)

    def second() -> Swept | None:
        with database.write() as session:
            return jobs.sweep(session, store, retention_seconds=1, orphan_grace_seconds=-60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(sweep, database, store, grace_seconds=-60)
        assert store.deleting.wait(20)
        other = pool.submit(second)
        if not database.is_sqlite:
            assert other.result(20) is None
        store.may_delete.set()
        assert first.result().orphans == 1
        assert other.result() in (None, Swept(waiting=[]))


def test_only_outputs_that_nobody_names_are_swept(database: Database, store: FileBlobStore) -> None:
    """The finished job's output and the running lease's stay; every other one is deleted."""
    done, going, lost = running(database), running(database), running(database, seconds=-1)
    models = [output_key(lease.job_id, lease.attempt, lease.token) for lease in (done, going)]
    kept = [*models, *(artefact_key(key, "candidate-0") for key in models)]
    orphans = [
        output_key(done.job_id, 7, "e" * 32),
        output_key(going.job_id, 1, "e" * 32),
        output_key(lost.job_id, lost.attempt, lost.token),
        output_key("job_unknown", 1, "e" * 32),
    ]
    orphans += [artefact_key(key, "candidate-0") for key in orphans]
    for key in (*kept, *orphans):
        put(store, key)
    finish(database, done, outcome=Outcome(**{**OUTCOME.__dict__, "output_key": models[0]}))
    sweep(database, store)
    with database.write() as session:
        assert retention.sweep_outputs(session, store) == len(orphans)
    assert sorted(store.keys("outputs")) == sorted(kept)


# Terminal states -----------------------------------------------------------------------------------


def _succeed(database: Database, job_id: str) -> None:
    lease = claim(database, job_id)
    assert lease is not None
    assert finish(database, lease) is Standing.HELD


def _break(database: Database, job_id: str) -> None:
    lease = claim(database, job_id)
    assert lease is not None
    assert fail(database, lease, InternalError())


ENDINGS: Mapping[str, Ending] = {"succeeded": _succeed, "failed": _break, "cancelled": cancel}


@pytest.mark.parametrize("state", ENDINGS)
def test_terminal_states_are_final(database: Database, store: FileBlobStore, state: str) -> None:
    """No operation, by whomever, moves an ended job; a delete only makes it expire."""
    job_id = create(database, cancel_after_seconds=3600)
    ENDINGS[state](database, job_id)
    assert row(database, job_id).state == state
    before = snapshot(database, job_id)
    assert claim(database, job_id) is None
    with suppress(AlreadyEnded):
        cancel(database, job_id)
    sweep(database, store, grace_seconds=-60)
    assert snapshot(database, job_id) == before
    purge(database, job_id)
    sweep(database, store)
    after = snapshot(database, job_id)
    changed = {name for name, value in before.items() if after[name] != value}
    assert changed <= {"expires_at", "purged_at", "report", "stored_bytes"}


def test_deleted_row_takes_its_claims_along(database: Database) -> None:
    """No claim on a file and no idempotency key outlives its job's row."""
    job_id = create(database, idempotency=ONCE)
    with database.write() as session:
        session.execute(delete(Job).where(Job.id == job_id))
    assert blobs_of(database, job_id) == set()
    with database.read() as session:
        assert session.scalars(select(IdempotencyKey)).all() == []
