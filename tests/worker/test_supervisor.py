"""A supervisor carries a job to its end on a real database, with real children."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from common import differences, jobs
from common.artefacts import (
    TRIGGERS,
    candidate_name,
    candidates_among,
    from_row,
    trigger_image_name,
    trigger_images_among,
)
from common.blobs import FileBlobStore, artefact_key, upload_key
from common.db import Database, Job, State
from common.jobs import NewJob
from common.settings import Sandbox, Settings
from common.spec import JobSpec, ModelInput, SamplesInput
from migrations.migrate import upgrade
from tests.support.inputs import CLASSES, cnn_state, samples, saved
from tests.support.jail import needs
from worker import sandbox
from worker import supervisor as supervisor_module
from worker.child import OUTPUT
from worker.jail.inspection import inspect
from worker.jail.verdict import Verdict
from worker.process import Child
from worker.sandbox import LAYERS, Layer
from worker.supervisor import Supervisor

TENANT = "local"
QUICK = {"steps": 3, "restart_steps": 2, "copies": 1, "strengths": [0.5], "force": True}


class SlowStore(FileBlobStore):
    """A store on a slow disk."""

    def open(self, key: str) -> BinaryIO:
        """Take longer than a lease lives."""
        time.sleep(2)
        return super().open(key)

    def put(self, key: str, path: Path) -> None:
        """Take longer than a lease lives."""
        time.sleep(2)
        super().put(key, path)


class CancellingStore(FileBlobStore):
    """A store into which the last file comes at the moment of a cancel."""

    bench: "Bench"
    job_id: str

    def put(self, key: str, path: Path) -> None:
        """Store the file, and ask for the job's end."""
        super().put(key, path)
        with self.bench.database.write() as session:
            jobs.cancel(session, TENANT, self.job_id, retention_seconds=600)


class Bench:
    """A database, a store and a supervisor."""

    def __init__(
        self,
        folder: Path,
        store: FileBlobStore,
        *,
        sandbox: Sandbox = Sandbox.AUTO,
        lease_seconds: int = 60,
    ) -> None:
        self.settings = Settings(
            data_dir=folder,
            lease_seconds=lease_seconds,
            heartbeat_seconds=0.2,
            cancel_poll_seconds=0.1,
            threads=1,
            sandbox=sandbox,
        )
        self.database = Database(self.settings.resolved_database_url)
        upgrade(self.database)
        self.store = store
        self.supervisor = Supervisor(self.settings, self.database, store, name="bench")
        self.folder = folder

    def queue(
        self,
        *,
        sha256: str | None = None,
        method: str = "none",
        params: dict[str, Any] | None = None,
    ) -> str:
        """Queue a job, which changes nothing unless a method is named, and return its id."""
        blobs = {}
        digests = {}
        for role, content in (("model", saved(cnn_state())), ("samples", samples())):
            digests[role] = hashlib.sha256(content).hexdigest()
            blobs[role] = upload_key(TENANT, digests[role])
            (self.folder / role).write_bytes(content)
            FileBlobStore.put(self.store, blobs[role], self.folder / role)
        model_sha256 = sha256 or digests["model"]
        spec = JobSpec(
            model=ModelInput(name="m.pt", sha256=model_sha256, bytes=100_000, format="pt"),
            samples=SamplesInput(
                sha256=digests["samples"], bytes=1, count=20, classes=4, image_shape=(3, 8, 8)
            ),
            architecture="small_cnn",
            architecture_args={"classes": CLASSES, "channels": 3, "width": 4},
            classes=CLASSES,
            method=method,
            params=params or {},
            seed=0,
        )
        new = NewJob(
            tenant=TENANT,
            request_id="req",
            spec=spec.model_dump(mode="json"),
            model_sha256=model_sha256,
            model_bytes=spec.model.bytes,
            blobs=blobs,
            client_metadata={},
        )
        with self.database.write() as session:
            return jobs.create(session, new, max_active_jobs=10).id

    def row(self, job_id: str) -> Job:
        """Read a job."""
        with self.database.read() as session:
            return session.get_one(Job, job_id)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """Return a bench with an ordinary store."""
    found = Bench(tmp_path, FileBlobStore(tmp_path / "blobs"))
    yield found
    found.supervisor.close()


