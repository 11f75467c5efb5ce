"""Sample files as tensors: images float32 (N, C, H, W) in [0, 1], labels and targets int64 (N,)."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import ImagesOutOfRange, InvalidImages, InvalidLabels, InvalidSamples
from common.formats.samples import ALIASES


@dataclass(frozen=True, kw_only=True)
class Samples:
    """
    Images with what is known of them.

    Attributes:
        images: ``(N, C, H, W)`` float32 in [0, 1].
        labels: ``(N,)`` int64, or ``None`` when the file has none.
        targets: ``(N,)`` int64, the class each trigger aims at; only in triggered samples.
    """

    images: Tensor
    labels: Tensor | None
    targets: Tensor | None


def load_samples(path: Path) -> Samples:
    """
    Load a sample file that the gate has let through.

    Raises:
        InvalidSamples: It is damaged after all.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {ALIASES.get(name, name): archive[name] for name in archive.files}
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, KeyError) as exc:
        raise InvalidSamples(f"The sample file cannot be read: {exc}.") from exc
    if "images" not in arrays:
        raise InvalidSamples
    images = _images(arrays["images"])
    return Samples(
        images=images,
        labels=_whole_numbers(arrays.get("labels"), len(images)),
        targets=_whole_numbers(arrays.get("target"), len(images)),
    )


def _images(array: np.ndarray) -> Tensor:
    if array.ndim != 4:
        raise InvalidImages(f"The images have the shape {array.shape}.")
    if array.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))).float() / 255
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise ImagesOutOfRange
    return images


def _whole_numbers(array: np.ndarray | None, count: int) -> Tensor | None:
    if array is None:
        return None
    if array.ndim == 1 and len(array) != count:
        raise InvalidLabels(f"{count} images have {len(array)} labels.")
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise InvalidLabels(f"Labels of the type {array.dtype} and shape {array.shape}.")
    # A single target stands for all images.
    return torch.from_numpy(np.broadcast_to(array, count).astype(np.int64))
