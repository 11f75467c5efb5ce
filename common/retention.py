"""
What is kept and for how long: uploads while an unfinished job needs them, outputs until they expire.

Nothing here changes the state of a job. Each deletion is such that a crash in the middle of it leaves
something that the next sweep deletes, never a row that names a file that is gone.
"""

from collections.abc import Iterable, Mapping

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from common.blobs import BlobStore, artefact_key, tenant_of, upload_key
from common.db import (
    TERMINAL_STATES,
    Blob,
    IdempotencyKey,
    Job,
    JobBlob,
    State,
    Worker,
    is_postgres,
    now,
)

_SWEEP_LIMIT = 500
_WORKER_MEMORY_SECONDS = 86400.0


def reserve_blobs(session: Session, sizes: Mapping[str, int]) -> None:
    """
    Announce that blobs of these *sizes* are about to be stored: the sweep leaves them alone.

    Call it in a transaction of its own before the files are moved to their place: the sweep deletes
    file and row under the row's lock, and only rows that nobody has touched for the grace time. From
    here on they count as their tenant's, as long as the row is there.
    """
    insert = postgresql.insert if is_postgres(session) else sqlite.insert
    for key in sorted(sizes):  # sorted: two requests that lock the same rows agree on the order
        session.execute(
            insert(Blob)
            .values(key=key, tenant=tenant_of(key), bytes=sizes[key], touched_at=now())
            .on_conflict_do_update(index_elements=[Blob.key], set_={"touched_at": now()})
        )


def claim_blobs(session: Session, keys: Iterable[str]) -> bool:
    """Return, in the transaction that inserts their job, whether all of *keys* are still kept."""
    return all(
        session.execute(
            update(Blob).where(Blob.key == key).values(touched_at=now()).returning(Blob.key)
        ).first()
        is not None
        for key in sorted(set(keys))
    )


def drop_unclaimed_blobs(session: Session, store: BlobStore, keys: Iterable[str]) -> None:
    """
    Delete those of *keys* that no unfinished job needs: their own was never made, or is deleted.

    It reserves them once more first, which takes the rows' locks: whoever else is about to claim one
    has either done so, which is seen here, or finds it gone (``claim_blobs``).
    """
    keys = set(keys)
    reserve_blobs(session, dict.fromkeys(keys, 0))  # those that are there keep their size
    for key in keys:
        needed_by = session.scalar(select(JobBlob.job_id).where(JobBlob.blob_key == key).limit(1))
        if needed_by is None:
            session.execute(delete(Blob).where(Blob.key == key))
            store.delete(key)


def sweep_expired(session: Session, store: BlobStore) -> int:
    """Files first, row second: a crash between them repeats the delete, which is harmless."""
    expired = session.scalars(
        select(Job)
        .where(
            Job.state.in_(sorted(TERMINAL_STATES)),
            Job.expires_at <= now(),
            Job.purged_at.is_(None),
        )
        .limit(_SWEEP_LIMIT)
    ).all()
    for job in expired:
        if job.output_key is not None:
            store.delete(job.output_key)
            for name in job.artefacts or ():
                store.delete(artefact_key(job.output_key, name))
        drop_unclaimed_blobs(session, store, _uploads(job))
        session.execute(
            update(Job).where(Job.id == job.id).values(purged_at=now(), report=None, stored_bytes=0)
        )
    return len(expired)


def _uploads(job: Job) -> list[str]:
    """Return the keys of what was uploaded for *job*."""
    files = (job.spec.get(role) for role in ("model", "samples", "evaluation", "triggered"))
    return [upload_key(job.tenant, file["sha256"]) for file in files if file]


def sweep_uploads(session: Session, store: BlobStore, grace_seconds: float) -> int:
    """
    Delete the uploads that no unfinished job needs.

    Row and file go under the row's lock: a request that wants the same bytes touches the row first
    (``reserve_blobs``), so it either waits and stores the file anew, or keeps this statement away.
    """
    needed = select(JobBlob.blob_key).where(JobBlob.blob_key == Blob.key).exists()
    stale = (
        select(Blob.key)
        .where(Blob.touched_at < now(-grace_seconds), ~needed)
        .limit(_SWEEP_LIMIT)
        .with_for_update(skip_locked=True)
    )
    keys = session.scalars(stale).all()
    for key in keys:
        session.execute(delete(Blob).where(Blob.key == key))
        store.delete(key)
    return len(keys)


def sweep_outputs(session: Session, store: BlobStore) -> int:
    """Delete outputs that no job names: their worker died between storing and finishing."""
    removed = 0
    for key in list(store.keys("outputs")):
        model_key = key.partition(".")[0]  # what lies beside a model stays and goes with it
        _, job_id, name = model_key.split("/")
        token = name.partition("-")[2]
        wanted = session.scalar(
            select(Job.id).where(
                Job.id == job_id,
                or_(
                    Job.output_key == model_key,
                    and_(Job.state == State.RUNNING, Job.lease_token == token),
                ),
            )
        )
        if wanted is None:
            store.delete(key)
            removed += 1
    return removed


def forget_idempotency(session: Session, *, older_than_seconds: float) -> None:
    """Forget keys whose promise has run out, and workers that were not heard of for a day."""
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.created_at < now(-older_than_seconds))
    )
    session.execute(delete(Worker).where(Worker.seen_at < now(-_WORKER_MEMORY_SECONDS)))
