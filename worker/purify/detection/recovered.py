"""Recovered triggers of every kind in one form, for whoever wants to see them and to try them."""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from worker.purify.detection.families import bend
from worker.purify.detection.trigger import Found, Trigger


class Kind(StrEnum):
    """What a trigger does to an image."""

    PATCH = "patch"  # replaces pixels
    PERTURBATION = "perturbation"  # adds to every pixel
    WARP = "warp"  # bends it


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """
    Hold what is done to an image: ``bend(image, shift) * (1 - mask) + pattern * mask + added``, clipped.

    All tensors are float32, on the CPU.

    Attributes:
        target: The class it leads to; ``ELSEWHERE`` where it sends each class to another one.
        success: The fraction of the images it was searched on that it leads there.
        norm: Its size: of a patch the L1 norm of the mask, in pixels; of a perturbation the L2 norm; of a
            warp the root of the mean squared shift, in pixels.
        mask: ``(1, H, W)`` in [0, 1], how much of each pixel is replaced.
        pattern: ``(C, H, W)`` in [0, 1], by what.
        added: ``(C, H, W)`` in [-1, 1].
        shift: ``(2, H, W)`` in pixels, along the width and along the height, at most as many as the
            longer side has: from where each pixel is taken; beyond the edge is the edge.
    """

    kind: Kind
    target: int
    success: float
    norm: float
    mask: Tensor
    pattern: Tensor
    added: Tensor
    shift: Tensor

    @classmethod
    def patch(cls, trigger: Trigger) -> "Recovered":
        """Return a patch in this form."""
        mask, pattern = _plain(trigger.mask).clamp(0, 1), _plain(trigger.pattern).clamp(0, 1)
        return cls(
            kind=Kind.PATCH,
            target=trigger.target,
            success=trigger.success,
            norm=trigger.norm,
            mask=mask,
            pattern=pattern,
            added=torch.zeros_like(pattern),
            shift=torch.zeros(2, *mask.shape[1:]),
        )

    @classmethod
    def perturbation(cls, found: Found) -> "Recovered":
        """Return in this form what adds to every pixel, as it is or as waves."""
        (added,) = map(_plain, found.shapes)
        return cls(
            kind=Kind.PERTURBATION,
            target=found.target,
            success=found.success,
            norm=float(added.norm()),
            mask=torch.zeros(1, *added.shape[1:]),
            pattern=torch.zeros_like(added),
            added=added.clamp(-1, 1),
            shift=torch.zeros(2, *added.shape[1:]),
        )

    @classmethod
    def warp(cls, found: Found, channels: int) -> "Recovered":
        """Return a warp of images of so many channels in this form."""
        (shift,) = map(_plain, found.shapes)
        size = shift.shape[1:]
        return cls(
            kind=Kind.WARP,
            target=found.target,
            success=found.success,
            norm=found.norm,
            mask=torch.zeros(1, *size),
            pattern=torch.zeros(channels, *size),
            added=torch.zeros(channels, *size),
            shift=shift.clamp(-max(size), max(size)),
        )

    def stamp(self, images: Tensor) -> Tensor:
        """Return *images* ``(N, C, H, W)`` in [0, 1], on the CPU, under the trigger."""
        if self.kind is Kind.WARP:
            images = bend(images, self.shift.expand(len(images), -1, -1, -1))
        stamped = images * (1 - self.mask) + self.pattern * self.mask + self.added
        return stamped.clamp(0, 1)


def _plain(values: Tensor) -> Tensor:
    return values.detach().to("cpu", torch.float32)
