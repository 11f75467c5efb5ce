"""Take a checked form in: its files, then its row, in an order that survives a crash anywhere."""

import shutil
from collections.abc import Iterable

import structlog
from fastapi import Request
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from common import jobs, quotas, retention
from common.blobs import upload_key
from common.db import Job
from common.errors import NoSpace, Unavailable
from common.jobs import Idempotency, NewJob
from service.admission import Admitted
from service.auth import Principal
from service.context import Context
from service.uploads import Form

log = structlog.get_logger(__name__)


def check_room(
    here: Context,
    caller: Principal,
    announced_bytes: int,
    *,
    idempotency_key: str | None,
    dry_run: bool,
) -> None:
    """Refuse before the body is read what would be refused after it."""
    with here.database.read() as session:
        makes_a_job = not dry_run and not (
            idempotency_key is not None
            and jobs.is_key_known(session, caller.tenant, caller.family, idempotency_key)
        )
        if makes_a_job:
            quotas.check_active_jobs(
                session, caller.tenant, max_active_jobs=here.settings.max_active_jobs
            )
            # Whether some of it is stored already cannot be known before it is read.
            quotas.check_storage(
                session,
                caller.tenant,
                adding_bytes=announced_bytes,
                max_stored_bytes=here.settings.max_stored_bytes,
            )
    if shutil.disk_usage(here.uploads).free < announced_bytes:
        raise NoSpace


def announced_bytes(request: Request) -> int:
    """Return the body's length as the client announced it, 0 when it did not."""
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdigit() and len(length) < 19 else 0


def accept(
    here: Context,
    caller: Principal,
    form: Form,
    admitted: Admitted,
    idempotency: Idempotency | None,
    request_id: str,
) -> tuple[Job, bool]:
    """Store the files and insert the row; return the job, and whether an earlier request made it."""
    if idempotency is not None and (job := _replay(here, caller, idempotency)) is not None:
        return job, True
    keys = {role: upload_key(caller.tenant, file.sha256) for role, file in form.files.items()}
    try:
        return _store(here, caller, form, keys, admitted, idempotency, request_id)
    except Exception:
        _give_back(here, keys.values())
        raise


def _store(
    here: Context,
    caller: Principal,
    form: Form,
    keys: dict[str, str],
    admitted: Admitted,
    idempotency: Idempotency | None,
    request_id: str,
) -> tuple[Job, bool]:
    with here.database.write() as session:
        retention.reserve_blobs(
            session, {keys[role]: file.bytes for role, file in form.files.items()}
        )
    for role, file in form.files.items():
        here.store.put(keys[role], file.path)
    new = NewJob(
        tenant=caller.tenant,
        request_id=request_id,
        spec=admitted.spec.model_dump(mode="json"),
        model_sha256=admitted.spec.model.sha256,
        model_bytes=admitted.spec.model.bytes,
        blobs=keys,
        client_metadata=admitted.client_metadata,
        priority=admitted.priority,
        cancel_after_seconds=admitted.cancel_after_seconds,
    )
    try:
        with here.database.write() as session:
            job = jobs.create(
                session,
                new,
                max_active_jobs=here.settings.max_active_jobs,
                max_stored_bytes=here.settings.max_stored_bytes,
                idempotency=idempotency,
            )
            if not retention.claim_blobs(session, keys.values()):
                raise Unavailable("A file was cleared away while its job was made; send it again.")
    except IntegrityError:
        if idempotency is None or (found := _replay(here, caller, idempotency)) is None:
            raise
        return found, True
    return job, False


def _give_back(here: Context, keys: Iterable[str]) -> None:
    """Delete the files that were stored for nothing; another job's stay."""
    try:
        with here.database.write() as session:
            retention.drop_unclaimed_blobs(session, here.store, keys)
    except (SQLAlchemyError, OSError) as exc:  # the sweep will come by
        log.warning("not-given-back", error=str(exc).splitlines()[0])


def _replay(here: Context, caller: Principal, idempotency: Idempotency) -> Job | None:
    with here.database.read() as session:
        return jobs.find_replay(session, caller.tenant, idempotency)
