"""
Read a multipart form straight to disk.

Each file is hashed while it is written, each limit checked as it is reached, nothing kept twice. No name
and no length that the client sent is trusted: file names are for display, sizes are counted. The form
itself is read by ``multipart``, in constant memory whatever is sent.
"""

import errno
import hashlib
import re
import shutil
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from common.errors import (
    InvalidField,
    MissingField,
    NoSpace,
    NotMultipart,
    TooLarge,
    UnknownField,
)
from common.settings import Settings
from service.names import display_name

FILES = ("model", "samples", "evaluation", "triggered")
REQUIRED = ("model", "samples")
TEXTS = (
    "architecture",
    "architecture_args",
    "method",
    "params",
    "seed",
    "mean",
    "std",
    "priority",
    "cancel_after",
    "metadata",
    "path",
)

MAX_PART_HEADERS = 8  # a form's part has two or three
MAX_PART_HEADER_BYTES = 8192  # of one line, which holds a file name of any length that exists
_BATCH_BYTES = 1 << 20  # what one trip to a thread parses, hashes and writes
# Before the first part, between parts and behind the last one; no client is known to send any there.
_MAX_BYTES_OUTSIDE_PARTS = 64 << 10
_BOUNDARY = re.compile(
    r"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]"
)  # RFC 2046, 5.1.1
_OPTION = re.compile(r";[ \t]*boundary", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class UploadedFile:
    """A file of the form, on disk."""

    path: Path
    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """A whole form."""

    files: Mapping[str, UploadedFile]
    texts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """A digest of what the form says, whatever boundary and order it was sent with."""
        digest = hashlib.sha256()
        parts = {role: file.sha256 for role, file in self.files.items()} | dict(self.texts)
        for name in sorted(parts):
            for text in (name, parts[name]):
                digest.update(len(text.encode()).to_bytes(8, "big") + text.encode())
        return digest.hexdigest()


@asynccontextmanager
async def received_form(request: Request, settings: Settings, root: Path) -> AsyncIterator[Form]:
    """
    Receive the form; its files are there until the block ends.

    Raises:
        Refused: It is no complete form, holds an unknown field, is too large or comes too slowly.
        NoSpace: The disk is full.
    """
    boundary = announced_boundary(request.headers.get("content-type", ""))
    folder = root / uuid.uuid4().hex
    try:
        await run_in_threadpool(folder.mkdir)
        yield await _receive(request, boundary, settings, folder)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace from exc
        raise
    finally:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)


def announced_boundary(content_type: str) -> str:
    """
    Return the boundary that a ``Content-Type`` announces.

    Raises:
        NotMultipart: It announces no form, or a boundary that RFC 2046 does not have.
    """
    kind, options = parse_options_header(content_type)
    boundary: str = options.get("boundary", "")
    if kind != "multipart/form-data":
        raise NotMultipart("The Content-Type is not multipart/form-data.")
    # Two boundaries would be two ways to read one body, here and in a proxy.
    if len(_OPTION.findall(content_type)) != 1 or not _BOUNDARY.fullmatch(boundary):
        raise NotMultipart("The Content-Type has no boundary of 1 to 70 allowed characters.")
    return boundary


class _Sink(ABC):
    """Where one part of the form goes."""

    def __init__(self, field: str, limit: int) -> None:
        self.field = field
        self.size = 0
        self._limit = limit

    def take(self, chunk: bytes) -> None:
        """Count the next bytes of the part, and keep them."""
        self.size += len(chunk)
        if self.size > self._limit:
            raise TooLarge(f"{self.field!r} is larger than {self._limit} bytes.")
        self.keep(chunk)

    @abstractmethod
    def keep(self, chunk: bytes) -> None:
        """Keep the next bytes of the part."""


class _TextSink(_Sink):
    def __init__(self, field: str, limit: int) -> None:
        super().__init__(field, limit)
        self._text = bytearray()

    def keep(self, chunk: bytes) -> None:
        self._text += chunk

    @property
    def text(self) -> str:
        try:
            return self._text.decode()
        except UnicodeDecodeError as exc:
            raise InvalidField(f"The field {self.field!r} is not UTF-8.") from exc


