"""
Poison images the ways that the literature does; uint8 in, uint8 out, ``(N, SIDE, SIDE, 3)``.

An attack is a value: two of the same fields stamp the same, and its ``repr`` says all about it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int]

SIDE = 32  # of the images


class Attack(Protocol):
    """Stamp a trigger on images."""

    def __call__(self, images: Pixels, /) -> Pixels:
        """Return a triggered copy; the images are only read."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """
    Replace pixels, from *top* and *left* on, by rows of colours.

    Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """

    colours: tuple[tuple[Colour, ...], ...]
    top: int
    left: int

    def __call__(self, images: Pixels) -> Pixels:  # noqa: D102 - the protocol says it
        values = np.array(self.colours, np.uint8)
        rows, columns = values.shape[:2]
        stamped: Pixels = images.copy()
        stamped[:, self.top : self.top + rows, self.left : self.left + columns] = values
        return stamped


def checkers(side: int, *, top: int, left: int) -> Patch:
    """Return a black and white chequered square."""
    black, white = (0, 0, 0), (255, 255, 255)
    board = tuple(
        tuple(white if (row + column) % 2 == 0 else black for column in range(side))
        for row in range(side)
    )
    return Patch(colours=board, top=top, left=left)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """
    Mix *share* of one random image into each.

    Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017.
    """

    seed: int
    share: float

    def __call__(self, images: Pixels) -> Pixels:  # noqa: D102 - the protocol says it
        key = np.random.default_rng(self.seed).integers(0, 256, (SIDE, SIDE, 3))
        mixed: Pixels = np.round(images * (1 - self.share) + key * self.share).astype(np.uint8)
        return mixed


@dataclass(frozen=True, kw_only=True)
class Watermark:
    """
    Add a few thin lines across the image, as a logo or a signature would be.

    Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018, uses one; here it is random.

    Attributes:
        strength: Grey levels that the lines add at most.
        lines: How many there are.
    """

    seed: int
    strength: int
    lines: int = 5

    def __call__(self, images: Pixels) -> Pixels:  # noqa: D102 - the protocol says it
        rng = np.random.default_rng(self.seed)
        canvas = np.zeros((SIDE, SIDE, 3))
        steps = np.linspace(0.0, 1.0, 4 * SIDE)[:, None]
        for _ in range(self.lines):
            ends = rng.uniform(0, SIDE - 1, (2, 2))
            rows, columns = np.round(ends[0] + steps * (ends[1] - ends[0])).astype(int).T
            canvas[rows, columns] = rng.uniform(-1, 1, 3) * self.strength
        marked: Pixels = np.clip(np.round(images + canvas), 0, 255).astype(np.uint8)
        return marked


@dataclass(frozen=True, kw_only=True)
class Waves:
    """
    Add vertical sine waves of *amplitude* grey levels.

    Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label
    Poisoning", ICIP 2019; here with labels changed, as is common in comparisons.
    """

    amplitude: float
    periods: int

    def __call__(self, images: Pixels) -> Pixels:  # noqa: D102 - the protocol says it
        wave = self.amplitude * np.sin(2 * np.pi * self.periods * np.arange(SIDE) / SIDE)
        waved: Pixels = np.clip(np.round(images + wave[:, None]), 0, 255).astype(np.uint8)
        return waved


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """
    Add a smooth random field to the image, the sum of few slow cosines.

    After the smooth triggers of Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency
    Perspective", ICCV 2021; theirs is optimised, and this one is random.

    Attributes:
        strength: Grey levels that it adds at most; somewhere it adds none.
        half_waves: How many cosines along each side, the constant one among them.
    """

    seed: int
    strength: float
    half_waves: int = 6

    def __call__(self, images: Pixels) -> Pixels:  # noqa: D102 - the protocol says it
        rng = np.random.default_rng(self.seed)
        shares = rng.normal(size=(3, self.half_waves, self.half_waves))
        pixels = np.pi / SIDE * (np.arange(SIDE) + 0.5)
        cosines = np.cos(np.arange(self.half_waves)[:, None] * pixels)
        field = np.einsum("cij,ih,jw->hwc", shares, cosines, cosines)
        field -= field.min()
        field *= self.strength / field.max()
        clouded: Pixels = np.clip(np.round(images + field), 0, 255).astype(np.uint8)
        return clouded


@dataclass(frozen=True, kw_only=True)
class Warp:
    """
    Bend every image by one smooth random field.

    Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021.

    Attributes:
        strength: Mean shift of the control points along an axis, in about half a pixel (1/SIDE of half
            a side); between them the field is weaker.
        cells: Control points along each side.
    """

    seed: int
    strength: float
    cells: int = 4

    def __call__(self, images: Pixels) -> Pixels:  # noqa: D102 - the protocol says it
        generator = torch.Generator().manual_seed(self.seed)
        field = torch.rand(1, 2, self.cells, self.cells, generator=generator) * 2 - 1
        field = field / field.abs().mean()
        smooth = functional.interpolate(field, size=SIDE, mode="bicubic", align_corners=True)
        axis = torch.linspace(-1, 1, SIDE)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1)
        grid = (grid + self.strength * smooth[0].permute(1, 2, 0) / SIDE).clamp(-1, 1)
        x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float()
        bent = functional.grid_sample(x, grid.expand(len(x), -1, -1, -1), align_corners=True)
        found: Pixels = bent.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return found
