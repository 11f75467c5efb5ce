"""
Which architectures the workers can build beside the built-in ones.

Each worker writes the names at its start and renews them while it lives (``worker/roster.py``). A name
stays known for a day after that: a job for it is accepted while its only worker is being restarted.
"""

from collections.abc import Mapping, Sequence

from sqlalchemy import bindparam, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from common.db import AnnouncedArchitecture, is_postgres, now

RENEW_SECONDS = 3600.0
KNOWN_SECONDS = 86400.0


def announce(session: Session, descriptions: Mapping[str, str]) -> None:
    """Write that a worker can build the architectures in *descriptions*; forget what nobody can."""
    insert = postgresql.insert if is_postgres(session) else sqlite.insert
    statement = insert(AnnouncedArchitecture).values(
        name=bindparam("each"), description=bindparam("described"), announced_at=now()
    )
    renewed = {
        "description": statement.excluded.description,
        "announced_at": statement.excluded.announced_at,
    }
    # Sorted, so that two workers that lock the same rows agree on the order. All in one call: while
    # this goes on, nobody else writes to SQLite, and a heartbeat may not wait for a thousand statements.
    if descriptions:
        session.connection().execute(
            statement.on_conflict_do_update(index_elements=["name"], set_=renewed),
            [{"each": name, "described": descriptions[name]} for name in sorted(descriptions)],
        )
    session.execute(
        delete(AnnouncedArchitecture).where(
            AnnouncedArchitecture.announced_at < now(-KNOWN_SECONDS)
        )
    )


def listed(session: Session) -> Sequence[AnnouncedArchitecture]:
    """Return every architecture that a worker announced lately, by name."""
    return session.scalars(
        select(AnnouncedArchitecture)
        .where(AnnouncedArchitecture.announced_at > now(-KNOWN_SECONDS))
        .order_by(AnnouncedArchitecture.name)
    ).all()


def is_known(session: Session, name: str) -> bool:
    """Return whether a worker announced lately that it can build *name*."""
    found = select(AnnouncedArchitecture.name).where(
        AnnouncedArchitecture.name == name,
        AnnouncedArchitecture.announced_at > now(-KNOWN_SECONDS),
    )
    return session.scalar(found) is not None