def test_job_is_carried_to_its_end(bench: Bench) -> None:
    """One run takes one job, ends it, and leaves nothing in the scratch folder."""
    job_id = bench.queue()
    assert bench.supervisor.run()
    row = bench.row(job_id)
    assert (row.state, row.attempt) == (State.SUCCEEDED, 1)
    assert row.output_key is not None
    with bench.store.open(row.output_key) as output:
        assert hashlib.sha256(output.read()).hexdigest() == row.output_sha256
    assert not bench.supervisor.run()
    assert not list(bench.settings.resolved_scratch_dir.glob("*/job_*"))


def test_candidates_are_stored_beside_the_model(bench: Bench) -> None:
    """A row names what was put together and measured, and the store has it."""
    job_id = bench.queue(method="auto", params=QUICK)
    assert bench.supervisor.run()
    row = bench.row(job_id)
    assert row.output_key is not None
    assert row.report is not None
    stored = from_row(row.artefacts)
    claimed = row.report["evidence"]["candidates"]
    assert [(each["sha256"], each["bytes"]) for each in claimed] == [
        (artefact.sha256, artefact.bytes) for artefact in candidates_among(stored)
    ]
    assert claimed
    for number, artefact in enumerate(candidates_among(stored)):
        name = candidate_name(number)
        changed = bench.store.open(artefact_key(row.output_key, name))
        with differences.whole(bench.store.open(row.output_key), changed) as file:
            assert hashlib.sha256(file.read()).hexdigest() == artefact.sha256


def test_triggers_are_stored_beside_the_model(bench: Bench) -> None:
    """
    Every trigger that was tried has its picture, and all of them are in one file of arrays.

    Its tenant is charged for what lies in the store, to the byte.
    """
    job_id = bench.queue(method="auto", params=QUICK)
    assert bench.supervisor.run()
    row = bench.row(job_id)
    assert row.output_key is not None
    assert row.report is not None
    stored = from_row(row.artefacts)
    tried = row.report["evidence"]["trial"]["triggers"]
    assert len(trigger_images_among(stored)) == tried > 0
    for name in (TRIGGERS, *map(trigger_image_name, range(tried))):
        with bench.store.open(artefact_key(row.output_key, name)) as file:
            assert hashlib.sha256(file.read()).hexdigest() == stored[name].sha256
    files = [path for path in (bench.store.folder / "outputs").rglob("*") if path.is_file()]
    assert row.stored_bytes == sum(path.stat().st_size for path in files)
    assert len(files) > tried + 2  # the model, its candidates, the arrays, the pictures


def test_job_cancelled_at_the_last_moment_leaves_no_file(tmp_path: Path) -> None:
    """Neither the model nor what lies beside it stays when the end of the job is another one."""
    store = CancellingStore(tmp_path / "blobs")
    store.bench = bench = Bench(tmp_path, store)
    store.job_id = bench.queue(method="auto", params=QUICK)
    assert bench.supervisor.run()
    assert bench.row(store.job_id).state == State.CANCELLED
    assert list(store.keys("outputs")) == []
    bench.supervisor.close()


def test_closing_leaves_nothing(bench: Bench) -> None:
    """A supervisor that goes takes its folder and its spare child along."""
    assert not bench.supervisor.run()
    assert list(bench.settings.resolved_scratch_dir.glob("*/child-*"))
    bench.supervisor.close()
    assert not list(bench.settings.resolved_scratch_dir.iterdir())
    bench.supervisor = Supervisor(bench.settings, bench.database, bench.store, name="next")


