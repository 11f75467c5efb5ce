"""
Every setting of Weightwash, typed and with its unit in its name.

Each field is read from ``WEIGHTWASH_<NAME>``. Nothing else in the project reads the environment.
"""

from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import AnyUrl, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


class Auth(StrEnum):
    """Who may call the service."""

    AUTO = "auto"  # off on loopback, refused elsewhere until it is named
    OFF = "off"  # anybody who reaches the loopback interface
    TOKENS = "tokens"  # holders of a bearer token


class Sandbox(StrEnum):
    """What a worker does where the platform lacks a wall of the jail that jobs run in."""

    AUTO = "auto"  # required with a broker, best-effort without
    REQUIRED = "required"  # take no job
    BEST_EFFORT = "best-effort"  # say so in /readyz, and take jobs; not if a wall leaks


class Settings(BaseSettings):
    """
    The settings of one process.

    Raises:
        pydantic.ValidationError: A value does not parse, or a public address has no authentication.
    """

    model_config = SettingsConfigDict(env_prefix="WEIGHTWASH_", frozen=True)

    host: str = Field("127.0.0.1", description="Address the service binds.")
    port: int = Field(8000, ge=0, le=65535, description="Port of the service; 0 picks a free one.")
    public_url: AnyUrl | None = Field(
        None, description="Base of every link in an answer, when a proxy changes the address."
    )
    auth: Auth = Field(
        Auth.AUTO, description="`tokens`, or `off` (loopback only); `auto` is `off` on loopback."
    )
    data_dir: Path = Field(Path("var"), description="Folder of everything the service writes.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL; a SQLite file in the data folder by default."
    )
    blob_url: str | None = Field(
        None, description="`file://` folder of the stored files; `blobs/` in the data folder."
    )
    broker_url: str | None = Field(
        None, description="Redis URL; without it workers find jobs by polling the database."
    )
    scratch_dir: Path | None = Field(
        None, description="Folder of running jobs on a worker; `scratch/` in the data folder."
    )
    embedded_workers: int = Field(
        1, ge=0, le=1, description="Workers that `service serve` starts beside itself."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Device of a worker: `auto`, `cpu` or `cuda:N`.",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of a job; 0 takes all that the process may use."
    )
    sandbox: Sandbox = Field(
        Sandbox.AUTO,
        description="Whether jobs need every wall of their jail: `required`, or `best-effort`; "
        "`auto` is `required` with a broker.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe event that is logged."
    )

    max_model_bytes: int = Field(4 << 30, gt=0, description="Largest model file.")
    max_samples_bytes: int = Field(
        1 << 30, gt=0, description="Largest sample, evaluation or triggered file, also unpacked."
    )
    max_field_bytes: int = Field(64 << 10, gt=0, description="Largest plain form field.")
    max_wait_seconds: int = Field(55, ge=0, le=600, description="Longest `?wait=` that is obeyed.")
    time_limit_seconds: int = Field(3600, gt=0, description="Longest run of one attempt.")
    retention_seconds: int = Field(
        7 * 86400, gt=0, description="How long a finished job keeps its model and its report."
    )
    orphan_grace_seconds: int = Field(
        3600, gt=0, description="Age at which a stored file that no job names is deleted."
    )
    idempotency_seconds: int = Field(
        86400, gt=0, description="How long an `Idempotency-Key` is remembered."
    )
    max_active_jobs: int = Field(
        1000, gt=0, description="Queued and running jobs that one tenant may have."
    )
    max_stored_bytes: int = Field(
        100 << 30,
        ge=0,
        description="What one tenant's uploads and results may take up; 0 for no limit.",
    )
    max_requests_per_minute: int = Field(
        6000, ge=0, le=6_000_000, description="Requests that one tenant may make; 0 for no limit."
    )

    max_connections: int = Field(
        512, gt=0, description="Connections at once; more are told to come back."
    )
    max_uploads: int = Field(64, gt=0, description="Uploads at once, of all tenants.")
    max_uploads_per_tenant: int = Field(32, gt=0, description="Uploads at once, of one tenant.")
    max_head_bytes: int = Field(
        32 << 10, ge=1024, description="Largest request line and headers together."
    )
    max_headers: int = Field(100, ge=10, description="Most headers of a request.")
    max_target_bytes: int = Field(
        8 << 10, ge=256, description="Longest address with its query in a request line."
    )
    head_timeout_seconds: float = Field(
        20.0, gt=0, description="Time until a request's last header has come."
    )
    keep_alive_seconds: int = Field(
        15, gt=0, description="How long a connection may stay open between two requests."
    )
    min_transfer_bytes_per_second: int = Field(
        1024, gt=0, description="Slowest upload or download that is not cut off."
    )
    transfer_window_seconds: float = Field(
        60.0, gt=0, description="Time over which that rate is measured; also the longest pause."
    )

    lease_seconds: float = Field(45.0, gt=0, description="Life of a lease without a heartbeat.")
    heartbeat_seconds: float = Field(10.0, gt=0, description="Time between two heartbeats.")
    cancel_poll_seconds: float = Field(
        2.0, gt=0, description="Time between two looks for a cancel."
    )
    poll_seconds: float = Field(2.0, gt=0, description="Time between two looks for a queued job.")
    sweep_seconds: float = Field(5.0, gt=0, description="Time between two sweeps.")
    grace_seconds: float = Field(
        30.0, ge=0, description="Time a running job gets to finish after SIGTERM."
    )

    @model_validator(mode="after")
    def _refuse_an_open_door(self) -> Self:
        if self.auth is not Auth.TOKENS and self.host not in LOOPBACK_HOSTS:
            raise ValueError(
                f"refusing to serve {self.host} without authentication: "
                "set WEIGHTWASH_AUTH=tokens, or bind 127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _keep_the_lease_longer_than_its_heartbeat(self) -> Self:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError(
                "a lease must outlive a missed heartbeat: "
                "set WEIGHTWASH_LEASE_SECONDS to at least twice WEIGHTWASH_HEARTBEAT_SECONDS"
            )
        return self

    @property
    def requires_tokens(self) -> bool:
        """Whether a caller must show a bearer token."""
        return self.auth is Auth.TOKENS

    @property
    def requires_sandbox(self) -> bool:
        """Whether a worker takes no job where a wall of the jail is missing."""
        if self.sandbox is Sandbox.AUTO:
            return self.broker_url is not None
        return self.sandbox is Sandbox.REQUIRED

    @property
    def resolved_database_url(self) -> str:
        """The database to use."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'weightwash.db').resolve()}"

    @property
    def resolved_blob_url(self) -> str:
        """The blob store to use."""
        return self.blob_url or (self.data_dir / "blobs").resolve().as_uri()

    @property
    def resolved_scratch_dir(self) -> Path:
        """The folder that holds one folder per running job."""
        return (self.scratch_dir or self.data_dir / "scratch").resolve()

    @property
    def upload_dir(self) -> Path:
        """The folder that holds uploads until they are accepted."""
        return (self.data_dir / "uploads").resolve()

    @property
    def max_body_bytes(self) -> int:
        """The largest request body: one model, three sample files and the plain fields."""
        return self.max_model_bytes + 3 * self.max_samples_bytes + (1 << 20)
