"""Create jobs, blobs, tokens and workers."""

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _moment(name: str, *, nullable: bool) -> sa.Column[datetime]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        _moment("created_at", nullable=False),
        _moment("started_at", nullable=True),
        _moment("finished_at", nullable=True),
        _moment("expires_at", nullable=True),
        _moment("purged_at", nullable=True),
        _moment("deadline_at", nullable=True),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("model_sha256", sa.String(64), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("memory_failures", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(128), nullable=True),
        sa.Column("lease_token", sa.String(32), nullable=True),
        _moment("lease_until", nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=True),
        sa.Column("remediation", sa.String(16), nullable=True),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("output_key", sa.String(200), nullable=True),
        sa.Column("output_sha256", sa.String(64), nullable=True),
        sa.Column("output_bytes", sa.BigInteger(), nullable=True),
    )
    op.create_index("ix_jobs_queue", "jobs", ["state", "priority", "created_at"])
    op.create_index("ix_jobs_tenant", "jobs", ["tenant", "created_at", "id"])
    op.create_index("ix_jobs_model", "jobs", ["tenant", "model_sha256"])
    op.create_index("ix_jobs_expiry", "jobs", ["expires_at"])
    op.create_table(
        "blobs",
        sa.Column("key", sa.String(200), primary_key=True),
        _moment("touched_at", nullable=False),
    )
    op.create_index("ix_blobs_touched_at", "blobs", ["touched_at"])
    op.create_table(
        "job_blobs",
        sa.Column(
            "job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("role", sa.String(16), primary_key=True),
        sa.Column("blob_key", sa.String(200), nullable=False),
    )
    op.create_index("ix_job_blobs_blob_key", "job_blobs", ["blob_key"])
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("token", sa.String(32), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column(
            "job_id", sa.String(32), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False
        ),
        _moment("created_at", nullable=False),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])
    op.create_table(
        "tokens",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("secret_sha256", sa.LargeBinary(32), nullable=False),
        _moment("created_at", nullable=False),
        _moment("expires_at", nullable=True),
        _moment("revoked_at", nullable=True),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("device", sa.String(64), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        _moment("started_at", nullable=False),
        _moment("seen_at", nullable=False),
        sa.Column("problem", sa.Text(), nullable=True),
    )


def downgrade() -> None:
    for table in ("workers", "tokens", "idempotency_keys", "job_blobs", "blobs", "jobs"):
        op.drop_table(table)
