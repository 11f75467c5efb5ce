"""Bring a database to the newest schema, and tell whether it is there."""

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from common.db import Database

# Alembic's `context` is one object per process, so threads of one process take turns; processes wait
# for each other in the database.
_turn = threading.Lock()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


def upgrade(database: Database) -> None:
    """Bring *database* to the newest schema; wait for another process that is doing the same."""
    config = _config()
    with _turn, database.connect_to_write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def is_current(database: Database) -> bool:
    """Return whether *database* has the newest schema."""
    newest = ScriptDirectory.from_config(_config()).get_current_head()
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == newest
