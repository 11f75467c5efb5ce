"""A picture's size is read from its own bytes, and what has no one reading is refused."""

import io
import random
import struct
import zlib
from typing import Any

import pytest
from PIL import Image, UnidentifiedImageError

from common.errors import InvalidImages
from common.formats.images import MAX_SCANS, Picture, inspect_picture


def picture(form: str, mode: str = "RGB", size: tuple[int, int] = (7, 5), **options: Any) -> bytes:
    """Return a picture of noise as Pillow writes it."""
    random_ = random.Random(0)
    image = Image.frombytes("RGB", size, random_.randbytes(3 * size[0] * size[1])).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 0, interlace: int = 0
) -> bytes:
    """Return a PNG put together by hand."""
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, interlace)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(pixels))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "is_grey"),
    [
        (picture("PNG"), False),
        (picture("PNG", "L"), True),
        (picture("PNG", "1"), True),
        (picture("PNG", "P"), False),
        (picture("JPEG"), False),
        (picture("JPEG", "L"), True),
        (picture("JPEG", progressive=True), False),
        (picture("JPEG", exif=b"Exif\0\0" + bytes(40)), False),
        (picture("JPEG") + b"a short film behind the picture", False),
    ],
)
def test_what_pillow_writes_is_read(content: bytes, *, is_grey: bool) -> None:
    """Width, height and whether it is grey are those of the picture that went in."""
    assert inspect_picture(content, max_side=64) == Picture(width=7, height=5, is_grey=is_grey)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 1), (8, 8), (9, 17)])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_interlaced_pixels_are_counted(size: tuple[int, int], depth: int) -> None:
    """Pillow decodes an interlaced PNG of exactly the bytes that are counted, and none of fewer."""
    width, height = size
    for missing in (0, 1):
        rows = b""
        for left, top, across, down in [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
                                        (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]:  # fmt: skip
            columns = len(range(left, width, across))
            if columns:
                rows += bytes(1 + (columns * depth + 7) // 8) * len(range(top, height, down))
        content = png(width, height, rows[missing:], depth=depth, interlace=1)
        if missing:
            with pytest.raises(InvalidImages):
                inspect_picture(content, max_side=64)
        else:
            assert inspect_picture(content, max_side=64).width == width
            Image.open(io.BytesIO(content), formats=["PNG"]).load()


JPEG = picture("JPEG")
SCAN = JPEG[JPEG.index(b"\xff\xda") : -2]
REFUSED = {
    "nothing": b"",
    "a GIF": picture("GIF"),
    "a BMP": picture("BMP"),
    "a page": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "transparency": picture("PNG", "RGBA"),
    "grey transparency": picture("PNG", "LA"),
    "a transparent colour": picture("PNG", "P", transparency=0),
    "16 bits": picture("PNG", "I;16"),
    "CMYK": picture("JPEG", "CMYK"),
    "a giant of no bytes": png(1 << 31, 1 << 31, b""),
    "one pixel too wide": png(65, 1, bytes(66)),
    "no width": png(0, 1, b""),
    "pixels that inflate to more": png(7, 5, bytes(1 << 20)),
    "pixels that inflate to less": png(7, 5, bytes(39)),
    "a palette that is missing": png(7, 5, bytes(40), colour=3),
    "a wrong checksum": picture("PNG").replace(b"IDAT", b"IDAU"),
    "bytes after a PNG": picture("PNG") + b"PK\x03\x04",
    "half a PNG": picture("PNG")[:-20],
    "half a JPEG": JPEG[: len(JPEG) // 2],
    "a JPEG without its end": JPEG[:-2],
    "a JPEG of no picture": b"\xff\xd8\xff\xd9",
    "a JPEG that declares a giant": JPEG.replace(
        struct.pack(">2H", 5, 7), struct.pack(">2H", 65535, 65535)
    ),
    "a JPEG of no height": JPEG.replace(struct.pack(">2H", 5, 7), struct.pack(">2H", 0, 7)),
    "a JPEG of two frames": JPEG.replace(
        b"\xff\xda", JPEG[JPEG.index(b"\xff\xc0") :][:19] + b"\xff\xda"
    ),
    "a JPEG of too many scans": JPEG[:-2] + SCAN * MAX_SCANS + b"\xff\xd9",
    "an arithmetic JPEG": JPEG.replace(b"\xff\xc0", b"\xff\xc9"),
}


@pytest.mark.parametrize("trick", REFUSED)
def test_other_pictures_are_refused(trick: str) -> None:
    """Other formats, pictures of two readings and pictures that lie are refused undecoded."""
    with pytest.raises(InvalidImages):
        inspect_picture(REFUSED[trick], max_side=64)


def test_noise_is_refused_or_read() -> None:
    """Random changes end in a refusal or in a reading, and Pillow sees no other size in what is read."""
    random_ = random.Random(1)
    for turn in range(600):
        content = bytearray(picture(["PNG", "JPEG"][turn % 2]))
        for _ in range(random_.choice([1, 2, 5])):
            content[random_.randrange(len(content))] = random_.randrange(256)
        try:
            found = inspect_picture(bytes(content), max_side=64)
            with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
                assert image.size == (found.width, found.height)
        except (InvalidImages, UnidentifiedImageError):
            continue
