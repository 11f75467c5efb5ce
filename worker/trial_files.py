"""
The trial of a job's triggers as arrays: bare numbers across the process, an ``.npz`` to the client.

The child writes each array's bytes, one behind the other, and nothing else: how long each is follows from
a handful of counts that the supervisor bounds. So nothing of the child's is parsed, and what a client
downloads is written by the supervisor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

TRIAL = "trial"
"""The file in the job's folder."""

MAX_SAMPLES = 64
"""Samples that triggers are tried on: a share is then known to 1.6 points."""

MAX_VALUES = 1 << 24
"""Values of each kind of picture (triggers, samples, stamped samples), 64 MiB as float32."""

MAX_TRIAL_BYTES = 4 * 4 * MAX_VALUES
"""More than the file's arrays take: three kinds of picture, and answers."""

NO_TARGET = -1
"""Stands for the target of a trigger that sends each class to another one."""

_FLOAT, _WHOLE = np.dtype("<f4"), np.dtype("<i8")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many triggers were tried, on how many samples, and how many of these are shown."""

    triggers: int
    samples: int
    shown: int


def layout(
    counts: Counts, image_shape: tuple[int, int, int]
) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return type and shape of each array, in their order."""
    channels, height, width = image_shape
    triggers, samples, shown = counts.triggers, counts.samples, counts.shown
    return {
        "target": (_WHOLE, (triggers,)),
        "mask": (_FLOAT, (triggers, 1, height, width)),
        "pattern": (_FLOAT, (triggers, channels, height, width)),
        "added": (_FLOAT, (triggers, channels, height, width)),
        "shift": (_FLOAT, (triggers, 2, height, width)),
        "sample": (_WHOLE, (samples,)),
        "label": (_WHOLE, (samples,)),
        "clean_before": (_WHOLE, (samples,)),
        "clean_after": (_WHOLE, (samples,)),
        "stamped_before": (_WHOLE, (triggers, samples)),
        "stamped_after": (_WHOLE, (triggers, samples)),
        "clean": (_FLOAT, (shown, channels, height, width)),
        "stamped": (_FLOAT, (triggers, shown, channels, height, width)),
    }


def write(arrays: Arrays, path: Path) -> None:
    """Write the bytes of *arrays*, which are laid out as ``layout`` says, to the new file *path*."""
    with path.open("xb") as file:
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())


def read(
    file: BinaryIO,
    counts: Counts,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    samples: int,
) -> dict[str, Array]:
    """
    Read what ``write`` wrote, and look at every value.

    Args:
        classes: Of the model.
        samples: In the uploader's file.

    Raises:
        ValueError: It is not what an honest child writes.
    """
    expected = layout(counts, image_shape)
    if max(prod(shape) for _, shape in expected.values()) > MAX_VALUES:
        raise ValueError("more values than are kept")
    arrays = {}
    for name, (dtype, shape) in expected.items():
        length = prod(shape) * dtype.itemsize
        content = file.read(length)
        if len(content) != length:
            raise ValueError(f"{name} is shorter than its shape")
        arrays[name] = np.frombuffer(content, dtype).reshape(shape)
        _check(name, arrays[name], _most(name, image_shape, classes=classes, samples=samples))
    if file.read(1):
        raise ValueError("something behind the last array")
    return arrays


def write_npz(arrays: Arrays, path: Path) -> None:
    """Write *arrays* to the new file *path*; the same arrays give the same bytes."""
    with path.open("xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # no array is named like an option


def _most(name: str, image_shape: tuple[int, int, int], *, classes: int, samples: int) -> int:
    """Return the highest value that *name* may hold."""
    numbers = {"sample": samples - 1, "shift": max(image_shape[1:])}
    pictures = ("mask", "pattern", "added", "clean", "stamped")
    return numbers.get(name, 1 if name in pictures else classes - 1)


def _check(name: str, array: Array, most: int) -> None:
    least = {"target": NO_TARGET, "added": -most, "shift": -most}.get(name, 0)
    # A NaN fails both comparisons, which is why they are not turned around.
    within = (array >= least) & (array <= most)
    if not within.all():
        raise ValueError(f"{name} holds a value that is out of its range")
