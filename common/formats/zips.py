"""Open a zip whose directory nobody has vouched for."""

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import Refused


class _Bounded(io.BufferedReader):
    """
    A file that refuses one read of more than ``limit`` bytes, as long as there is a limit.

    A damaged zip also sends its reader to places before the file's begin, which is no I/O error.
    """

    limit: int | None = None
    refusal: Refused | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """Read, or refuse."""
        if self.limit is not None and size is not None and size > self.limit:
            assert self.refusal is not None
            raise self.refusal
        return super().read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to *offset*, or say that the zip is damaged."""
        if whence == os.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile("a place before the file's begin")
        return super().seek(offset, whence)


@contextmanager
def opened_zip(
    path: Path, *, max_directory_bytes: int, refusal: Refused
) -> Iterator[zipfile.ZipFile]:
    """
    Open a zip; raise *refusal* if its directory is larger than *max_directory_bytes*.

    ``zipfile`` reads the whole directory at once and makes an object of some 600 bytes from each
    entry of 46 or more, before anybody can count them.
    """
    with _Bounded(io.FileIO(path)) as file:
        file.limit, file.refusal = max_directory_bytes, refusal
        with zipfile.ZipFile(file) as archive:
            file.limit = None
            yield archive
