"""
Read a multipart form straight to disk.

Each file is hashed while it is written, each limit checked as it is reached, nothing kept twice. No name
and no length that the client sent is trusted: file names are for display, sizes are counted.
"""

import errno
import hashlib
import re
import shutil
import unicodedata
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from streaming_form_data import ParseFailedException, StreamingFormDataParser
from streaming_form_data.parser import UnexpectedPartException, parse_content_boundary
from streaming_form_data.targets import BaseTarget

from common.errors import (
    InvalidField,
    MissingField,
    NoSpace,
    NotMultipart,
    Problem,
    TooLarge,
    UnknownField,
)
from common.settings import Settings

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

_BATCH_BYTES = 1 << 20  # what one trip to a thread parses, hashes and writes
_MAX_NAME_LENGTH = 120
_EPILOGUE_BYTES = 1024  # may follow the last delimiter; no client is known to send any


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
        Refused: It is no complete form, holds an unknown field, or is too large.
        NoSpace: The disk is full.
    """
    folder = root / uuid.uuid4().hex
    try:
        await run_in_threadpool(folder.mkdir)
        yield await _receive(request, settings, folder)
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace from exc
        raise
    finally:
        await run_in_threadpool(shutil.rmtree, folder, ignore_errors=True)


def display_name(given: str | None, *, default: str) -> str:
    """Return a client's file name without anything that a shell, a terminal or a header could act on."""
    name = re.split(r"[/\\]", given or "")[-1]
    name = unicodedata.normalize("NFC", name)
    name = re.sub(r"[^\w.()+ -]", "_", name).strip(" .")[-_MAX_NAME_LENGTH:]
    return name.lstrip("-. ") or default


class _Target(BaseTarget, ABC):  # type: ignore[misc]  # the library has no types
    """
    A part of the form.

    A problem is kept, not raised: it must not cross the parser, which is not written for it.
    """

    def __init__(self, field: str, limit: int) -> None:
        super().__init__()
        self.field = field
        self.size = 0
        self.is_complete = False
        self.problem: Problem | OSError | None = None
        self._limit = limit
        self._starts = 0

    @property
    def is_started(self) -> bool:
        """Whether the form holds this part."""
        return self._starts > 0

    def on_start(self) -> None:
        self._starts += 1
        if self._starts > 1:
            self.problem = InvalidField(f"The field {self.field!r} was sent twice.")

    def on_data_received(self, chunk: bytes) -> None:
        self.size += len(chunk)
        if self.problem is None and self.size > self._limit:
            self.problem = TooLarge(f"{self.field!r} is larger than {self._limit} bytes.")
        if self.problem is None:
            try:
                self.keep(chunk)
            except OSError as exc:
                self.problem = exc

    def on_finish(self) -> None:
        self.is_complete = True

    @abstractmethod
    def keep(self, chunk: bytes) -> None:
        """Take the next bytes of the part."""


class _TextTarget(_Target):
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


class _FileTarget(_Target):
    def __init__(self, field: str, limit: int, path: Path) -> None:
        super().__init__(field, limit)
        self.path = path
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None

    def on_start(self) -> None:
        super().on_start()
        if self._file is None:
            try:
                self._file = self.path.open("xb")
            except OSError as exc:
                self.problem = exc

    def keep(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        assert self._file is not None
        self._file.write(chunk)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def uploaded(self) -> UploadedFile:
        return UploadedFile(
            path=self.path,
            name=display_name(self.multipart_filename, default=self.field),
            sha256=self._digest.hexdigest(),
            bytes=self.size,
        )


async def _receive(request: Request, settings: Settings, folder: Path) -> Form:
    limits = dict.fromkeys(FILES, settings.max_samples_bytes)
    limits["model"] = settings.max_model_bytes
    files = {name: _FileTarget(name, limits[name], folder / name) for name in FILES}
    texts = {name: _TextTarget(name, settings.max_field_bytes) for name in TEXTS}
    targets: list[_Target] = [*files.values(), *texts.values()]
    try:
        parser = StreamingFormDataParser(headers=request.headers, strict=True)
        for target in targets:
            parser.register(target.field, target)
        last_delimiter = b"--" + parse_content_boundary(request.headers) + b"--"
    except (ParseFailedException, ValueError, LookupError, AttributeError, TypeError) as exc:
        # The standard library's header parser trips over some malformed types ("boundary*").
        raise NotMultipart(f"The body is not a form: {exc}.") from exc
    end, kept = b"", len(last_delimiter) + _EPILOGUE_BYTES
    try:
        async for batch in _batches(request, settings.max_body_bytes):
            await run_in_threadpool(_feed, parser, targets, batch)
            end = (end + batch[-kept:])[-kept:]
        if last_delimiter not in end:  # the parser is content with a form that stops anywhere
            raise NotMultipart("The form ends before its last delimiter.")
        return await run_in_threadpool(_complete, files, texts)
    finally:
        for file in files.values():
            file.close()


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


def _feed(parser: StreamingFormDataParser, targets: list[_Target], batch: bytes) -> None:
    try:
        parser.data_received(batch)
    except UnexpectedPartException as exc:
        known = ", ".join((*FILES, *TEXTS))
        raise UnknownField(
            f"There is no field {str(exc.part_name)[:80]!r}; the fields are {known}."
        ) from exc
    except ParseFailedException as exc:
        raise NotMultipart from exc
    for target in targets:
        if target.problem is not None:
            raise target.problem


def _complete(files: Mapping[str, _FileTarget], texts: Mapping[str, _TextTarget]) -> Form:
    for target in (*files.values(), *texts.values()):
        if target.is_started and not target.is_complete:
            raise NotMultipart("The form ends in the middle of a field.")
    for file in files.values():
        file.close()
    missing = [name for name in REQUIRED if not files[name].is_complete]
    if missing:
        raise MissingField(f"The form lacks {' and '.join(missing)}.")
    return Form(
        files={name: file.uploaded for name, file in files.items() if file.is_complete},
        texts={name: text.text for name, text in texts.items() if text.is_complete},
    )