def test_lease_is_kept_while_files_are_copied_and_stored(tmp_path: Path) -> None:
    """A disk slower than a lease costs time, not the job."""
    bench = Bench(tmp_path, SlowStore(tmp_path / "blobs"), lease_seconds=1)
    job_id = bench.queue()
    assert bench.supervisor.run()
    row = bench.row(job_id)
    assert (row.state, row.attempt) == (State.SUCCEEDED, 1)
    bench.supervisor.close()


@needs(Layer.SECCOMP)
def test_leaking_jail_takes_no_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall that is there and does not hold leaves every job in the queue, and says why."""

    def without_seccomp(folder: Path, *, gpu: bool) -> Verdict:
        return inspect(folder, gpu=gpu, layers=LAYERS - {Layer.SECCOMP})

    monkeypatch.setattr(supervisor_module, "inspect", without_seccomp)
    job_id = bench.queue()
    assert not bench.supervisor.run()
    assert bench.row(job_id).state == State.QUEUED
    assert "leaks" in (bench.supervisor.problem or "")
    assert bench.supervisor.sandbox is not None
    assert bench.supervisor.sandbox["seccomp"].startswith("leaks")


@pytest.mark.parametrize("wanted", [Sandbox.REQUIRED, Sandbox.BEST_EFFORT])
def test_missing_wall_is_the_operators_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Sandbox
) -> None:
    """Without seccomp a worker takes jobs where the sandbox is best-effort, and none where required."""

    def without_seccomp(folder: Path, *, gpu: bool) -> Verdict:
        return inspect(folder, gpu=gpu, layers=LAYERS - {Layer.SECCOMP})

    lacking = {**sandbox.missing(), Layer.SECCOMP: "not installed"}
    monkeypatch.setattr(sandbox, "missing", lambda: lacking)
    monkeypatch.setattr(supervisor_module, "inspect", without_seccomp)
    bench = Bench(tmp_path, FileBlobStore(tmp_path / "blobs"), sandbox=wanted)
    try:
        takes_jobs = bench.supervisor.try_sandbox()
    finally:
        bench.supervisor.close()
    assert takes_jobs == (wanted is Sandbox.BEST_EFFORT)
    assert bench.supervisor.sandbox is not None
    assert bench.supervisor.sandbox["seccomp"] == "missing: not installed"


def test_model_that_is_no_model_is_not_stored(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a job's process leaves is held against the gate before anybody may download it."""
    honest = Child.take

    def tampered(self: Child, name: str, target: Path, *, limit: int) -> None:
        honest(self, name, target, limit=limit)
        if name == OUTPUT:
            target.write_bytes(b"\x80\x02}")

    monkeypatch.setattr(Child, "take", tampered)
    job_id = bench.queue()
    assert bench.supervisor.run()
    row = bench.row(job_id)
    assert (row.state, row.output_key) == (State.QUEUED, None)  # our fault, so it is tried again
    assert list(bench.store.keys("outputs")) == []


def test_changed_upload_is_never_purified(bench: Bench) -> None:
    """A blob that is not what was uploaded ends the job as our fault, after every attempt."""
    job_id = bench.queue(sha256="0" * 64)
    while bench.supervisor.run():
        pass
    row = bench.row(job_id)
    assert (row.state, row.attempt) == (State.FAILED, jobs.MAX_ATTEMPTS)
    assert row.error is not None
    assert row.error["code"] == "internal-error"


def test_row_that_cannot_be_read_ends_the_job_and_not_the_worker(bench: Bench) -> None:
    """A specification of another version fails its job; the next job is worked on."""
    broken, good = bench.queue(), bench.queue()
    with bench.database.write() as session:
        session.get_one(Job, broken).spec = {"from": "the future"}
    while bench.supervisor.run():
        pass
    assert bench.row(broken).state == State.FAILED
    assert bench.row(good).state == State.SUCCEEDED
