"""A job's process from outside: its home, its words, its end."""

import json
import os
from pathlib import Path

from tests.support.stack import wait_for
from worker.process import Child
from worker.sandbox import Stage


def test_home_goes_with_the_child(tmp_path: Path) -> None:
    """Each child has a fresh home, and nothing of it is left for the next one."""
    one, other = Child.start(tmp_path, Stage.CONVERT), Child.start(tmp_path, Stage.CONVERT)
    homes = sorted(tmp_path.iterdir())
    assert len(homes) == 2
    one.kill()
    other.kill()
    assert not list(tmp_path.iterdir())


def test_nothing_in_its_home_is_imported(tmp_path: Path) -> None:
    """A file that lies where a child works is never taken for a library."""
    child = Child.start(tmp_path, Stage.CONVERT)
    (home,) = tmp_path.iterdir()
    for name in ("torch.py", "worker.py", "sitecustomize.py", "json.py"):
        (home / name).write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    limits = {"file_bytes": 1 << 20, "memory_bytes": 1 << 20, "cpu_seconds": 60}
    child.give({"step": "convert", "spec": {}, "limits": limits})
    assert wait_for(lambda: child.exit_status)
    assert "validation error" in child.last_words  # it came as far as reading the job
    child.kill()
    assert not (tmp_path / "canary").exists()


def test_environment_holds_no_secret(tmp_path: Path) -> None:
    """Of this process's environment a child sees only what torch and the loader read."""
    os.environ["WEIGHTWASH_DATABASE_URL"] = "postgresql://user:secret@host/db"
    try:
        child = Child.start(tmp_path, Stage.CONVERT)
    finally:
        del os.environ["WEIGHTWASH_DATABASE_URL"]
    environment = Path(f"/proc/{child._process.pid}/environ").read_bytes()
    child.kill()
    assert b"secret" not in environment
    assert b"WEIGHTWASH" not in environment


def test_progress_that_is_none_is_passed_over(tmp_path: Path) -> None:
    """Noise in the place of progress neither changes it nor ends the reader."""
    child = Child.start(tmp_path, Stage.CONVERT)
    before = child.progress
    child.stop()
    reading, writing = os.pipe()
    noise = [b"{", b"[" * 4000, b'{"phase": "purify"}', b"\xff\xfe", b'"text"']
    lies = [
        {"phase": "purify", "fraction": float("nan"), "step": 1, "total": 2},
        {"phase": "world domination", "fraction": 0.5, "step": 1, "total": 2},
        {"phase": "purify", "fraction": 0.5, "step": float("inf"), "total": 2},
    ]
    os.write(writing, b"\n".join([*noise, *(json.dumps(lie).encode() for lie in lies), b""]))
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        child._read(pipe)
    assert child.progress == before
    child.kill()
