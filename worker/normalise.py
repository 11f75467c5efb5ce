"""The uploader's normalisation, applied between an image in [0, 1] and the network."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def normaliser(
    mean: Sequence[float] | None, std: Sequence[float] | None, *, device: torch.device
) -> Callable[[Tensor], Tensor] | None:
    """
    Return ``x -> (x - mean) / std`` per channel, or ``None`` when neither is given.

    Args:
        mean: One value per channel.
        std: One value per channel, none of them 0.
    """
    if mean is None and std is None:
        return None
    shift = torch.tensor(mean or [0.0], device=device).reshape(1, -1, 1, 1)
    scale = torch.tensor(std or [1.0], device=device).reshape(1, -1, 1, 1)
    return lambda images: (images - shift.to(images)) / scale.to(images)
