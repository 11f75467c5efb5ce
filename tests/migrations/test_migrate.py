"""The migrations make the schema that the code expects, whoever runs them and however often."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, select, text

from common.db import Base, Blob, Database, Job, Token
from migrations.migrate import is_current, upgrade

ROOT = Path(__file__).parents[2]
MIGRATE = """
import sys
from common.db import Database
from migrations.migrate import upgrade
print("ready", flush=True)
sys.stdin.readline()
upgrade(Database(sys.argv[1]))
"""


def tables(database: Database) -> set[str]:
    """Return the names of the tables, but for Alembic's own."""
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def test_upgrade_makes_every_table(empty_database: Database) -> None:
    """An empty database is not current; an upgraded one is, and has every table."""
    assert not is_current(empty_database)
    upgrade(empty_database)
    assert is_current(empty_database)
    assert tables(empty_database) == set(Base.metadata.tables)


def test_upgrade_twice_is_harmless(database: Database) -> None:
    """A second upgrade changes nothing."""
    upgrade(database)
    assert is_current(database)


def test_schema_equals_the_models(database: Database) -> None:
    """Alembic finds no difference between the migrated schema and the models."""
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_indexes_and_foreign_keys_equal_the_models(database: Database) -> None:
    """Every index covers the columns that the model names, and every reference cascades."""
    found = inspect(database.engine)
    for table in Base.metadata.sorted_tables:
        stored = {index["name"]: index["column_names"] for index in found.get_indexes(table.name)}
        assert stored == {index.name: [c.name for c in index.columns] for index in table.indexes}
        for reference in found.get_foreign_keys(table.name):
            assert reference["options"].get("ondelete") == "CASCADE"


def test_threads_that_migrate_at_once_all_succeed(empty_database: Database) -> None:
    """Whoever comes second waits and finds the work done."""
    start = threading.Barrier(4)

    def migrate(_: int) -> None:
        database = Database(empty_database.engine.url.render_as_string(hide_password=False))
        start.wait()
        upgrade(database)
        database.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(migrate, range(4)))
    assert is_current(empty_database)


def test_processes_that_migrate_at_once_all_succeed(empty_database: Database) -> None:
    """A service and its workers may start at the same moment on an empty database."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MIGRATE, empty_database.url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert is_current(empty_database)


def test_downgrade_to_base_leaves_no_table(database: Database) -> None:
    """Every revision can be taken back, and the way up again is open."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    with database.connect_to_write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert tables(database) == set()
    assert not is_current(database)
    upgrade(database)
    assert is_current(database)


def test_rows_of_before_the_quotas_keep_their_rights_and_count(empty_database: Database) -> None:
    """Tokens may do all that they could; stored files count with the sizes that their jobs know."""
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    at, key = "2026-01-01 00:00:00.000000", f"uploads/acme/{'a' * 64}"
    old: list[tuple[str, dict[str, object]]] = [
        (
            "tokens",
            {"id": "t1", "name": "ci", "tenant": "acme", "secret_sha256": b"s", "created_at": at},
        ),
        ("blobs", {"key": key, "touched_at": at}),
        *(
            (
                "jobs",
                {
                    "id": job_id, "tenant": "acme", "state": state, "created_at": at,
                    "request_id": "r", "spec": json.dumps({"model": {"bytes": 40}}),
                    "priority": 0, "model_sha256": "a", "metadata": "{}", "attempt": 0,
                    "memory_failures": 0, "cancel_requested": False, "progress": "{}",
                    "output_bytes": output_bytes, "purged_at": purged_at,
                },
            )
            for job_id, state, output_bytes, purged_at in (
                ("queued", "queued", None, None),
                ("done", "succeeded", 30, None),
                ("gone", "succeeded", 30, at),
                ("failed", "failed", None, None),
            )
        ),
        ("job_blobs", {"job_id": "queued", "role": "model", "blob_key": key}),
    ]  # fmt: skip
    with empty_database.connect_to_write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0003")
        for table, row in old:
            values = ", ".join(f":{name}" for name in row)
            connection.execute(
                text(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"), row
            )
    upgrade(empty_database)
    with empty_database.read() as session:
        token = session.scalars(select(Token)).one()
        assert (token.scopes, token.family) == ("submit read admin", "t1")
        assert token.last_used_at is None
        blob = session.scalars(select(Blob)).one()
        assert (blob.tenant, blob.bytes) == ("acme", 40)
        found = {job.id: job.stored_bytes for job in session.scalars(select(Job))}
        assert found == {"queued": 40, "done": 30, "gone": 0, "failed": 0}
