"""The laws of the blob store."""

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.blobs import FileBlobStore, artefact_key, blob_store, output_key, upload_key

KEY = upload_key("acme", "a" * 64)


def incoming(tmp_path: Path, content: bytes = b"abc", *, name: str = "incoming") -> Path:
    """Write a file to be stored."""
    path = tmp_path / name
    path.write_bytes(content)
    return path


def read(store: FileBlobStore, key: str) -> bytes:
    """Return a blob's bytes."""
    with store.open(key) as file:
        return file.read()


def test_put_then_open_gives_the_bytes(store: FileBlobStore, tmp_path: Path) -> None:
    """``open(put(x)) == x``, and the source is gone."""
    source = incoming(tmp_path)
    store.put(KEY, source)
    assert read(store, KEY) == b"abc"
    assert not source.exists()


def test_put_again_replaces(store: FileBlobStore, tmp_path: Path) -> None:
    """A second put under one key leaves one blob, the newer one."""
    store.put(KEY, incoming(tmp_path, b"old"))
    store.put(KEY, incoming(tmp_path, b"new"))
    assert read(store, KEY) == b"new"
    assert list(store.keys("uploads")) == [KEY]


def test_open_reader_survives_a_delete(store: FileBlobStore, tmp_path: Path) -> None:
    """Whoever has opened a blob reads it to its end."""
    store.put(KEY, incoming(tmp_path))
    with store.open(KEY) as file:
        store.delete(KEY)
        assert file.read() == b"abc"


def test_missing_blob(store: FileBlobStore) -> None:
    """Opening what is not there says so; deleting it is no error."""
    with pytest.raises(FileNotFoundError):
        store.open(KEY)
    store.delete(KEY)


def test_delete_removes_blob_and_its_empty_folder(store: FileBlobStore, tmp_path: Path) -> None:
    """Nothing is left of the last blob in a folder; a neighbour stays."""
    neighbour = upload_key("acme", "b" * 64)
    store.put(KEY, incoming(tmp_path))
    store.put(neighbour, incoming(tmp_path))
    store.delete(KEY)
    assert list(store.keys("uploads")) == [neighbour]
    store.delete(neighbour)
    assert list((store.folder / "uploads").iterdir()) == []


def test_keys_lists_one_kind_only(store: FileBlobStore, tmp_path: Path) -> None:
    """``keys`` names the blobs of the asked kind and no temporary file."""
    output = output_key("job_1", 1, "e" * 32)
    beside = artefact_key(output, "candidate-0")
    for key in (KEY, output, beside):
        store.put(key, incoming(tmp_path))
    (store.folder / "uploads" / "acme" / ".half-written").write_bytes(b"x")
    store.check()
    assert list(store.keys("uploads")) == [KEY]
    assert list(store.keys("outputs")) == [output, beside]
    assert list(store.keys("nothing")) == []


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "uploads/../../etc/passwd",
        "uploads/acme/..",
        "uploads/.hidden/a",
        "uploads//a",
        "uploads",
        "uploads/a/b/c/d",
        "uploads/a\n",
        "uploads/a b",
        "../uploads/a",
        "uploads/a\0b",
    ],
)
def test_key_that_leaves_the_store_is_refused(
    store: FileBlobStore, tmp_path: Path, key: str
) -> None:
    """No key reaches outside the store or at a hidden file, by any verb."""
    for act in (store.open, store.delete):
        with pytest.raises(ValueError, match="not a blob key"):
            act(key)
    source = incoming(tmp_path)
    with pytest.raises(ValueError, match="not a blob key"):
        store.put(key, source)
    assert source.exists()


def test_store_on_another_file_system(
    store: FileBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a rename cannot cross, the file is copied, and nothing half-written shows."""
    rename = Path.replace

    def within_one_file_system(self: Path, target: Path) -> Path:
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", within_one_file_system)
    source = incoming(tmp_path)
    store.put(KEY, source)
    assert read(store, KEY) == b"abc"
    assert not source.exists()
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == ["a" * 64]


def test_full_store_says_so_and_keeps_nothing(
    store: FileBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store without space raises ``ENOSPC``; the key stays empty and the source remains."""

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    source = incoming(tmp_path)
    with pytest.raises(OSError, match="No space left") as caught:
        store.put(KEY, source)
    assert caught.value.errno == errno.ENOSPC
    assert source.exists()
    assert list(store.keys("uploads")) == []


def test_missing_source_is_an_error(store: FileBlobStore, tmp_path: Path) -> None:
    """A source that does not exist is reported, not waited for."""
    with pytest.raises(FileNotFoundError):
        store.put(KEY, tmp_path / "nowhere")


def test_put_beside_a_delete_never_fails(store: FileBlobStore, tmp_path: Path) -> None:
    """A put into a folder that a delete is just emptying succeeds all the same."""
    rounds = 150
    gate = threading.Barrier(2, timeout=10)

    def putting() -> None:
        for n in range(rounds):
            source = incoming(tmp_path, name=f"in-{n}")
            gate.wait()
            key = upload_key("acme", f"{n:064d}")
            store.put(key, source)
            assert read(store, key) == b"abc"

    def deleting() -> None:
        for n in range(rounds):
            gate.wait()
            store.delete(upload_key("acme", f"{n - 1:064d}"))

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(putting), pool.submit(deleting)]:
            future.result()


def test_url_names_a_store(tmp_path: Path) -> None:
    """A ``file://`` URL names a folder, also one with a space; anything else is refused."""
    folder = tmp_path / "a folder"
    store = blob_store(folder.as_uri())
    assert isinstance(store, FileBlobStore)
    assert store.folder == folder
    assert folder.is_dir()
    for url in ("s3://bucket/x", "/plain/path", "file://elsewhere/share", ""):
        with pytest.raises(ValueError, match="no blob store"):
            blob_store(url)


def test_check_of_a_store_that_is_gone(store: FileBlobStore) -> None:
    """A store whose folder vanished does not pass its check."""
    store.check()
    store.folder.rmdir()
    with pytest.raises(OSError, match="No such file"):
        store.check()
