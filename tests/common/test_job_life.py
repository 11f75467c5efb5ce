"""Any order of what workers, clients and time can do to a job keeps its laws."""

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select, update

from common import jobs
from common.blobs import FileBlobStore
from common.db import TERMINAL_STATES, Database, Job, JobBlob, State, now
from common.errors import AlreadyEnded, DamagedFile, JobCrashed, OutOfMemory, Problem
from common.jobs import Lease, NewJob, Outcome, Standing
from migrations.migrate import upgrade

PROBLEMS: list[Problem] = [JobCrashed(), OutOfMemory(), DamagedFile()]
FINAL = ("state", "finished_at", "error", "verdict", "output_key", "attempt")


class JobLife(RuleBasedStateMachine):
    """
    A few jobs, every lease that was ever given out, and everything that can happen to them.

    Laws: a terminal state is final; a job has one lease at most; a stranger to it changes nothing;
    uploads are needed exactly until the end; whatever happened, every job can be brought to an end.
    """

    created = Bundle[str]("created")
    leases = Bundle[Lease]("leases")

    def __init__(self, database: Database, store: FileBlobStore) -> None:
        super().__init__()
        self.database = database
        self.store = store
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.holder: dict[str, str] = {}  # job -> token of the lease given out last
        with database.write() as session:
            session.execute(delete(Job))

    @rule(target=created, priority=st.integers(-1, 1))
    def create(self, priority: int) -> str:
        """Accept a job."""
        new = NewJob(
            tenant="acme",
            request_id="r",
            spec={},
            model_sha256="a" * 64,
            model_bytes=3,
            blobs={"model": "uploads/acme/" + "a" * 64},
            client_metadata={},
            priority=priority,
        )
        with self.database.write() as session:
            return jobs.create(session, new, max_active_jobs=100).id

    @rule(target=leases, job_id=created, seconds=st.sampled_from([-1.0, 45.0]))
    def claim(self, job_id: str, seconds: float) -> Lease:
        """Take the job if it can be taken; else return what a worker without a lease has."""
        queued = self._row(job_id).state == State.QUEUED
        with self.database.write() as session:
            lease = jobs.claim(session, worker="w", lease_seconds=seconds, job_id=job_id)
        if lease is None:
            return Lease(
                job_id=job_id,
                tenant="acme",
                token="0" * 32,
                attempt=1,
                spec={},
                blobs={},
                request_id="r",
            )
        assert queued
        self.holder[job_id] = lease.token
        return lease

    @rule(lease=leases)
    def heartbeat(self, lease: Lease) -> None:
        """Renew."""
        held = self._is_held(lease)
        with self.database.write() as session:
            found = jobs.heartbeat(session, lease, lease_seconds=45, progress={"step": 1})
        assert (found is not Standing.LOST) == held

    @rule(lease=leases)
    def finish(self, lease: Lease) -> None:
        """End with a model, unless somebody wants it to stop."""
        held, asked = self._is_held(lease), self._row(lease.job_id).cancel_requested
        outcome = Outcome(
            verdict="clean",
            remediation="unchanged",
            report={},
            output_key=f"outputs/{lease.job_id}/{lease.attempt}-{lease.token}",
            output_sha256="b" * 64,
            output_bytes=1,
        )
        with self.database.write() as session:
            found = jobs.finish(session, lease, outcome, retention_seconds=600)
        if not held:
            assert found is Standing.LOST
        else:
            assert found is (Standing.CANCELLED if asked else Standing.HELD)

    @rule(lease=leases, problem=st.sampled_from(PROBLEMS))
    def retry(self, lease: Lease, problem: Problem) -> None:
        """Fall over."""
        held = self._is_held(lease)
        with self.database.write() as session:
            assert jobs.retry(session, lease, problem, retention_seconds=600) == held

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        """Hand back."""
        held = self._is_held(lease)
        with self.database.write() as session:
            assert jobs.release(session, lease) == held

    @rule(lease=consumes(leases))
    def stop(self, lease: Lease) -> None:
        """Stop, as asked."""
        held = self._is_held(lease)
        with self.database.write() as session:
            assert jobs.stop(session, lease, retention_seconds=600) == held

    @rule(job_id=created)
    def cancel(self, job_id: str) -> None:
        """Ask it to stop."""
        state = self._row(job_id).state
        with self.database.write() as session:
            try:
                jobs.cancel(session, "acme", job_id, retention_seconds=600)
            except AlreadyEnded:
                assert state in {State.SUCCEEDED, State.FAILED}

    @rule(job_id=created)
    def purge(self, job_id: str) -> None:
        """Delete it."""
        with self.database.write() as session:
            jobs.purge(session, "acme", job_id, retention_seconds=600)

    @rule(job_id=created)
    def pass_the_deadline(self, job_id: str) -> None:
        """Let its time run out."""
        with self.database.write() as session:
            session.execute(update(Job).where(Job.id == job_id).values(deadline_at=now(-1)))

    @rule(job_id=created)
    def lose_the_worker(self, job_id: str) -> None:
        """Let its lease run out, if it has one."""
        with self.database.write() as session:
            session.execute(
                update(Job)
                .where(Job.id == job_id, Job.state == State.RUNNING)
                .values(lease_until=now(-1))
            )

    @rule()
    def sweep(self) -> None:
        """Put things right."""
        with self.database.write() as session:
            assert jobs.sweep(session, self.store, retention_seconds=600, orphan_grace_seconds=-60)

    @invariant()
    def laws_hold(self) -> None:
        """Look at every row."""
        with self.database.read() as session:
            rows = session.scalars(select(Job)).all()
            claims = set(session.scalars(select(JobBlob.job_id)))
        for job in rows:
            assert (job.id in claims) == (job.state not in TERMINAL_STATES)
            assert (job.lease_token is not None) == (job.state == State.RUNNING)
            assert 0 <= job.attempt <= jobs.MAX_ATTEMPTS + jobs.MAX_MEMORY_FAILURES
            if job.id in self.ended:
                assert tuple(getattr(job, name) for name in FINAL) == self.ended[job.id]
            elif job.state in TERMINAL_STATES:
                assert job.expires_at is not None
                self.ended[job.id] = tuple(getattr(job, name) for name in FINAL)

    def teardown(self) -> None:
        """Show that no job is stuck: workers that vanish and sweeps end them all."""
        for _ in range(jobs.MAX_ATTEMPTS + jobs.MAX_MEMORY_FAILURES):
            with self.database.write() as session:
                while jobs.claim(session, worker="w", lease_seconds=45) is not None:
                    pass
                session.execute(
                    update(Job).where(Job.state == State.RUNNING).values(lease_until=now(-1))
                )
            self.sweep()
        with self.database.read() as session:
            left = session.scalars(select(Job.state).where(Job.state.not_in(TERMINAL_STATES)))
            assert left.all() == []

    def _row(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.get_one(Job, job_id)

    def _is_held(self, lease: Lease) -> bool:
        job = self._row(lease.job_id)
        held = job.state == State.RUNNING and job.lease_token == lease.token
        assert not held or self.holder[lease.job_id] == lease.token
        return held


def test_laws_hold_in_any_order(tmp_path: Path) -> None:
    """Every law of ``JobLife`` holds after every step of random lives."""
    database = Database(f"sqlite:///{tmp_path / 'life.db'}")
    upgrade(database)
    store = FileBlobStore(tmp_path / "blobs")

    class Life(JobLife):
        """The machine on this test's database."""

        def __init__(self) -> None:
            super().__init__(database, store)

    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    database.close()
