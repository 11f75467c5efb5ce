"""Stored bytes are counted from what is there, on both databases."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, text, update

from common import jobs, quotas, retention
from common.blobs import FileBlobStore, upload_key
from common.db import Database, Job, is_postgres, now
from common.errors import CancelledByClient, InsufficientStorage
from common.jobs import NewJob, Outcome

MODEL_BYTES, SAMPLES_BYTES, OUTPUT_BYTES, BESIDE_BYTES = 1000, 50, 900, 7
UPLOADS = MODEL_BYTES + SAMPLES_BYTES


def accept(
    database: Database, *, tenant: str = "acme", model: str = "a", limit_bytes: int = 0
) -> str:
    """Take a job in as the service does: its files first, then its row."""
    keys = {
        "model": upload_key(tenant, model * 64),
        "samples": upload_key(tenant, "f" * 64),
    }
    with database.write() as session:
        retention.reserve_blobs(
            session, {keys["model"]: MODEL_BYTES, keys["samples"]: SAMPLES_BYTES}
        )
    new = NewJob(
        tenant=tenant,
        request_id="r",
        spec={"model": {"sha256": model * 64}, "samples": {"sha256": "f" * 64}},
        model_sha256=model * 64,
        model_bytes=MODEL_BYTES,
        blobs=keys,
        client_metadata={},
    )
    with database.write() as session:
        return jobs.create(session, new, max_active_jobs=100, max_stored_bytes=limit_bytes).id


def stored(database: Database, tenant: str = "acme") -> int:
    """Return what a tenant has stored."""
    with database.read() as session:
        return quotas.stored_bytes(session, tenant)


def end(database: Database, job_id: str, *, well: bool) -> None:
    """Bring a queued job to its end."""
    with database.write() as session:
        lease = jobs.claim(session, worker="w", lease_seconds=600, job_id=job_id)
        assert lease is not None
        if not well:
            assert jobs.fail(session, lease, CancelledByClient(), retention_seconds=600)
            return
        outcome = Outcome(
            verdict=None,
            remediation=None,
            report={},
            output_key=f"outputs/{job_id}/1-t",
            output_sha256="c" * 64,
            output_bytes=OUTPUT_BYTES,
            beside_bytes=BESIDE_BYTES,
        )
        jobs.finish(session, lease, outcome, retention_seconds=600)


def test_upload_counts_once_and_each_job_with_what_it_will_leave(database: Database) -> None:
    """Equal bytes are one file; every job that is accepted counts an output of its model's size."""
    accept(database)
    assert stored(database) == UPLOADS + MODEL_BYTES
    accept(database)
    assert stored(database) == UPLOADS + 2 * MODEL_BYTES
    accept(database, model="b")
    assert stored(database) == UPLOADS + MODEL_BYTES + 3 * MODEL_BYTES
    assert stored(database, "other") == 0


def test_output_counts_as_what_it_is_once_it_is_there(database: Database) -> None:
    """A finished job counts its model and what lies beside it; one without a model counts nothing."""
    good, bad = accept(database), accept(database)
    end(database, good, well=True)
    end(database, bad, well=False)
    assert stored(database) == UPLOADS + OUTPUT_BYTES + BESIDE_BYTES


def test_cancelled_job_counts_nothing(database: Database) -> None:
    """A job that is cancelled before it began will leave nothing."""
    job_id = accept(database)
    with database.write() as session:
        jobs.cancel(session, "acme", job_id, retention_seconds=600)
    assert stored(database) == UPLOADS


def test_what_is_deleted_no_longer_counts(database: Database, store: FileBlobStore) -> None:
    """When the sweep has deleted a job's files, all of its bytes are free again."""
    job_id = accept(database)
    end(database, job_id, well=True)
    with database.write() as session:
        session.execute(update(Job).values(expires_at=now(-1)))
    assert stored(database) == UPLOADS + OUTPUT_BYTES + BESIDE_BYTES  # still on the disk
    with database.write() as session:
        assert retention.sweep_expired(session, store) == 1
    assert stored(database) == 0


def test_job_that_does_not_fit_is_refused_and_leaves_no_row(database: Database) -> None:
    """The last job that fits is accepted to the byte, the next one is told the numbers."""
    exactly = UPLOADS + 2 * MODEL_BYTES
    accept(database, limit_bytes=exactly)
    accept(database, limit_bytes=exactly)
    with pytest.raises(
        InsufficientStorage,
        match=f"{exactly} bytes are stored and {MODEL_BYTES} more are needed; {exactly} are",
    ):
        accept(database, limit_bytes=exactly)
    assert stored(database) == exactly
    accept(database, tenant="other", limit_bytes=exactly)  # another tenant's room is its own
    with database.read() as session:
        assert len(session.scalars(select(Job.id)).all()) == 3


def test_no_limit_is_no_limit(database: Database) -> None:
    """0 stands for no limit."""
    for _ in range(3):
        accept(database, limit_bytes=0)


def test_storage_quota_holds_under_a_race(database: Database) -> None:
    """Requests that arrive at once do not get past the quota together."""
    start = threading.Barrier(8)

    def attempt(_: int) -> bool:
        start.wait()
        try:
            accept(database, limit_bytes=UPLOADS + 3 * MODEL_BYTES)
        except InsufficientStorage:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 3
    assert stored(database) == UPLOADS + 3 * MODEL_BYTES


def test_count_reads_an_index_and_no_row(database: Database) -> None:
    """The sum over a tenant's jobs uses the partial index, whose condition it repeats to the letter."""
    for _ in range(3):
        accept(database)
    query = select(Job.stored_bytes).where(Job.tenant == "acme", Job.holds_something())
    with database.write() as session:
        if is_postgres(session):  # which would read so small a table from end to end
            session.execute(text("SET LOCAL enable_seqscan = off"))
            session.execute(text("SET LOCAL enable_bitmapscan = off"))
        compiled = query.compile(database.engine)
        given = compiled.params
        names = getattr(compiled, "positiontup", None)
        plan = session.connection().exec_driver_sql(
            f"{'EXPLAIN' if is_postgres(session) else 'EXPLAIN QUERY PLAN'} {compiled}",
            tuple(given[name] for name in names) if names else given,
        )
        assert "ix_jobs_stored" in str(plan.all())
