"""A process's folder lives as long as the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.folders import ProcessFolder, sweep_dead_folders

ROOT = Path(__file__).parents[2]
OWNER = """
import sys
from pathlib import Path
from common.folders import ProcessFolder
folder = ProcessFolder(Path(sys.argv[1]))
(folder.path / "work.bin").write_bytes(b"x")
print(folder.path, flush=True)
sys.stdin.read()
"""


def start_owner(root: Path) -> tuple[subprocess.Popen[str], Path]:
    """Start a process that owns a folder, and return it with the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(root)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_folder_of_a_killed_process_is_swept_and_a_living_ones_is_not(tmp_path: Path) -> None:
    """The lock ends with the process, however it ends."""
    with start_owner(tmp_path)[0] as dead, start_owner(tmp_path)[0] as alive:
        folders = {int(path.name.partition("-")[0]): path for path in tmp_path.iterdir()}
        assert sweep_dead_folders(tmp_path) == 0
        dead.kill()
        dead.wait()
        assert sweep_dead_folders(tmp_path) == 1
        assert not folders[dead.pid].exists()
        assert (folders[alive.pid] / "work.bin").read_bytes() == b"x"
        alive.kill()


def test_own_folder_is_private_and_never_swept(tmp_path: Path) -> None:
    """A process's sweep leaves its own folder alone; nobody else can look into it."""
    folder = ProcessFolder(tmp_path)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert sweep_dead_folders(tmp_path) == 0
    assert folder.path.is_dir()
    folder.close()


def test_close_removes_the_folder(tmp_path: Path) -> None:
    """Nothing is left after a close, also of what was written into it."""
    folder = ProcessFolder(tmp_path / "made" / "too")
    (folder.path / "sub").mkdir()
    (folder.path / "sub" / "file").write_bytes(b"x")
    folder.close()
    assert list((tmp_path / "made" / "too").iterdir()) == []


def test_two_folders_of_one_process_do_not_meet(tmp_path: Path) -> None:
    """Each folder is its owner's alone, also within one process."""
    first, second = ProcessFolder(tmp_path), ProcessFolder(tmp_path)
    assert first.path != second.path
    first.close()
    assert second.path.is_dir()
    second.close()


@pytest.mark.parametrize("name", [".being-made", "not-ours"])
def test_what_is_not_a_process_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    """A hidden folder that is just being made, and a folder without a lock, are not swept."""
    (tmp_path / name).mkdir()
    (tmp_path / "file").write_bytes(b"x")
    assert sweep_dead_folders(tmp_path) == 0
    assert (tmp_path / name).is_dir()


def test_sweep_of_a_missing_root(tmp_path: Path) -> None:
    """A root that was never made holds nothing to sweep."""
    assert sweep_dead_folders(tmp_path / "nowhere") == 0
