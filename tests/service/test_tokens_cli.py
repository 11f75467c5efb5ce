"""Tokens are managed from the command line, beside a running service."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.db import Database
from common.errors import Unauthorised
from service.__main__ import main
from service.auth import authenticate

ROOT = Path(__file__).parents[2]


def tokens(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m service tokens``."""
    own = {name: value for name, value in os.environ.items() if "WEIGHTWASH" not in name}
    return subprocess.run(
        [sys.executable, "-m", "service", "tokens", *arguments],
        cwd=ROOT,
        env={**own, "WEIGHTWASH_DATA_DIR": str(folder), **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_token_is_made_listed_and_revoked(tmp_path: Path) -> None:
    """The token is printed alone, works, is listed without its secret, and ends when revoked."""
    made = tokens(tmp_path, "create", "ci", "--tenant", "acme", "--expires-in", "30d")
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert made.stdout == token + "\n"
    prefix, token_id, secret = token.split("_")
    assert prefix == "ww"
    database = Database(f"sqlite:///{tmp_path / 'weightwash.db'}")
    with database.read() as session:
        assert authenticate(session, f"Bearer {token}").tenant == "acme"

    listed = tokens(tmp_path, "list")
    assert listed.returncode == 0
    (line,) = listed.stdout.splitlines()
    assert secret not in line
    for word in (token_id, "live", "acme", "ci", "expires 20"):
        assert word in line

    assert tokens(tmp_path, "revoke", token_id).returncode == 0
    again = tokens(tmp_path, "revoke", token_id)
    assert again.returncode == 1
    assert token_id in again.stderr
    assert "Traceback" not in again.stderr
    with database.read() as session, pytest.raises(Unauthorised):
        authenticate(session, f"Bearer {token}")
    database.close()


def test_name_that_is_no_word_is_refused(tmp_path: Path) -> None:
    """A mistake ends with one sentence."""
    run = tokens(tmp_path, "create", "ci", "--tenant", "../x")
    assert run.returncode == 1
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "is not a name" in run.stderr


def test_token_is_rotated_with_its_scopes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new token is printed alone; until the overlap is over the list shows both as live."""
    monkeypatch.setenv("WEIGHTWASH_DATA_DIR", str(tmp_path))

    def said(*arguments: str) -> list[str]:
        assert main(["tokens", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    (old,) = said("create", "ci", "--scope", "read", "--scope", "admin")
    (new,) = said("rotate", old.split("_")[1], "--overlap", "12h")
    old_id, new_id = (token.split("_")[1] for token in (old, new))
    lines = said("list")
    assert [line.split()[:3] for line in lines] == [
        [old_id, "live", "read,admin"],
        [new_id, "live", "read,admin"],
    ]
    assert f"replaced by {new_id}" in lines[0]
    assert "expires never" not in lines[0]
    assert "expires never  used never" in lines[1]
    assert main(["tokens", "rotate", old_id]) == 1
    again = capsys.readouterr()
    assert again.out == ""
    assert len(again.err.splitlines()) == 1


@pytest.mark.parametrize("scope", ["write", "", "READ", "read,admin"])
def test_scope_that_there_is_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], scope: str
) -> None:
    """A slip makes no token; the message lists the scopes."""
    monkeypatch.setenv("WEIGHTWASH_DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as refused:
        main(["tokens", "create", "ci", "--scope", scope])
    assert refused.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    for word in ("submit", "read", "admin"):
        assert word in said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "life", ["nan", "inf", "1e300d", "0d", "-1d", "3651d", "30", "1.5d", "9999999999d", "soon", ""]
)
def test_life_that_is_no_life_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], life: str
) -> None:
    """A token never lives longer than it was meant to because of a slip."""
    monkeypatch.setenv("WEIGHTWASH_DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as refused:
        main(["tokens", "create", "ci", f"--expires-in={life}"])
    assert refused.value.code == 2
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_open_door_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A public address without authentication does not start; the sentence says what to set."""
    monkeypatch.setenv("WEIGHTWASH_HOST", "0.0.0.0")
    assert main(["serve"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "WEIGHTWASH_AUTH=tokens" in said.err


def test_wrong_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A setting that does not parse is told by the name of its variable."""
    monkeypatch.setenv("WEIGHTWASH_PORT", "eighty")
    assert main(["serve"]) == 2
    assert capsys.readouterr().err.startswith("WEIGHTWASH_PORT: ")
