"""
What one tenant may have at a time: unfinished jobs, and stored bytes.

Both are counted from the rows themselves, never kept as a number that could drift from them; the counts
read an index alone. What a job will leave counts from its acceptance on as one more file of its model's
size: else a model that is stored once could be sent again and again, and every job would leave a copy.
"""

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from common.db import Blob, Job, State, is_postgres
from common.errors import InsufficientStorage, QuotaExceeded

_LOCK = 0x51554F54  # any constant of ours


def take_turns(session: Session, tenant: str) -> None:
    """Make requests of one tenant count one after the other: at once they would all find room."""
    if is_postgres(session):  # SQLite has one writer anyway
        session.execute(
            text("SELECT pg_advisory_xact_lock(:space, hashtext(:tenant))"),
            {"space": _LOCK, "tenant": tenant},
        )


def check_active_jobs(session: Session, tenant: str, *, max_active_jobs: int) -> None:
    """
    Refuse a tenant that has too many unfinished jobs.

    Raises:
        QuotaExceeded: It has *max_active_jobs* or more.
    """
    active = session.scalar(
        select(func.count())
        .select_from(Job)
        .where(Job.tenant == tenant, Job.state.in_([State.QUEUED, State.RUNNING]))
    )
    if (active or 0) >= max_active_jobs:
        raise QuotaExceeded(f"{active} jobs are unfinished; {max_active_jobs} are allowed.")


def check_storage(
    session: Session, tenant: str, *, adding_bytes: int, max_stored_bytes: int
) -> None:
    """
    Refuse a tenant whose stored files and *adding_bytes* are more than it may have.

    Args:
        max_stored_bytes: 0 stands for no limit.

    Raises:
        InsufficientStorage: There is no room for them.
    """
    if max_stored_bytes == 0:
        return
    stored = stored_bytes(session, tenant)
    if stored + adding_bytes > max_stored_bytes:
        raise InsufficientStorage(
            f"{stored} bytes are stored and {adding_bytes} more are needed; "
            f"{max_stored_bytes} are allowed."
        )


def stored_bytes(session: Session, tenant: str) -> int:
    """Return what a tenant's uploads and results take up, with those that its jobs will leave."""
    uploads = session.scalar(select(func.sum(Blob.bytes)).where(Blob.tenant == tenant))
    results = session.scalar(
        select(func.sum(Job.stored_bytes)).where(Job.tenant == tenant, Job.holds_something())
    )
    return int(uploads or 0) + int(results or 0)