class _FileSink(_Sink):
    def __init__(self, field: str, limit: int, path: Path, given_name: str | None) -> None:
        super().__init__(field, limit)
        self._path = path
        self._name = display_name(given_name, default=field)
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("xb")

    def keep(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._file.write(chunk)

    def close(self) -> None:
        self._file.close()

    @property
    def uploaded(self) -> UploadedFile:
        return UploadedFile(
            path=self._path, name=self._name, sha256=self._digest.hexdigest(), bytes=self.size
        )


class _Reader:
    """A form that comes in pieces."""

    def __init__(self, boundary: str, settings: Settings, folder: Path) -> None:
        self._parser = PushMultipartParser(
            boundary,
            max_header_size=MAX_PART_HEADER_BYTES,
            max_header_count=MAX_PART_HEADERS,
            max_segment_count=len(FILES) + len(TEXTS),
        )
        self._settings = settings
        self._folder = folder
        self._files: dict[str, _FileSink] = {}
        self._texts: dict[str, _TextSink] = {}
        self._open: _Sink | None = None
        self._bytes_outside = 0

    def feed(self, batch: bytes) -> None:
        """Take the next piece."""
        self._bytes_outside += len(batch)
        try:
            for event in self._parser.parse(batch):
                self._bytes_outside = 0
                match event:
                    case MultipartSegment():
                        self._open = self._sink(event)
                    case None:
                        self._open = None
                    case chunk:
                        assert self._open is not None
                        self._open.take(chunk)
        except MultipartError as exc:
            raise NotMultipart(f"The body is not a form: {exc}.") from exc
        if self._open is None and self._bytes_outside > _MAX_BYTES_OUTSIDE_PARTS:
            raise NotMultipart(
                f"More than {_MAX_BYTES_OUTSIDE_PARTS} bytes of the body are in no part of the form."
            )

    def _sink(self, part: MultipartSegment) -> _Sink:
        """
        Return where *part* goes.

        Raises:
            NotMultipart: It has no name, can be read in two ways, or holds a form of its own.
            InvalidField: There was such a part before.
        """
        if max(Counter(name for name, _ in part.headerlist).values()) > 1:
            raise NotMultipart("A part of the form has the same header twice.")
        if (part.content_type or "").startswith("multipart/"):
            raise NotMultipart("A part of the form is a form itself.")
        name = part.name
        if not name:
            raise NotMultipart("A part of the form has no name.")
        if name in self._files or name in self._texts:
            raise InvalidField(f"The field {name!r} was sent twice.")
        if name in TEXTS:
            text = self._texts[name] = _TextSink(name, self._settings.max_field_bytes)
            return text
        if name not in FILES:
            known = ", ".join((*FILES, *TEXTS))
            raise UnknownField(f"There is no field {name[:80]!r}; the fields are {known}.")
        limit = (
            self._settings.max_model_bytes if name == "model" else self._settings.max_samples_bytes
        )
        file = self._files[name] = _FileSink(name, limit, self._folder / name, part.filename)
        return file

    def form(self) -> Form:
        """
        Return the form, which has come to its end.

        Raises:
            NotMultipart: It has not.
            MissingField: It lacks a file.
        """
        try:
            self._parser.close()
        except MultipartError as exc:
            raise NotMultipart("The form ends before its last delimiter.") from exc
        self.close()
        missing = [name for name in REQUIRED if name not in self._files]
        if missing:
            raise MissingField(f"The form lacks {' and '.join(missing)}.")
        return Form(
            files={name: file.uploaded for name, file in self._files.items()},
            texts={name: text.text for name, text in self._texts.items()},
        )

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


async def _receive(request: Request, boundary: str, settings: Settings, folder: Path) -> Form:
    reader = _Reader(boundary, settings, folder)
    try:
        async for batch in _batches(request, settings.max_body_bytes):
            await run_in_threadpool(reader.feed, batch)
        return await run_in_threadpool(reader.form)
    finally:
        reader.close()


async def _batches(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body in pieces that are worth a trip to a thread."""
    batch = bytearray()
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > limit:
                raise TooLarge(f"The body is larger than {limit} bytes.")
            batch += chunk
            if len(batch) >= _BATCH_BYTES:
                yield bytes(batch)
                batch.clear()
    except ClientDisconnect as exc:
        raise NotMultipart("The connection ended before the form did.") from exc
    if batch:
        yield bytes(batch)
