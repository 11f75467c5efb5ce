"""A recovered trigger: a patch that sends images to one class."""

from dataclasses import dataclass

from torch import Tensor

SUCCESS = 0.9  # of the images, from which on a patch counts as a trigger


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """
    Hold a patch and what it does.

    Attributes:
        target: The class it leads to.
        mask: ``(1, H, W)`` in [0, 1], how much of each pixel is replaced.
        pattern: ``(C, H, W)`` in [0, 1], by what.
        success: The fraction of the images of other classes that it sends to the target.
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
