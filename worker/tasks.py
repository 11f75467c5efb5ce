"""
The Celery door: a message names a job, and the supervisor runs it.

The task runs in the consumer's own process (the solo pool): a job has a child process of its own, so a
pool would only add a second parent to lose.
"""

import threading

from celery import Celery
from celery.signals import worker_init, worker_shutting_down

from common.queue import QUEUE, TASK, celery_app
from worker.loop import Loop
from worker.supervisor import Supervisor


def build_app(broker_url: str, supervisor: Supervisor) -> Celery:
    """Return a Celery app whose one task hands a job id to *supervisor*."""
    app = celery_app(broker_url)

    def sanitise(job_id: str) -> None:
        if isinstance(job_id, str):
            supervisor.run(job_id)

    app.task(name=TASK)(sanitise)
    return app


def consume(app: Celery, loop: Loop) -> None:
    """
    Consume messages until SIGTERM, with the polling loop beside.

    The loop starts before the broker is reached and does not need it.
    """
    polling = threading.Thread(target=loop.run, name="poller")

    def start(**_: object) -> None:
        polling.start()

    def stop(**_: object) -> None:
        # Called inside a signal handler, where taking a lock may wait for ever.
        threading.Thread(target=loop.stop).start()

    # Not weak: nothing else holds these functions while the worker runs.
    worker_init.connect(start, weak=False)
    worker_shutting_down.connect(stop, weak=False)
    try:
        app.worker_main(
            [
                "worker",
                "--pool=solo",
                f"--queues={QUEUE}",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
                "--loglevel=INFO",
            ]
        )
    finally:
        loop.stop()
        if polling.ident is not None:
            polling.join()
