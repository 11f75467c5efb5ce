"""A request's files are stored for its job, or not at all, whatever happens beside it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from common import retention
from common.blobs import FileBlobStore
from common.db import Database
from tests.service.conftest import Service, Start, problem_of
from tests.service.forms import samples_npz


@pytest.fixture
def service(empty_database: Database, start: Start) -> Iterator[Service]:
    """Run the service, once on SQLite and once on Postgres."""
    with start(database_url=empty_database.url) as found:
        yield found


class FullStore(FileBlobStore):
    """A store on a disk that is full."""

    def put(self, key: str, path: Path) -> None:
        """Find no room."""
        raise OSError(28, "No space left on device")


def test_failed_request_leaves_another_jobs_files(service: Service) -> None:
    """What a failed request gives back is what no job needs."""
    service.job()
    before = service.left_behind()
    with service.with_store(FullStore(service.settings.data_dir / "blobs")):
        problem_of(service.post(evaluation=samples_npz(labels=[0, 0, 0, 0])), 507, "no-space")
    assert service.left_behind() == before


def test_request_whose_file_was_given_back_is_asked_to_come_again(service: Service) -> None:
    """A job is never made of a file that a failing request beside it has just deleted."""

    class Rival(FileBlobStore):
        """A store where a request with the same file fails right after ours has stored it."""

        def put(self, key: str, path: Path) -> None:
            """Store the file, and lose it."""
            super().put(key, path)
            with service.context.database.write() as session:
                retention.drop_unclaimed_blobs(session, self, [key])

    with service.with_store(Rival(service.settings.data_dir / "blobs")):
        answer = service.post()
        problem_of(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    assert service.left_behind() == []
    service.job()
