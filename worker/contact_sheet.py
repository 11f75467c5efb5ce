"""
One picture of a trigger: what it is, and samples without it and under it.

The first row holds the mask, the pattern, and the pattern as far as the mask shows it; or what is added
to every pixel; or from how far to the right and from how far below each pixel is taken: grey is nothing,
and the most there is, up or down, is white or black. The second row holds samples, and the third one the
same samples under the trigger. Images of one and three channels are shown as they are, all others as the
mean of their channels.
"""

import struct
import zlib

import numpy as np
import numpy.typing as npt

from worker.trial_files import Array, Arrays

Pixels = npt.NDArray[np.uint8]

MAX_SHOWN = 8
"""Samples in a picture, so that it fits a screen."""

_SMALL, _LARGE = 96, 256  # sides of an image between which it is shown as it is
_GAP = 4
_GREY = 128


def contact_sheet(arrays: Arrays, number: int) -> Pixels:
    """Return the picture of a trigger ``(H, W, 1)`` or, in colour, ``(H, W, 3)``."""
    chosen = _shown(arrays, number)
    rows = [
        _trigger(arrays, number),
        list(arrays["clean"][chosen]),
        list(arrays["stamped"][number][chosen]),
    ]
    tiles = [[_tile(image) for image in row] for row in rows if row]
    height, width, channels = tiles[0][0].shape
    columns = max(map(len, tiles))
    size = (len(tiles) * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels)
    sheet = np.full(size, _GREY, np.uint8)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            top, left = _GAP + i * (height + _GAP), _GAP + j * (width + _GAP)
            sheet[top : top + height, left : left + width] = tile
    return sheet


def png(pixels: Pixels) -> bytes:
    """Return ``(H, W, 1)`` or ``(H, W, 3)`` pixels as a PNG; the same pixels give the same bytes."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    # Every row begins with its filter; 0 is none.
    lines = np.pad(pixels.reshape(height, width * channels), ((0, 0), (1, 0)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _trigger(arrays: Arrays, number: int) -> list[Array]:
    """Return the pictures of what a trigger replaces, adds and moves, as far as it does."""
    mask, pattern = arrays["mask"][number], arrays["pattern"][number]
    added, shift = arrays["added"][number], arrays["shift"][number]
    pictures = []
    if added.any():
        pictures.append(_around_grey(added))
    if shift.any():
        pictures += [np.broadcast_to(part, pattern.shape) for part in _around_grey(shift)[:, None]]
    if mask.any() or not pictures:
        pictures += [np.broadcast_to(mask, pattern.shape), pattern, pattern * mask]
    return pictures


def _around_grey(values: Array) -> Array:
    grey: Array = 0.5 + 0.5 * values / np.abs(values).max()
    return grey


def _shown(arrays: Arrays, number: int) -> Array:
    """Return which of the kept samples are shown: of other classes than the trigger's, if there are."""
    labels = arrays["label"][: len(arrays["clean"])]
    others = np.flatnonzero(labels != arrays["target"][number])
    return (others if others.size else np.arange(len(labels)))[:MAX_SHOWN]


def _tile(image: Array) -> Pixels:
    """Return an image ``(C, H, W)`` in [0, 1] as pixels, larger or smaller by whole steps."""
    if len(image) not in {1, 3}:
        image = image.mean(axis=0, keepdims=True)
    side = max(image.shape[1:])
    step, times = -(-side // _LARGE), max(1, _SMALL // side)
    small: Pixels = np.rint(image[:, ::step, ::step] * 255).astype(np.uint8).transpose(1, 2, 0)
    return small.repeat(times, axis=0).repeat(times, axis=1)
