"""The doorbell: rung when there is a broker, harmless when there is none."""

import json
import socket
from collections.abc import Iterator

import pytest
import redis as redis_client

from common.queue import QUEUE, TASK, CeleryDoorbell, NoDoorbell, doorbell
from tests.support.servers import RedisServer


@pytest.fixture
def broker(redis: RedisServer) -> Iterator[redis_client.Redis]:
    """Return an empty broker."""
    with redis_client.Redis.from_url(redis.url) as client:
        client.flushdb()
        yield client


@pytest.fixture
def mute_broker() -> Iterator[str]:
    """Return the address of a broker that takes connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(16)
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"


def test_message_is_a_task_name_and_an_id(redis: RedisServer, broker: redis_client.Redis) -> None:
    """A ring carries the job's id as JSON and nothing else."""
    bell = doorbell(redis.url)
    assert bell.is_silent()
    bell.ring("job_1")
    assert not bell.is_silent()
    (raw,) = broker.lrange(QUEUE, 0, -1)
    message = json.loads(raw)
    assert message["headers"]["task"] == TASK
    assert message["content-type"] == "application/json"
    assert message["headers"]["argsrepr"] == "['job_1']"


def test_broker_that_is_away_is_no_error(mute_broker: str) -> None:
    """Neither a refused connection nor a broker that never answers reaches the caller."""
    for url in ("redis://127.0.0.1:1/0", mute_broker):
        bell = CeleryDoorbell(url)
        bell.ring("job_1")
        assert not bell.is_silent()


def test_without_a_broker_there_is_no_bell() -> None:
    """No broker address, no bell: workers poll."""
    bell = doorbell(None)
    assert isinstance(bell, NoDoorbell)
    bell.ring("job_1")
    assert not bell.is_silent()
