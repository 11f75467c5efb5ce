"""
The whole service as processes, the way a user runs it: uvicorn, a worker, HTTP between.

Two modes, one interface: *embedded* (SQLite, the service starts its own polling worker) and
*distributed* (Postgres, Redis, tokens, a Celery worker that is started apart).
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx2 as httpx
import psutil

from common.db import Database
from common.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]

_START_SECONDS = 60.0
_STOP_SECONDS = 45.0
_LISTENING = re.compile(rb"Uvicorn running on (http://127\.0\.0\.1:\d+)")

T = TypeVar("T")


class Stack:
    """A running service with its workers."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = {
            **{name: value for name, value in os.environ.items() if "WEIGHTWASH_" not in name},
            "OMP_NUM_THREADS": "1",
            "WEIGHTWASH_DATA_DIR": str(folder / "var"),
            "WEIGHTWASH_PORT": "0",
            **{f"WEIGHTWASH_{name.upper()}": value for name, value in settings.items()},
        }
        self.url = ""
        self.token = ""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def client(self) -> httpx.Client:
        """Return a client that shows the token."""
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=90)

    @property
    def database(self) -> Database:
        """Return the stack's database, to look into."""
        values = {
            name.removeprefix("WEIGHTWASH_").lower(): value
            for name, value in self.environment.items()
            if name.startswith("WEIGHTWASH_")
        }
        return Database(Settings.model_validate(values).resolved_database_url)

    @property
    def scratch(self) -> Path:
        """Return the folder of running jobs."""
        return self.folder / "var" / "scratch"

    def run(self, *arguments: str) -> str:
        """Run a command of the project to its end and return what it printed."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            env=self.environment,
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
            timeout=_START_SECONDS,
        ).stdout

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process of the project; its log is ``<name>.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env=self.environment,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        self.processes[name] = process
        return process

    def start_service(self) -> subprocess.Popen[bytes]:
        """Start the service and wait until it listens."""
        process = self.start("service", "service", "serve")

        def address() -> str | None:
            found = _LISTENING.search((self.folder / "service.log").read_bytes())
            assert process.poll() is None, (self.folder / "service.log").read_text()
            return found.group(1).decode() if found else None

        self.url = wait_for(address)
        return process

    def wait_until_ready(self) -> None:
        """Wait until a worker was heard of."""
        wait_for(lambda: httpx.get(f"{self.url}/readyz").status_code == 200 or None)

    def stop(self) -> None:
        """Stop everything that still runs, in good order."""
        for process in self.processes.values():
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise

    def logs(self) -> str:
        """Return what the processes said, but for the requests: there are too many."""
        lines = []
        for path in self.folder.glob("*.log"):
            said = path.read_text(errors="replace").splitlines()
            lines += [path.name, *(line for line in said if '"event": "request"' not in line)]
        return "\n".join(lines)

    def submit(self, files: Mapping[str, bytes], **fields: str) -> dict[str, Any]:
        """POST a job that must be accepted."""
        with self.client as client:
            answer = client.post(
                "/jobs",
                files={name: (_FILE_NAMES[name], body) for name, body in files.items()},
                data=fields,
            )
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert isinstance(job, dict)
        return job

    def read(self, job: Mapping[str, Any], *, wait: int = 0) -> dict[str, Any]:
        """Read a job anew."""
        with self.client as client:
            found = client.get(f"/jobs/{job['id']}", params={"wait": wait}).json()
        assert isinstance(found, dict)
        return found

    def wait_for_end(self, job: Mapping[str, Any], *, seconds: float = 180) -> dict[str, Any]:
        """Wait until the job has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.read(job, wait=20)
            if found["state"] not in {"queued", "running"}:
                return found
        raise AssertionError(f"the job has not ended: {found}")

    def wait_for_success(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until the job has ended, and as it should."""
        ended = self.wait_for_end(job)
        assert ended["state"] == "succeeded", ended
        return ended

    def wait_until_running(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until the job's child is at its work."""

        def running() -> dict[str, Any] | None:
            found = self.read(job)
            assert found["state"] in {"queued", "running"}, found
            return found if found["progress"]["phase"] == "purify" else None

        return wait_for(running)

    def download(self, job: Mapping[str, Any]) -> bytes:
        """Download a job's model."""
        with self.client as client:
            answer = client.get(f"/jobs/{job['id']}/model")
        assert answer.status_code == 200, answer.text
        return answer.content

    def report(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Read a job's report."""
        with self.client as client:
            answer = client.get(f"/jobs/{job['id']}/report.json")
        assert answer.status_code == 200, answer.text
        report = answer.json()
        assert isinstance(report, dict)
        return report


_FILE_NAMES = {
    "model": "model.pt",
    "samples": "clean.npz",
    "evaluation": "evaluation.npz",
    "triggered": "triggered.npz",
}


@contextmanager
def embedded_stack(folder: Path, **settings: str) -> Iterator[Stack]:
    """Run ``service serve`` alone, as ``make run`` does."""
    stack = Stack(folder, settings)
    with _stopped_at_the_end(stack):
        stack.start_service()
        yield stack


@contextmanager
def distributed_stack(
    folder: Path, *, database_url: str, broker_url: str, **settings: str
) -> Iterator[Stack]:
    """Run migration, service with tokens and one Celery worker, as the compose file does."""
    stack = Stack(
        folder,
        {
            "database_url": database_url,
            "broker_url": broker_url,
            "auth": "tokens",
            "embedded_workers": "0",
            **settings,
        },
    )
    with _stopped_at_the_end(stack):
        stack.run("alembic", "upgrade", "head")
        stack.token = stack.run("service", "tokens", "create", "pipeline").strip()
        stack.start_service()
        stack.start("worker", "worker", "celery")
        yield stack


@contextmanager
def _stopped_at_the_end(stack: Stack) -> Iterator[None]:
    """Stop the stack whatever happens; its logs are shown with a test that fails in it."""
    try:
        yield
    except BaseException as failure:
        failure.add_note(stack.logs())
        raise
    finally:
        stack.stop()


def wait_for(look: Callable[[], T | None], *, seconds: float = _START_SECONDS) -> T:
    """Call *look* until it returns something; how long that takes is not what is tested."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(httpx.TransportError):
            found = look()
            if found is not None:
                return found
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def job_processes(parent: int) -> list[psutil.Process]:
    """Return the job processes of the worker *parent* and of the workers below it."""
    return [
        child
        for child in psutil.Process(parent).children(recursive=True)
        if "worker.child" in command_of(child)
    ]


def command_of(process: psutil.Process) -> list[str]:
    """Return the command line of a process; that of one that has just ended is empty."""
    with suppress(psutil.NoSuchProcess):  # a zombie as well
        return process.cmdline()
    return []
