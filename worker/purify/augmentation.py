"""Make a few images into more: random crops, resized to full size, or shifts, and mirrored copies."""

import math

import torch
from torch import Tensor
from torch.nn import functional

# The customary ranges of a resized crop: share of the area, and width to height.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
REACH = 1 / 8  # of the sides, that an image is shifted by at most
WINDOW = (0.25, 0.75)  # of the sides, that is pasted


def augment(
    images: Tensor,
    labels: Tensor,
    *,
    copies: int,
    flip: bool,
    generator: torch.Generator,
    area: tuple[float, float] = AREA,
) -> tuple[Tensor, Tensor]:
    """
    Return the images followed by *copies* random variants of each, and the labels likewise.

    Args:
        images: ``(N, C, H, W)`` in [0, 1]; the result is ``(N * (1 + copies), C, H, W)``.
        flip: Mirror half of the variants left to right.
        generator: A CPU generator, the only source of randomness.
        area: Least and largest share of the image that a crop holds.
    """
    height, width = images.shape[-2:]
    variants = [images]
    for _ in range(copies):
        crops = []
        for image in images.unsqueeze(1):
            top, left, rows, columns = _random_window(height, width, area, generator)
            crop = image[..., top : top + rows, left : left + columns]
            if flip and _uniform(0.0, 1.0, generator) < 0.5:
                crop = crop.flip(-1)
            crops.append(functional.interpolate(crop, size=(height, width), mode="bilinear"))
        variants.append(torch.cat(crops))
    return torch.cat(variants).clamp(0.0, 1.0), labels.repeat(1 + copies)


def shifted(
    images: Tensor, labels: Tensor, *, copies: int, flip: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """
    Return the same as ``augment``, of shifts by whole pixels; what is moved in mirrors the edge.

    Nothing is resized: to a network with a backdoor that answers to bent or shaded images, a resized
    crop looks like one of these.
    """
    height, width = images.shape[-2:]
    down, across = (min(length - 1, max(1, round(length * REACH))) for length in (height, width))
    padded = functional.pad(images, (across, across, down, down), mode="reflect")
    variants = [images]
    for _ in range(copies):
        moved = []
        for image in padded.unsqueeze(1):
            top = math.floor(_uniform(0.0, 1.0, generator) * (2 * down + 1))
            left = math.floor(_uniform(0.0, 1.0, generator) * (2 * across + 1))
            window = image[..., top : top + height, left : left + width]
            if flip and _uniform(0.0, 1.0, generator) < 0.5:
                window = window.flip(-1)
            moved.append(window)
        variants.append(torch.cat(moved))
    return torch.cat(variants), labels.repeat(1 + copies)


def mixed_in_pairs(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return every image with up to a half of another over it (Zhang et al., "mixup", ICLR 2018)."""
    order = torch.randperm(len(images), generator=generator).to(images.device)
    share = (torch.rand(len(images), 1, 1, 1, generator=generator) / 2).to(images)
    return images * (1 - share) + images[order] * share


def pasted_in_pairs(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return every image with a window of another in its place (Yun et al., "CutMix", ICCV 2019)."""
    height, width = images.shape[-2:]
    order = torch.randperm(len(images), generator=generator).tolist()
    pasted = images.clone()
    for number, other in enumerate(order):
        rows, columns = (
            math.ceil(length * _uniform(*WINDOW, generator)) for length in (height, width)
        )
        top = math.floor(_uniform(0.0, 1.0, generator) * (height - rows + 1))
        left = math.floor(_uniform(0.0, 1.0, generator) * (width - columns + 1))
        window = (..., slice(top, top + rows), slice(left, left + columns))
        pasted[number][window] = images[other][window]
    return pasted


def some(images: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Return about half of the *images*, and *others* in place of the rest."""
    kept = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(kept.to(images.device), images, others)


def _random_window(
    height: int, width: int, share: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Return top, left, rows and columns of a window, uniform in area and log-aspect."""
    area = height * width * _uniform(*share, generator)
    aspect = math.exp(_uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), generator))
    # A window too long for the image is cut to its side, not drawn again.
    rows = min(height, max(1, round(math.sqrt(area / aspect))))
    columns = min(width, max(1, round(math.sqrt(area * aspect))))
    top = math.floor(_uniform(0.0, 1.0, generator) * (height - rows + 1))
    left = math.floor(_uniform(0.0, 1.0, generator) * (width - columns + 1))
    return top, left, rows, columns


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()
