"""
Tell a picture's size from its own bytes, before anybody decodes it.

PNG is read whole: every chunk with its checksum, and the pixels are inflated and counted. JPEG is read
from marker to marker. What has no one obvious reading as 8-bit grey or colour is refused: transparency,
16 bits, CMYK. Of an animation only the first picture counts. Sources: the PNG specification (third
edition), ITU-T T.81.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from common.errors import InvalidImages

MAX_CHUNKS = 100_000
"""Chunks of a PNG: some encoders write the pixels in pieces of 8 KiB."""

MAX_SCANS = 64
"""Scans of a JPEG: a progressive one has about ten, and each costs as much as the whole picture."""

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_STEP_BYTES = 1 << 20
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # left, top, and the steps across and down of each pass
_SAMPLES = {0: 1, 2: 3, 3: 1}  # values of a pixel by PNG's colour type; the others are transparent
_DEPTHS = {0: {1, 2, 4, 8}, 2: {8}, 3: {1, 2, 4, 8}}
_SCAN, _END = 0xDA, 0xD9
_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended and progressive, by Huffman codes
_OTHER_FRAMES = (
    set(range(0xC0, 0xD0)) - _FRAMES - {0xC4, 0xC8}
)  # lossless, arithmetic, hierarchical
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a picture says of itself."""

    width: int
    height: int
    is_grey: bool


def inspect_picture(content: bytes, *, max_side: int) -> Picture:
    """
    Read a PNG or a JPEG, known by its content and not by its name.

    Raises:
        InvalidImages: It is neither, is damaged, or is of a kind that is not taken.
    """
    try:
        if content.startswith(_PNG):
            return _png(content, max_side)
        if content.startswith(_JPEG):
            return _jpeg(content, max_side)
    except (struct.error, IndexError, zlib.error) as exc:
        raise InvalidImages("it is damaged") from exc
    raise InvalidImages("it is neither a PNG nor a JPEG")


def _png(content: bytes, max_side: int) -> Picture:
    chunks = _chunks(content)
    kind, header = next(chunks)
    if kind != b"IHDR" or len(header) != 13:
        raise InvalidImages("it is a PNG without a header")
    width, height, depth, colour, compression, filters, interlace = struct.unpack(">2I5B", header)
    _check_side(width, height, max_side)
    if depth not in _DEPTHS.get(colour, set()):
        raise InvalidImages("it is transparent, or has 16 bits for a value; save it as 8-bit RGB")
    if compression or filters or interlace > 1:
        raise InvalidImages("it is a PNG of an unknown kind")
    pixels: list[bytes] = []
    has_palette = False
    for kind, data in chunks:
        if kind == b"tRNS":
            raise InvalidImages("it is transparent; save it as 8-bit RGB")
        has_palette |= kind == b"PLTE"
        if kind == b"IDAT":
            pixels.append(data)
    if colour == 3 and not has_palette:
        raise InvalidImages("it is a PNG without its palette")
    expected = _pixel_bytes(width, height, depth * _SAMPLES[colour], is_interlaced=bool(interlace))
    if _inflated_bytes(pixels, expected) != expected:
        raise InvalidImages("it is a PNG with more or fewer pixels than it says")
    return Picture(width=width, height=height, is_grey=colour == 0)


def _pixel_bytes(width: int, height: int, bits: int, *, is_interlaced: bool) -> int:
    """Return what the pixels inflate to: in each pass, rows of a filter byte and whole bytes."""
    count = 0
    for left, top, across, down in _ADAM7 if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            count += rows * (1 + -(-columns * bits // 8))
    return count


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and data of each chunk; the last is IEND, at the end of the file."""
    position = len(_PNG)
    for _ in range(MAX_CHUNKS):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 8 + length
        (checksum,) = struct.unpack_from(">I", content, end)
        data = content[position + 8 : end]
        if zlib.crc32(data, zlib.crc32(kind)) != checksum:
            raise InvalidImages("it is a PNG with a wrong checksum")
        position = end + 4
        if kind == b"IEND":
            if position != len(content):
                raise InvalidImages("it is a PNG with bytes after its end")
            return
        yield kind, data
    raise InvalidImages("it is a PNG of too many chunks")


def _inflated_bytes(pieces: list[bytes], expected: int) -> int:
    """Count what the pixels inflate to, without keeping it, and stop at one byte too many."""
    inflater = zlib.decompressobj()
    count = 0
    for piece in pieces:
        waiting = piece
        while waiting and count <= expected:
            count += len(inflater.decompress(waiting, _STEP_BYTES))
            waiting = inflater.unconsumed_tail
        if inflater.unused_data:
            raise InvalidImages("it is a PNG with bytes after its pixels")
    while not inflater.eof and count <= expected:
        rest = len(inflater.decompress(b"", _STEP_BYTES))
        if not rest:
            raise InvalidImages("it is a PNG that ends early")
        count += rest
    return count


def _jpeg(content: bytes, max_side: int) -> Picture:
    found: Picture | None = None
    scans = 0
    for marker, segment in _segments(content):
        if marker in _OTHER_FRAMES or (marker in _FRAMES and found is not None):
            raise InvalidImages("it is a JPEG of a kind that is not taken")
        if marker in _FRAMES:
            found = _frame(segment, max_side)
        scans += marker == _SCAN
        if scans > MAX_SCANS or (scans and found is None):
            raise InvalidImages("it is a JPEG of too many scans, or of none that can be read")
    if found is None or not scans:
        raise InvalidImages("it is a JPEG without a picture")
    return found


def _segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of each segment up to the end of the first picture."""
    position = 2
    while content[position + 1] != _END:
        marker = content[position + 1]
        if content[position] != 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD8:
            raise InvalidImages("it is a damaged JPEG")
        if marker == 0xFF:  # fill
            position += 1
            continue
        (length,) = struct.unpack_from(">H", content, position + 2)
        segment = content[position + 4 : position + 2 + length]
        if length < 2 or len(segment) != length - 2:
            raise InvalidImages("it is a JPEG that ends early")
        yield marker, segment
        position += 2 + length
        if marker == _SCAN:
            following = _NEXT_MARKER.search(content, position)
            if following is None:
                raise InvalidImages("it is a JPEG that ends early")
            position = following.start()
    if content[position] != 0xFF:
        raise InvalidImages("it is a damaged JPEG")


def _frame(segment: bytes, max_side: int) -> Picture:
    depth, height, width, components = struct.unpack_from(">B2HB", segment)
    if depth != 8 or components not in {1, 3}:
        raise InvalidImages("it is not 8-bit grey or colour; save it as RGB")
    _check_side(width, height, max_side)
    return Picture(width=width, height=height, is_grey=components == 1)


def _check_side(width: int, height: int, max_side: int) -> None:
    if not (0 < width <= max_side and 0 < height <= max_side):
        raise InvalidImages(f"it is of {width}x{height} pixels; {max_side} a side are allowed")
