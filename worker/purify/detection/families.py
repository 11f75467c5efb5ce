"""
Name the families of triggers that are searched: patches, perturbations of every pixel, and warps.

A family holds one trigger per row, as numbers that an optimiser moves, and knows how to stamp them and
how large they are. Attacks come in more forms than these; what counts is that a model with a backdoor is
easier to fool than others in one of them.
"""

import math
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

SPREAD = 0.5  # of the random starts of masks, in logits
FAINT = 0.01  # of the random starts of perturbations
BLOCKS = 4  # along each side of an image; eight of the sixteen, drawn at random, are a half of it
CELLS = 5  # control points of a warp along each side
BENT = 0.1  # of the random starts of warps, in pixels


class Family(Protocol):
    """
    Hold one trigger per row, ``K`` in all.

    Attributes:
        rate: Of the optimiser.
        price: Weight of the norm in the loss at first.
    """

    rate: float
    price: float

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What is optimised, one row per trigger."""

    @property
    def shapes(self) -> tuple[Tensor, ...]:
        """What the triggers look like now, detached, one row each; the class says what it is."""

    def stamp(self, images: Tensor) -> Tensor:
        """Return *images* ``(K, n, C, H, W)``, each row under its trigger."""

    def norms(self) -> Tensor:
        """Return the size of each trigger ``(K,)``."""

    def narrow(self, rows: Tensor) -> Self:
        """Return a family of these rows alone."""


def _noise(generator: torch.Generator, like: Tensor, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator).to(like)


class Patches:
    """
    Replace pixels; the norm is the mask's L1 norm, in pixels.

    Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE
    S&P 2019. Shapes are masks ``(K, 1, H, W)`` and patterns ``(K, C, H, W)`` in [0, 1].
    """

    rate, price = 0.1, 1e-3  # the reference's

    def __init__(self, mask_logits: Tensor, pattern_logits: Tensor) -> None:
        self.leaves = mask_logits.requires_grad_(), pattern_logits.requires_grad_()

    @classmethod
    def start(
        cls, images: Tensor, openness: Sequence[float], generator: torch.Generator
    ) -> "Patches":
        """
        Return random patches for *images*.

        Args:
            openness: For each row the logit around which its mask starts: 0 covers half of every pixel.
        """
        rows, (channels, height, width) = len(openness), images.shape[1:]
        level = torch.tensor(openness).to(images).view(-1, 1, 1, 1)
        mask = level + SPREAD * _noise(generator, images, rows, 1, height, width)
        return cls(mask, _noise(generator, images, rows, channels, height, width))

    @property
    def shapes(self) -> tuple[Tensor, ...]:
        """Masks and patterns."""
        return tuple(leaf.detach().sigmoid() for leaf in self.leaves)

    def stamp(self, images: Tensor) -> Tensor:
        """Replace what the mask covers by the pattern."""
        mask, pattern = (leaf.sigmoid() for leaf in self.leaves)
        return images * (1 - mask[:, None]) + (pattern * mask)[:, None]

    def norms(self) -> Tensor:
        """Return how many pixels are replaced."""
        return self.leaves[0].sigmoid().sum((1, 2, 3))

    def narrow(self, rows: Tensor) -> "Patches":
        """Return the patches of these rows."""
        mask, pattern = (leaf.detach()[rows] for leaf in self.leaves)
        return Patches(mask, pattern)


class Perturbations:
    """
    Add to every pixel; the norm is L2.

    Moosavi-Dezfooli et al., "Universal Adversarial Perturbations", CVPR 2017; here each leads to a class,
    and is as small as can be. Shapes are what is added ``(K, C, H, W)``.
    """

    rate, price = 0.01, 0.05

    def __init__(self, delta: Tensor) -> None:
        self.leaves = (delta.requires_grad_(),)

    @classmethod
    def start(cls, images: Tensor, rows: int, generator: torch.Generator) -> "Perturbations":
        """Return faint random perturbations for *images*."""
        return cls(FAINT * _noise(generator, images, rows, *images.shape[1:]))

    @property
    def shapes(self) -> tuple[Tensor, ...]:
        """What is added."""
        return (self._added().detach().clone(),)

    def stamp(self, images: Tensor) -> Tensor:
        """Add, and clip to [0, 1]."""
        return (images + self._added()[:, None]).clamp(0.0, 1.0)

    def norms(self) -> Tensor:
        """Return the root of the sum of squares."""
        return _root(self.leaves[0].square().sum((1, 2, 3)))

    def narrow(self, rows: Tensor) -> "Perturbations":
        """Return the perturbations of these rows."""
        return Perturbations(self.leaves[0].detach()[rows])

    def _added(self) -> Tensor:
        return self.leaves[0]


class Halves(Perturbations):
    """
    Add to every pixel of one half of the image, in blocks, a random half for each; the norm is L2.

    Of a trigger that reaches across the image a part suffices, and the smallest perturbation holds little
    else. Who may not use the same half finds other parts.
    """

    def __init__(self, delta: Tensor, half: Tensor) -> None:
        super().__init__(delta)
        self._half = half

    @classmethod
    def start(cls, images: Tensor, rows: int, generator: torch.Generator) -> "Halves":
        """Return faint random perturbations for halves of *images*."""
        delta = FAINT * _noise(generator, images, rows, *images.shape[1:])
        order = torch.rand(rows, BLOCKS**2, generator=generator).argsort(1)
        blocks = torch.zeros(rows, BLOCKS**2).scatter(1, order[:, : BLOCKS**2 // 2], 1.0)
        half = functional.interpolate(
            blocks.view(rows, 1, BLOCKS, BLOCKS), size=images.shape[2:], mode="nearest"
        )
        return cls(delta, half.to(images))

    def norms(self) -> Tensor:
        """Return the root of the sum of squares."""
        return _root(self._added().square().sum((1, 2, 3)))

    def narrow(self, rows: Tensor) -> "Halves":
        """Return the perturbations of these rows."""
        return Halves(self.leaves[0].detach()[rows], self._half[rows])

    def _added(self) -> Tensor:
        return self.leaves[0] * self._half


class Waves(Perturbations):
    """
    Add few waves, whatever their frequencies; the norm is the L1 norm of the coefficients.

    The smallest perturbation that leads to a class is mostly noise, and a trigger that covers the image
    often is not: the coefficients of the orthonormal discrete cosine transform, which are what is
    optimised, are few where they are small in L1 (Tibshirani, "Regression Shrinkage and Selection via the
    Lasso", J. R. Stat. Soc. B 1996).
    """

    price = 0.005

    @classmethod
    def start(cls, images: Tensor, rows: int, generator: torch.Generator) -> "Waves":
        """Return faint random waves for *images*."""
        return cls(FAINT * _noise(generator, images, rows, *images.shape[1:]))

    def norms(self) -> Tensor:
        """Return the sum of the coefficients, without their signs."""
        return self.leaves[0].abs().sum((1, 2, 3))

    def narrow(self, rows: Tensor) -> "Waves":
        """Return the waves of these rows."""
        return Waves(self.leaves[0].detach()[rows])

    def _added(self) -> Tensor:
        (coefficients,) = self.leaves
        down, across = (_cosines(size).to(coefficients) for size in coefficients.shape[2:])
        return down.T @ coefficients @ across


def _cosines(size: int) -> Tensor:
    """Return the cosine waves of *size* pixels, orthonormal, the slowest first ``(size, size)``."""
    pixels, half_turns = torch.arange(size) + 0.5, torch.arange(size)[:, None]
    cosines = (math.pi / size * half_turns * pixels).cos() * math.sqrt(2 / size)
    cosines[0] /= math.sqrt(2)
    return cosines


class Warps:
    """
    Bend the image smoothly; the norm is the root of the mean squared shift, in pixels.

    After the attack (Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021).
    Shapes are shifts ``(K, 2, H, W)`` in pixels, along the width and along the height.
    """

    rate, price = 0.05, 0.05

    def __init__(self, control: Tensor, size: tuple[int, int]) -> None:
        self.leaves = (control.requires_grad_(),)
        self._size = size

    @classmethod
    def start(cls, images: Tensor, rows: int, generator: torch.Generator) -> "Warps":
        """Return random warps that hardly bend."""
        height, width = images.shape[2:]
        return cls(BENT * _noise(generator, images, rows, 2, CELLS, CELLS), (height, width))

    @property
    def shapes(self) -> tuple[Tensor, ...]:
        """The shift of every pixel."""
        return (self._shifts().detach(),)

    def stamp(self, images: Tensor) -> Tensor:
        """Take every pixel from where the shift points; beyond the edge is the edge."""
        rows, count, channels, height, width = images.shape
        # All images of a row are bent alike, so they pass for channels of one.
        together = images.reshape(rows, count * channels, height, width)
        return bend(together, self._shifts()).view_as(images)

    def norms(self) -> Tensor:
        """Return how far pixels move, on the whole."""
        return _root(self._shifts().square().sum((1, 2, 3)) / math.prod(self._size))

    def narrow(self, rows: Tensor) -> "Warps":
        """Return the warps of these rows."""
        return Warps(self.leaves[0].detach()[rows], self._size)

    def _shifts(self) -> Tensor:
        (control,) = self.leaves
        down, across = (_cubic(size).to(control) for size in self._size)
        return down.T @ control @ across


def _cubic(size: int) -> Tensor:
    """Return what each control point contributes to each of *size* pixels ``(CELLS, size)``."""
    apart = torch.eye(CELLS).view(1, CELLS, CELLS, 1)
    # As a matrix, since the gradient of an interpolation is not deterministic on a GPU.
    return functional.interpolate(apart, size=(size, 1), mode="bicubic", align_corners=True)[
        0, :, :, 0
    ]


def bend(images: Tensor, shifts: Tensor) -> Tensor:
    """
    Return *images* ``(N, C, H, W)`` with each pixel taken from where ``(N, 2, H, W)`` points.

    Between four pixels it is a mixture of these. Only *shifts* has a gradient: that by the images is
    not deterministic on a GPU.
    """
    height, width = images.shape[2:]
    across = torch.arange(width).to(shifts) + shifts[:, 0]
    down = torch.arange(height).to(shifts)[:, None] + shifts[:, 1]
    across, down = across.clamp(0, width - 1), down.clamp(0, height - 1)
    left = across.detach().floor().clamp(max=max(0, width - 2))
    top = down.detach().floor().clamp(max=max(0, height - 2))
    to_right, to_bottom = across - left, down - top
    flat, bent = images.detach().flatten(2), torch.zeros_like(images)
    for row, vertical in ((top, 1 - to_bottom), ((top + 1).clamp(max=height - 1), to_bottom)):
        for column, horizontal in (
            (left, 1 - to_right),
            ((left + 1).clamp(max=width - 1), to_right),
        ):
            place = (
                (row * width + column).long().flatten(1)[:, None].expand(-1, images.shape[1], -1)
            )
            taken = flat.gather(2, place).view_as(images)
            bent = bent + taken * (vertical * horizontal)[:, None]
    return bent


def _root(squares: Tensor) -> Tensor:
    """Return the square root, with a gradient at zero."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
