"""
Where files live: a store of immutable blobs behind five verbs.

Uploads are content-addressed per tenant (``uploads/<tenant>/<sha256>``); a job's output is named after
the lease that wrote it (``outputs/<job>/<attempt>-<token>``), so that two workers never write one key;
what lies beside it has its key, a dot and a name.
"""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

_PUT_TRIES = 100  # each is lost to one delete of a folder's last file
_KEY = re.compile(r"[a-z]+(/[A-Za-z0-9_-][A-Za-z0-9._-]*){1,3}")


class BlobStore(Protocol):
    """
    A place that keeps files under keys.

    Law: after ``put(key, path)`` returns, ``open(key)`` reads those bytes, on every machine, until
    ``delete(key)``; a crash in ``put`` leaves either nothing under the key or all of it.
    """

    def put(self, key: str, path: Path) -> None:
        """
        Store the file *path* under *key*; *path* is gone afterwards.

        Raises:
            OSError: It could not be stored; ``errno.ENOSPC`` when the store is full.
        """

    def open(self, key: str) -> BinaryIO:
        """
        Open a blob for reading; the reader survives a ``delete``.

        Raises:
            FileNotFoundError: There is no such blob.
        """

    def delete(self, key: str) -> None:
        """Delete a blob; one that is not there is no error."""

    def keys(self, prefix: str) -> Iterator[str]:
        """Return the keys that start with the folder *prefix*."""

    def check(self) -> None:
        """Write and delete something small; whatever it raises says what is wrong."""


class FileBlobStore:
    """A blob store in a folder, which may be shared between machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def put(self, key: str, path: Path) -> None:
        """Move *path* to its place: written out, renamed, and the rename written out too."""
        target = self._path(key)
        _sync(path)
        for tries_left in reversed(range(_PUT_TRIES)):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                _move_in(path, target)
            except (FileNotFoundError, FileExistsError):
                # A delete has just taken the emptied folder away; `mkdir` may meet it half gone.
                if not tries_left or not path.exists():
                    raise
            else:
                break
        _sync(target.parent)

    def open(self, key: str) -> BinaryIO:
        """Open the file."""
        return self._path(key).open("rb")

    def delete(self, key: str) -> None:
        """Unlink the file, and its folder when it was the last one in it."""
        path = self._path(key)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or somebody is just writing into it
            if path.parent.parent != self.folder:
                path.parent.rmdir()

    def keys(self, prefix: str) -> Iterator[str]:
        """Walk the folder."""
        for path in sorted((self.folder / prefix).rglob("*")):
            key = path.relative_to(self.folder).as_posix()
            if path.is_file() and _KEY.fullmatch(key):
                yield key

    def check(self) -> None:
        """Write and delete a file."""
        probe = self.folder / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"weightwash")
        probe.unlink()

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a blob key: {key!r}")
        return self.folder / key


def blob_store(url: str) -> BlobStore:
    """
    Return the store that *url* names.

    Raises:
        ValueError: No store has this scheme.
    """
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"}:
        raise ValueError(f"no blob store for {parts.scheme}: use file:///folder")
    return FileBlobStore(Path(unquote(parts.path)))


def upload_key(tenant: str, sha256: str) -> str:
    """Return the key of an upload; equal bytes of one tenant share it."""
    return f"uploads/{tenant}/{sha256}"


def tenant_of(key: str) -> str:
    """Return whose upload *key* is."""
    return key.split("/")[1]


def output_key(job_id: str, attempt: int, lease_token: str) -> str:
    """Return the key of the model that one attempt made."""
    return f"outputs/{job_id}/{attempt}-{lease_token}"


def artefact_key(model_key: str, name: str) -> str:
    """Return the key of a file that was made beside the model *model_key*."""
    return f"{model_key}.{name}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_in(path: Path, target: Path) -> None:
    try:
        path.replace(target)
    except OSError as exc:
        if exc.errno != errno.EXDEV:  # the store is on another file system
            raise
        _copy_in(path, target)


def _copy_in(path: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        shutil.copyfile(path, temporary)
        _sync(temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    path.unlink()
