"""
Tell what a sample file holds, and check every value in it, in bounded memory.

A sample file is an ``.npz`` (``npz``) or a ``.safetensors`` (``safetensors``) with ``images`` (uint8
NHWC, or float NCHW in [0, 1]), ``labels`` (whole numbers) and, for triggered samples, ``target``
(``arrays``), or a zip of class folders of PNG and JPEG (``image_folders``). Declared sizes are added up
before anything is unpacked.
"""

import struct
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from common.errors import (
    ClassCountMismatch,
    DamagedFile,
    EmptyFile,
    InvalidSamples,
    Refused,
    TooLarge,
)
from common.formats.zips import is_zip, opened_zip

MAX_SIDE = 4096
"""Height or width of an image."""

MAX_IMAGES = 1_000_000
"""Images in a file, so that labels, which are held as a whole, take little memory."""

MAX_MEMBERS = 50_000
"""Files in a zip of images; a larger set is better sent as arrays."""

MAX_RATIO = 200
"""How many times its size a large file may unpack to; deflate reaches a thousand, photographs two."""

SMALL_BYTES = 16 << 20
"""What any file may unpack to, whatever its size."""

_MAX_DIRECTORY_BYTES = 8 << 20  # 160 bytes for each of them


class Purpose(StrEnum):
    """What a sample file is for, which says what it must hold."""

    SAMPLES = "samples"  # clean images to purify with; labels are optional
    EVALUATION = "evaluation"  # clean, labelled images, only to measure
    TRIGGERED = "triggered"  # triggered images with true labels and target, only to measure


@dataclass(frozen=True, kw_only=True)
class SampleFile:
    """
    A sample file's facts.

    Attributes:
        image_shape: (channels, height, width) whatever the layout.
        folders: How many class folders there are, where their order alone tells the labels.
    """

    count: int
    image_shape: tuple[int, int, int]
    labels: tuple[int, ...] | None
    targets: tuple[int, ...] | None
    folders: int | None = None

    @property
    def classes(self) -> int | None:
        """How many classes have a sample; ``None`` without labels."""
        return None if self.labels is None else len(set(self.labels))


def inspect_samples(path: Path, purpose: Purpose, *, max_bytes: int) -> SampleFile:
    """
    Read and check a sample file.

    Args:
        path: The file as uploaded.
        purpose: What it must hold.
        max_bytes: Size of all that is in it together, unpacked.

    Raises:
        Refused: It is no such file; the class says why.
    """
    from common.formats import (  # noqa: PLC0415 - they use this module's types
        arrays,
        image_folders,
        npz,
        safetensors,
    )

    if not path.stat().st_size:
        raise EmptyFile(f"The {purpose} file is empty.")
    if safetensors.is_safetensors(path):  # first: the length of its header may read PK
        if path.stat().st_size > max_bytes:
            raise TooLarge(f"The {purpose} file is larger than {max_bytes} bytes.")
        return arrays.inspect(safetensors.arrays_in(path), purpose)
    if not is_zip(path):
        raise InvalidSamples(
            f"The {purpose} file is none of .npz, .safetensors and a zip of images."
        )
    try:
        with opened_samples(path) as archive:
            _check_sizes(archive.infolist(), purpose, max_bytes)
            if image_folders.are_in(archive):
                return image_folders.inspect(archive, purpose, max_bytes=max_bytes)
            return arrays.inspect(npz.arrays_in(archive), purpose)
    except Refused:
        raise
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,
        ValueError,
        struct.error,
        zlib.error,
    ) as exc:
        raise DamagedFile(f"The {purpose} file is a truncated or damaged zip.") from exc


def opened_samples(path: Path) -> AbstractContextManager[zipfile.ZipFile]:
    """Open the zip that a sample file is, within the limits that hold for it."""
    return opened_zip(
        path,
        max_members=MAX_MEMBERS,
        max_directory_bytes=_MAX_DIRECTORY_BYTES,
        refusal=InvalidSamples(f"The zip holds more than {MAX_MEMBERS} files."),
    )


def check_labels(file: SampleFile, purpose: Purpose, *, classes: int) -> None:
    """
    Check that every label and target is one of the model's classes.

    Raises:
        ClassCountMismatch: One is not, or folders are numbered by their order and some are missing.
    """
    for name, values in (("label", file.labels), ("target", file.targets)):
        highest = max(values or (0,))
        if highest >= classes:
            raise ClassCountMismatch(
                f"The {purpose} file has the {name} {highest}; the model has {classes} classes, "
                f"0 to {classes - 1}."
            )
    if file.folders is not None and file.folders != classes:
        raise ClassCountMismatch(
            f"The {purpose} file has {file.folders} class folders; the model has {classes} classes, "
            "and the order of the folders does not tell which are meant.",
            hint='Put a classes.json at its top: {"folder": class, …}, or a list of all folders in '
            "the order of the classes.",
        )


def _check_sizes(infos: Sequence[zipfile.ZipInfo], purpose: Purpose, max_bytes: int) -> None:
    """Add up what the members declare; no member can unpack to more than it declares."""
    # Other methods are never numpy's or zip's own, and a few bytes of LZMA can ask for gigabytes.
    if any(info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for info in infos):
        raise InvalidSamples(f"The {purpose} file is compressed in a way that is not taken.")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > max_bytes:
        raise TooLarge(f"The {purpose} file unpacks to more than {max_bytes} bytes.")
    if unpacked > max(SMALL_BYTES, MAX_RATIO * sum(info.compress_size for info in infos)):
        raise TooLarge(
            f"The {purpose} file unpacks to more than {MAX_RATIO} times its size.",
            hint="Send it uncompressed, with np.savez.",
        )
