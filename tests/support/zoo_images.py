"""Files of small random images, of the names that the zoo trains and measures on."""

from pathlib import Path

import numpy as np

from benchmarks import zoo
from benchmarks.attacks import SIDE

TRAINED_ON = 150
# Images to train on are darker than the one, those that are held out brighter than the other.
DARK, BRIGHT = 100, 200


def held_out(classes: int) -> int:
    """Return how many images are held out: at least two of every class, to draw and to measure on."""
    return max(60, 2 * classes)


def write_images(folder: Path, *, seed_of_held_out: int = 0) -> None:
    """Write small files of the names that the zoo knows, with every class among the held-out images."""
    folder.mkdir(exist_ok=True)
    for name, classes in zoo.CLASSES.items():
        rest = held_out(classes)
        count = TRAINED_ON + rest
        shape = (SIDE, SIDE, 3)
        images = np.concatenate(
            [
                np.random.default_rng(9).integers(0, DARK, (TRAINED_ON, *shape), np.uint8),
                np.random.default_rng(seed_of_held_out).integers(
                    BRIGHT, 256, (rest, *shape), np.uint8
                ),
            ]
        )
        np.savez(folder / name, images=images, labels=np.arange(count) % classes)
