"""The workers' own rows: which are there, on which device, and when each was last heard of."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from common.db import Worker, now

FRESH_SECONDS = 60.0
"""A worker that was heard of within this time counts as present."""


def announce(session: Session, name: str, *, device: str, versions: Mapping[str, Any]) -> None:
    """Write a worker's row at its start."""
    session.merge(
        Worker(name=name, device=device, versions=dict(versions), started_at=now(), seen_at=now())
    )


def touch(
    session: Session,
    name: str,
    *,
    problem: str | None,
    sandbox: Mapping[str, str] | None = None,
) -> None:
    """
    Say that the worker is still there, and what keeps it from working, if anything does.

    Args:
        sandbox: How each wall of its jobs' jail holds, or ``None`` before that was tried.
    """
    session.execute(
        update(Worker)
        .where(Worker.name == name)
        .values(seen_at=now(), problem=problem, sandbox=None if sandbox is None else dict(sandbox))
    )


def withdraw(session: Session, name: str) -> None:
    """Remove the row of a worker that goes away in good order."""
    worker = session.get(Worker, name)
    if worker is not None:
        session.delete(worker)


def present(session: Session) -> Sequence[Worker]:
    """Return the workers that were heard of lately."""
    return session.scalars(
        select(Worker).where(Worker.seen_at > now(-FRESH_SECONDS)).order_by(Worker.name)
    ).all()
