"""What the death of a process may cost: time, and nothing else."""

import os
import signal
import uuid
from pathlib import Path

import psutil
import pytest

from common.db import Job
from tests.support.inputs import cnn_state, samples, saved
from tests.support.servers import PostgresServer, RedisServer
from tests.support.stack import (
    Stack,
    command_of,
    distributed_stack,
    embedded_stack,
    job_processes,
    wait_for,
)

LONG = '{"epochs": 60, "passes": 5}'
ENDLESS = '{"epochs": 1000, "passes": 1000}'
# The defaults, shrunk: what is tested is the order of things, not their time. A machine that stands still
# for longer than a lease costs an attempt as well.
FAST = {
    "lease_seconds": "6",
    "heartbeat_seconds": "1",
    "cancel_poll_seconds": "0.5",
    "sweep_seconds": "0.5",
    "poll_seconds": "0.5",
    "grace_seconds": "1",
}


def _files() -> dict[str, bytes]:
    return {"model": saved(cnn_state()), "samples": samples()}


def _attempts(stack: Stack, job: dict[str, str]) -> int:
    database = stack.database
    with database.read() as session:
        attempt = session.get_one(Job, job["id"]).attempt
    database.close()
    return attempt


def test_job_of_a_killed_worker_is_finished_once_by_another(tmp_path: Path) -> None:
    """After kill -9 of the worker its child dies, its folder is swept, and another one finishes."""
    with embedded_stack(tmp_path, embedded_workers="0", **FAST) as stack:
        first = stack.start("first", "worker", "poll")
        job = stack.submit(_files(), method="awm", params=LONG)
        stack.wait_until_running(job)
        children = wait_for(lambda: job_processes(first.pid) or None)  # one may have just ended
        orphaned = next(stack.scratch.glob("*/job_*"))
        second = stack.start("second", "worker", "poll")
        first.kill()
        first.wait()
        gone, alive = psutil.wait_procs(children, timeout=10)
        assert gone
        assert not alive
        ended = stack.wait_for_success(job)
        assert ended["attempt"] == 2
        assert len(stack.download(ended)) == ended["output"]["bytes"]
        wait_for(lambda: True if not orphaned.parent.exists() else None)
        assert second.poll() is None
        outputs = list((tmp_path / "var" / "blobs" / "outputs").glob("*/*"))
        assert len(outputs) == 1


def test_killed_child_is_tried_again(tmp_path: Path) -> None:
    """A child that dies costs an attempt, not the job; the third death ends it."""
    with embedded_stack(tmp_path, **FAST) as stack:
        job = stack.submit(_files(), method="awm", params=ENDLESS)
        for attempt in (1, 2, 3):
            wait_for(lambda n=attempt: True if _attempts(stack, job) == n else None)  # type: ignore[misc]
            running = stack.wait_until_running(job)
            assert running["attempt"] == attempt
            for child in _busy_children(stack):
                child.kill()
            if attempt < 3:
                wait_for(lambda n=attempt: True if _attempts(stack, job) > n else None)  # type: ignore[misc]
        ended = stack.wait_for_end(job)
        assert (ended["state"], ended["error"]["code"]) == ("failed", "job-crashed")


def test_embedded_worker_is_restarted(tmp_path: Path) -> None:
    """The service starts its worker again when it dies, and the job is finished."""
    with embedded_stack(tmp_path, **FAST) as stack:
        job = stack.submit(_files(), method="awm", params=LONG)
        stack.wait_until_running(job)
        (worker,) = [
            child for child in psutil.Process().children(recursive=True) if _is_poller(child)
        ]
        worker.kill()
        stack.wait_for_success(job)


def test_stop_hands_a_running_job_back(tmp_path: Path) -> None:
    """SIGTERM ends service, worker and child in order, and the attempt is not used up."""
    with embedded_stack(tmp_path, **FAST) as stack:
        service = stack.processes["service"]
        job = stack.submit(_files(), method="awm", params=ENDLESS)
        stack.wait_until_running(job)
        family = psutil.Process(service.pid).children(recursive=True)
        service.send_signal(signal.SIGTERM)
        assert service.wait(40) == -signal.SIGTERM  # in order, and saying what ended it
        assert not [process for process in family if process.is_running()]
        database = stack.database
        with database.read() as session:
            row = session.get_one(Job, job["id"])
            assert (row.state, row.attempt, row.lease_token) == ("queued", 0, None)
        database.close()
        assert not list(stack.scratch.glob("*/job_*"))


def test_killed_service_takes_its_worker_along(tmp_path: Path) -> None:
    """After kill -9 of the embedded service no worker and no child stays behind."""
    with embedded_stack(tmp_path, **FAST) as stack:
        job = stack.submit(_files(), method="awm", params=ENDLESS)
        stack.wait_until_running(job)
        service = stack.processes["service"]
        family = psutil.Process(service.pid).children(recursive=True)
        service.kill()
        service.wait()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive


def test_time_limit_ends_a_job(tmp_path: Path) -> None:
    """A job that runs longer than it may fails, with a code that says so."""
    with embedded_stack(tmp_path, time_limit_seconds="4", **FAST) as stack:
        ended = stack.wait_for_end(stack.submit(_files(), method="awm", params=ENDLESS))
        assert (ended["state"], ended["error"]["code"]) == ("failed", "time-limit-exceeded")


def test_jobs_are_accepted_and_done_without_the_broker(
    tmp_path: Path, postgres: PostgresServer, redis: RedisServer
) -> None:
    """With Redis down a job is still accepted, and found by the worker's own look at the table."""
    with distributed_stack(
        tmp_path,
        database_url=postgres.create_database(f"stack_{uuid.uuid4().hex}"),
        broker_url=redis.url,
        **FAST,
    ) as stack:
        stack.wait_until_ready()
        redis.stop()
        try:
            job = stack.submit(_files(), method="awm", params='{"epochs": 1, "passes": 1}')
            stack.wait_for_success(job)
        finally:
            redis.start()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_celery_worker_leaves_its_job_to_another(
    tmp_path: Path, postgres: PostgresServer, redis: RedisServer, how: signal.Signals
) -> None:
    """A Celery worker that stops or dies in mid-job leaves it to the next one, which finishes it."""
    with distributed_stack(
        tmp_path,
        database_url=postgres.create_database(f"stack_{uuid.uuid4().hex}"),
        broker_url=redis.url,
        **FAST,
    ) as stack:
        worker = stack.processes["worker"]
        job = stack.submit(_files(), method="awm", params=LONG)
        stack.wait_until_running(job)
        children = job_processes(worker.pid)
        stack.start("second", "worker", "celery")
        worker.send_signal(how)
        worker.wait(40)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        ended = stack.wait_for_success(job)
        assert ended["attempt"] == (1 if how == signal.SIGTERM else 2)


def _busy_children(stack: Stack) -> list[psutil.Process]:
    """Return the job processes that have a job: those that use the processor."""
    return [child for child in job_processes(os.getpid()) if child.cpu_percent(0.5) > 20]


def _is_poller(process: psutil.Process) -> bool:
    return command_of(process)[1:4] == ["-m", "worker", "poll"]
