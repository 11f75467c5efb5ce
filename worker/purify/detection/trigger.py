"""Recovered triggers: patches and others that send images to one class, or each class to another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

ELSEWHERE = -1  # in place of a class: to another one, whichever that is

SUCCESS = 0.9  # of the images, from which on a patch counts as a trigger


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """
    Hold a patch and what it does.

    Attributes:
        target: The class it leads to; ``ELSEWHERE`` where it sends each class to another one.
        mask: ``(1, H, W)`` in [0, 1], how much of each pixel is replaced.
        pattern: ``(C, H, W)`` in [0, 1], by what.
        success: The fraction of the images of other classes that it sends to the target; elsewhere,
            that of all images that it sends to a class that is not theirs.
    """

    target: int
    mask: Tensor
    pattern: Tensor
    success: float

    @property
    def norm(self) -> float:
        """The L1 norm of the mask, in pixels; all of them where the patch did not succeed."""
        return float(self.mask.sum()) if self.success >= SUCCESS else float(self.mask.numel())

    def stamp(self, images: Tensor) -> Tensor:
        """Return *images* ``(N, C, H, W)`` under the patch."""
        return images * (1 - self.mask) + self.pattern * self.mask


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    Hold the smallest trigger that one row has found.

    Attributes:
        target: The class it leads to.
        success: The fraction of the images of other classes that it sends there.
        norm: Its size, as its family measures it; infinite where it did not succeed.
        shapes: What it looks like, as its family has it.
    """

    target: int
    success: float
    norm: float
    shapes: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Field:
    """
    Hold the smallest trigger of every class, by class.

    Attributes:
        middle: Classes in the middle of the field.
    """

    triggers: Sequence[Trigger]
    middle: Sequence[int]

    @property
    def ordinary(self) -> float:
        """What an ordinary class needs, as the norm of a mask."""
        return median(self.triggers[cls].norm for cls in self.middle)


@dataclass(frozen=True, kw_only=True)
class Warped:
    """
    Hold the norm of the smallest warp that leads to each class, in pixels, by class.

    Attributes:
        norms: What is searched at most where none was found, or none was searched.
        searched: Classes whose median is that of an ordinary class.
    """

    norms: Sequence[float]
    searched: Sequence[int]

    @property
    def ordinary(self) -> float:
        """The norm of an ordinary class."""
        return median(self.norms[cls] for cls in self.searched)
