"""
Tell the service which architectures this worker can build beside the built-in ones.

The names come from a process of its own (``architectures/listing.py``) and are written to the table
(``common/roster.py``) at the worker's start; while it lives they are renewed.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path

import structlog
from sqlalchemy.exc import SQLAlchemyError

from common import roster
from common.catalogue.architectures import foreign
from common.db import Database
from worker import sandbox

_MAX_BYTES = 4 << 20  # timm's 1300 names take a tenth of a MiB
_LONGEST_SECONDS = 300.0
_AGAIN_SECONDS = 10.0

log = structlog.get_logger(__name__)


class Roster:
    """
    Lists once, announces until it is written, and renews.

    ``step`` never waits; whoever keeps house calls it every second or so.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        """Work in *folder*, which must be there when ``step`` is called first."""
        self._database = database
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._output: Path | None = None
        self._started_at = self._due_at = 0.0
        self._descriptions: dict[str, str] | None = None if _has_sources() else {}

    def step(self) -> None:
        """Do what is due."""
        at = time.monotonic()
        if self._descriptions is None:
            self._list(at)
        if self._descriptions and at >= self._due_at:
            self._due_at = at + self._announced(self._descriptions)

    def close(self) -> None:
        """End the listing, if it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _list(self, at: float) -> None:
        if self._process is None:
            home = Path(tempfile.mkdtemp(prefix="listing-", dir=self._folder))
            self._output = home / "names"
            self._started_at = at
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(
                    [
                        sys.executable,
                        *("-P", "-s", "-m", "worker.architectures.listing"),
                        str(os.getpid()),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    cwd=home,
                    env=sandbox.scrubbed_environment(home),
                    start_new_session=True,
                )
            return
        status = self._process.poll()
        if status is None and at - self._started_at < _LONGEST_SECONDS:
            return
        self.close()
        assert self._output is not None
        if status != 0:
            log.error("architectures-not-listed", exit_status=status)
        self._descriptions = read_listing(self._output)
        shutil.rmtree(self._output.parent, ignore_errors=True)
        log.info("architectures-listed", count=len(self._descriptions))

    def _announced(self, descriptions: dict[str, str]) -> float:
        """Write the names; return the seconds until that is due again."""
        try:
            with self._database.write() as session:
                roster.announce(session, descriptions)
        except SQLAlchemyError as exc:
            log.warning("architectures-not-announced", error=str(exc).splitlines()[0])
            return _AGAIN_SECONDS
        return roster.RENEW_SECONDS


def read_listing(path: Path) -> dict[str, str]:
    """Return the names with their descriptions; what is no such line is passed over."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        for line in file.read(_MAX_BYTES).splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)
                name, description = entry["name"], entry["description"]
                if foreign.NAME.fullmatch(name) and isinstance(description, str):
                    clean = description.encode(errors="replace").decode().replace("\0", " ")
                    found[name] = clean[: foreign.MAX_DESCRIPTION_LENGTH]
    return found


def _has_sources() -> bool:
    """Return whether there is anything to list; nothing is imported for that."""
    libraries = ("torchvision", "timm")
    return any(map(importlib.util.find_spec, libraries)) or bool(
        entry_points(group=foreign.ENTRY_POINTS)
    )
