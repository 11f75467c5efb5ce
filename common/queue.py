"""
The doorbell: tell a worker that a job waits, and nothing more.

A message is a task name and a job id. It may be lost, doubled or late without harm, since workers find
jobs by looking at the database; the bell only saves them the wait.
"""

from typing import Protocol

import structlog
from celery import Celery
from kombu.exceptions import OperationalError

TASK = "weightwash.sanitise"
QUEUE = "weightwash"

_RING_SECONDS = 1
_LISTEN_SECONDS = 5  # longer than the broker lets a consumer wait for a message
# A message is worth nothing once a worker's own poll has passed; stale ones are dropped unread.
_MESSAGE_LIFE_SECONDS = 60

log = structlog.get_logger(__name__)


class Doorbell(Protocol):
    """Something that may wake a worker."""

    def ring(self, job_id: str) -> None:
        """Ring once; never raise, never take much longer than a second."""

    def is_silent(self) -> bool:
        """Return whether no ring is waiting to be heard."""


class NoDoorbell:
    """The bell of a service without a broker: workers poll."""

    def ring(self, job_id: str) -> None:
        """Do nothing."""

    def is_silent(self) -> bool:
        """Return false: there is nothing to ring again."""
        return False


class CeleryDoorbell:
    """A bell that is a Celery message on Redis."""

    def __init__(self, broker_url: str) -> None:
        self._app = celery_app(broker_url, socket_timeout_seconds=_RING_SECONDS)

    def ring(self, job_id: str) -> None:
        """Send the message; log it when the broker does not take it."""
        try:
            self._app.send_task(
                TASK, args=[job_id], queue=QUEUE, retry=False, expires=_MESSAGE_LIFE_SECONDS
            )
        except (OperationalError, OSError) as exc:
            log.warning("doorbell-failed", job_id=job_id, error=str(exc))

    def is_silent(self) -> bool:
        """Ask the broker for the queue's length; a broker that does not answer is not silent."""
        try:
            with self._app.connection_for_write() as connection:
                connection.ensure_connection(max_retries=0, timeout=_RING_SECONDS)
                declared = connection.default_channel.queue_declare(QUEUE, passive=False)
                return bool(declared.message_count == 0)
        except (OperationalError, OSError) as exc:
            log.warning("doorbell-failed", error=str(exc))
            return False


def doorbell(broker_url: str | None) -> Doorbell:
    """Return the bell for *broker_url*."""
    return NoDoorbell() if broker_url is None else CeleryDoorbell(broker_url)


def celery_app(broker_url: str, *, socket_timeout_seconds: int = _LISTEN_SECONDS) -> Celery:
    """
    Return a Celery app that carries doorbell messages and nothing else.

    JSON only, no results, acknowledged on receipt, one at a time, no remote control: a message must
    not be worth attacking, and a lost one must not matter.
    """
    app = Celery("weightwash", broker=broker_url, backend=None, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        event_serializer="json",
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_acks_late=False,
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=_RING_SECONDS,
        broker_transport_options={
            "socket_connect_timeout": _RING_SECONDS,
            "socket_timeout": socket_timeout_seconds,
            "retry_on_timeout": False,
            "max_retries": 0,
        },
        redis_socket_connect_timeout=_RING_SECONDS,
        redis_retry_on_timeout=False,
    )
    return app
