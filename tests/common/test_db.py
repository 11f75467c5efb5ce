"""Connections to SQLite wait for each other, the first of a new file too."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWaiting
from pathlib import Path

import pytest

from common.db import Database


def test_first_connection_waits_for_a_writer_of_a_new_file(tmp_path: Path) -> None:
    """A file that another process is writing is put into write-ahead mode when that one is done."""
    file = tmp_path / "new.db"
    writer = sqlite3.connect(file, isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    database = Database(f"sqlite:///{file}")
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(database.check)
        with pytest.raises(StillWaiting):
            check.result(timeout=0.5)
        writer.execute("COMMIT")
        check.result(timeout=60)
    assert writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()
    writer.close()
