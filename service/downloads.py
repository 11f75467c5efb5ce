"""Send a stored file: whole or one range of it, with strong validators (RFC 9110) and its digest."""

import base64
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from email.utils import format_datetime
from typing import BinaryIO

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from common import differences
from common.artefacts import Artefact
from common.blobs import BlobStore
from common.errors import Expired, RangeNotSatisfiable
from service.names import content_disposition

_CHUNK_BYTES = 256 << 10
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True)
class ByteRange:
    """Bytes *first* to *last*, both included."""

    first: int
    last: int


def requested_range(header: str | None, size: int) -> ByteRange | None:
    """
    Return the one range that a ``Range`` header asks for.

    ``None`` stands for the whole file, which is also the answer to a header that cannot be read or
    asks for several ranges: RFC 9110 lets a server ignore those.

    Raises:
        RangeNotSatisfiable: The range starts behind the end.
    """
    found = _RANGE.fullmatch((header or "").strip())
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if first == "":
        length = min(int(last), size)
        if length == 0:
            raise RangeNotSatisfiable
        return ByteRange(size - length, size - 1)
    start, end = int(first), size - 1 if last == "" else min(int(last), size - 1)
    if last != "" and int(last) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable
    return ByteRange(start, end)


@dataclass(frozen=True, kw_only=True)
class Download:
    """
    A stored file as it is offered.

    Attributes:
        key: The file in the store.
        differences_key: What makes the file that is offered of the one in the store, if anything.
        artefact: Digest and size of the file that is offered.
    """

    name: str
    key: str
    differences_key: str | None = None
    artefact: Artefact
    modified: datetime
    media_type: str = "application/octet-stream"


def send(download: Download, store: BlobStore, headers: Headers, *, with_body: bool) -> Response:
    """
    Answer a download, or a ``HEAD`` of it, which reads nothing and has no range.

    Raises:
        Expired: The file was deleted at this moment.
        RangeNotSatisfiable: The range starts behind the end.
    """
    sha256, size = download.artefact.sha256, download.artefact.bytes
    etag = f'"{sha256}"'
    kind = "inline" if download.media_type.startswith("image/") else "attachment"
    common = {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": content_disposition(download.name, kind=kind),
        "ETag": etag,
        "Last-Modified": format_datetime(download.modified, usegmt=True),
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:",
    }
    if etag_matches(headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=common)
    wanted = None
    if with_body and headers.get("if-range", etag) == etag:
        wanted = requested_range(headers.get("range"), size)
    file = _open(download, store)
    if not with_body:
        file.close()
        common["Content-Length"] = str(size)
        return Response(headers=common, media_type=download.media_type)
    part = wanted or ByteRange(0, size - 1)
    if wanted is not None:
        common["Content-Range"] = f"bytes {part.first}-{part.last}/{size}"
    return StreamingResponse(
        _read(file, part),
        status_code=200 if wanted is None else 206,
        headers={**common, "Content-Length": str(part.last - part.first + 1)},
        media_type=download.media_type,
    )


def etag_matches(header: str | None, etag: str) -> bool:
    """Return whether an ``If-None-Match`` header names *etag*."""
    if header is None:
        return False
    named = {tag.strip().removeprefix("W/") for tag in header.split(",")}
    return "*" in named or etag in named


def _open(download: Download, store: BlobStore) -> BinaryIO:
    try:
        file = store.open(download.key)
        if download.differences_key is None:
            return file
        with ExitStack() as opened:
            opened.enter_context(file)
            changed = opened.enter_context(store.open(download.differences_key))
            whole = differences.whole(file, changed)
            opened.pop_all()
            return whole
    except FileNotFoundError as exc:
        raise Expired from exc


def _read(file: BinaryIO, part: ByteRange) -> Iterator[bytes]:
    with file:
        file.seek(part.first)
        left = part.last - part.first + 1
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            left -= len(chunk)
            yield chunk
