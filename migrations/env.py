"""What Alembic runs: the schema of ``common.db`` against the database of the settings."""

from alembic import context
from sqlalchemy import Connection, text

from common.db import Base, Database
from common.settings import Settings

_LOCK = 0x57454947  # any constant of ours


def _migrate(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        compare_type=True,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        # Two processes that migrate at once wait for each other; SQLite's own lock does the same.
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    _migrate(given)
else:
    database = Database(Settings().resolved_database_url)
    with database.connect_to_write() as connection:
        _migrate(connection)
    database.close()
