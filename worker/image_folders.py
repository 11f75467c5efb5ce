"""Decode a zip of class folders that the gate has let through; the gate's own checks are made again."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.errors import InvalidImages, Refused
from common.formats import image_folders
from common.formats.samples import opened_samples

_FORMATS = ("PNG", "JPEG")  # Pillow knows many more, and each is a parser


def load(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """
    Return images ``(N, H, W, C)`` and labels ``(N,)``, class after class; C is 1 if all are grey.

    Raises:
        Refused: The zip or a picture in it cannot be read.
    """
    try:
        with opened_samples(path) as archive:
            listing = image_folders.listed(archive)
            found = [picture for _, picture in image_folders.pictures(archive, listing)]
            shape = (len(found), found[0].height, found[0].width)
            mode = "L" if all(picture.is_grey for picture in found) else "RGB"
            images = np.empty((*shape, len(mode)), np.uint8)
            for place, (name, _) in enumerate(listing.images):
                images[place] = _decoded(archive.read(name), mode).reshape(images.shape[1:])
    except Refused:
        raise
    except (
        Image.DecompressionBombError,
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        NotImplementedError,
        OSError,
        SyntaxError,  # what Pillow calls a broken PNG
        ValueError,
        EOFError,
    ) as exc:
        raise InvalidImages(f"An image cannot be decoded: {exc}.") from exc
    return images, np.array([label for _, label in listing.images], np.int64)


def _decoded(content: bytes, mode: str) -> npt.NDArray[np.uint8]:
    """Decode the first picture; turning it as its camera's tag says is left to nobody."""
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        image.load()
        return np.asarray(image.convert(mode))
