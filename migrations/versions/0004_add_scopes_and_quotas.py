"""Add scopes, rotation and last use to tokens, and what quotas are counted by."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_EVERY_SCOPE = "submit read admin"


def upgrade() -> None:
    # The defaults are for rows that are there already; whoever inserts one says what it is. An empty
    # scope lets nobody do anything, so what forgets to name one fails closed.
    op.add_column("tokens", sa.Column("scopes", sa.String(64), nullable=False, server_default=""))
    op.add_column("tokens", sa.Column("family", sa.String(32), nullable=False, server_default=""))
    op.add_column("tokens", sa.Column("replaced_by", sa.String(32), nullable=True))
    op.add_column("tokens", sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("blobs", sa.Column("tenant", sa.String(64), nullable=False, server_default=""))
    op.add_column("blobs", sa.Column("bytes", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column(
        "jobs", sa.Column("stored_bytes", sa.BigInteger(), nullable=False, server_default="0")
    )
    op.create_table(
        "request_budgets",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("spent_until", sa.DateTime(timezone=True), nullable=False),
    )
    _fill(op.get_bind())
    op.create_index("ix_blobs_tenant", "blobs", ["tenant", "bytes"])
    holds_something = sa.text("stored_bytes > 0")
    op.create_index(
        "ix_jobs_stored",
        "jobs",
        ["tenant", "stored_bytes"],
        postgresql_where=holds_something,
        sqlite_where=holds_something,
    )


def _fill(connection: sa.Connection) -> None:
    """Give the rows of before what they would have been given."""
    connection.execute(
        sa.text("UPDATE tokens SET scopes = :scopes, family = id"), {"scopes": _EVERY_SCOPE}
    )
    # What lies beside an output was not measured as it is stored, and expires within the retention.
    connection.execute(
        sa.text(
            "UPDATE jobs SET stored_bytes = output_bytes "
            "WHERE output_bytes IS NOT NULL AND purged_at IS NULL"
        )
    )
    for job_id, spec in connection.execute(
        sa.text("SELECT id, spec FROM jobs WHERE state IN ('queued', 'running')")
    ).all():
        connection.execute(
            sa.text("UPDATE jobs SET stored_bytes = :bytes WHERE id = :id"),
            {"bytes": _file_bytes(spec, "model"), "id": job_id},
        )
    for (key,) in connection.execute(sa.text("SELECT key FROM blobs")).all():
        connection.execute(
            sa.text("UPDATE blobs SET tenant = :tenant WHERE key = :key"),
            {"tenant": key.split("/")[1], "key": key},
        )
    for key, role, spec in connection.execute(
        sa.text("SELECT blob_key, role, spec FROM job_blobs JOIN jobs ON jobs.id = job_id")
    ).all():
        connection.execute(
            sa.text("UPDATE blobs SET bytes = :bytes WHERE key = :key"),
            {"bytes": _file_bytes(spec, role), "key": key},
        )


def _file_bytes(spec: Any, role: str) -> int:
    """Return the size of a job's upload; the driver may or may not have read the JSON."""
    found = json.loads(spec) if isinstance(spec, str) else spec
    return int((found.get(role) or {}).get("bytes", 0))


def downgrade() -> None:
    op.drop_index("ix_jobs_stored", "jobs")
    op.drop_index("ix_blobs_tenant", "blobs")
    op.drop_table("request_budgets")
    op.drop_column("jobs", "stored_bytes")
    for name in ("bytes", "tenant"):
        op.drop_column("blobs", name)
    for name in ("last_used_at", "replaced_by", "family", "scopes"):
        op.drop_column("tokens", name)
