"""What the settings promise."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.blobs import FileBlobStore, blob_store
from common.settings import Auth, Sandbox, Settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every setting of the caller's environment away."""
    for name in os.environ:
        if name.upper().startswith("WEIGHTWASH_"):
            monkeypatch.delenv(name)


def test_defaults_are_the_embedded_mode_on_loopback() -> None:
    """Without any setting: loopback, no token, SQLite and blobs under ``var``, no broker."""
    settings = Settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.requires_tokens is False
    assert settings.broker_url is None
    var = Path("var").resolve()
    assert settings.resolved_database_url == f"sqlite:///{var / 'weightwash.db'}"
    assert settings.resolved_blob_url == (var / "blobs").as_uri()
    assert settings.resolved_scratch_dir == var / "scratch"
    assert settings.upload_dir == var / "uploads"


def test_documented_numbers() -> None:
    """The numbers of a job's life are the documented ones."""
    settings = Settings()
    assert settings.lease_seconds == 45
    assert settings.heartbeat_seconds == 10
    assert settings.cancel_poll_seconds == 2
    assert settings.sweep_seconds == 5
    assert settings.grace_seconds == 30
    assert settings.idempotency_seconds == 86400
    assert settings.max_wait_seconds == 55
    assert settings.heartbeat_seconds * 3 < settings.lease_seconds


def test_environment_with_the_prefix_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """``WEIGHTWASH_<NAME>`` sets a field; the bare name does not."""
    monkeypatch.setenv("WEIGHTWASH_PORT", "8123")
    monkeypatch.setenv("WEIGHTWASH_DATA_DIR", "/srv/w")
    monkeypatch.setenv("HOST", "0.0.0.0")
    settings = Settings()
    assert settings.port == 8123
    assert settings.host == "127.0.0.1"
    assert settings.resolved_database_url == "sqlite:////srv/w/weightwash.db"


def test_blob_url_names_a_folder_of_any_name(tmp_path: Path) -> None:
    """A data folder of any name gives a blob URL that names it."""
    settings = Settings(data_dir=tmp_path / "a folder#1")
    store = blob_store(settings.resolved_blob_url)
    assert isinstance(store, FileBlobStore)
    assert store.folder == tmp_path / "a folder#1" / "blobs"


@pytest.mark.parametrize("auth", [Auth.AUTO, Auth.OFF])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_open_door_is_refused(host: str, auth: Auth) -> None:
    """No address but loopback is served without tokens."""
    with pytest.raises(ValidationError, match="WEIGHTWASH_AUTH=tokens"):
        Settings(host=host, auth=auth)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_token(host: str) -> None:
    """On loopback ``auto`` asks for no token."""
    assert Settings(host=host).requires_tokens is False


def test_any_address_is_served_with_tokens() -> None:
    """With tokens the service may bind every address, and asks for them on loopback too."""
    assert Settings(host="0.0.0.0", auth=Auth.TOKENS).requires_tokens
    assert Settings(auth=Auth.TOKENS).requires_tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70000),
        ("device", "tpu"),
        ("device", "cuda:"),
        ("embedded_workers", 2),
        ("lease_seconds", 0),
        ("max_model_bytes", 0),
        ("max_wait_seconds", 601),
        ("log_level", "loud"),
        ("auth", "maybe"),
        ("public_url", "not a url"),
    ],
)
def test_value_out_of_bounds_is_refused(name: str, value: object) -> None:
    """A setting that makes no sense stops the start."""
    with pytest.raises(ValidationError, match=name):
        Settings(**{name: value})  # type: ignore[arg-type]


def test_settings_do_not_change() -> None:
    """Settings are read once."""
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    """Each field says what it is for."""
    assert all(field.description for field in Settings.model_fields.values())


def test_lease_outlives_a_missed_heartbeat() -> None:
    """Times under which a healthy worker would lose its job are refused."""
    with pytest.raises(ValidationError, match="WEIGHTWASH_LEASE_SECONDS"):
        Settings(lease_seconds=10, heartbeat_seconds=6)
    assert Settings(lease_seconds=12, heartbeat_seconds=6)


@pytest.mark.parametrize(
    ("sandbox", "broker", "required"),
    [
        ("auto", None, False),
        ("auto", "redis://localhost", True),
        ("required", None, True),
        ("best-effort", "redis://localhost", False),
    ],
)
def test_sandbox_is_required_where_there_is_a_broker(
    sandbox: str, broker: str | None, required: bool
) -> None:
    """Unless the operator says so, distributed workers need every wall, an embedded one what there is."""
    settings = Settings(sandbox=Sandbox(sandbox), broker_url=broker)
    assert settings.requires_sandbox is required
