"""
Make many triggers of a recovered one, since what is recovered is only the part that suffices.

The smallest patch that works is a piece of the true trigger, often a few of its pixels; unlearning it
leaves the whole trigger working: of CIFAR-10 BadNets' 16 pixels 4 are found. So its support is widened
and its colours are drawn anew, then sharpened on the original model until they lead to the target again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from worker.purify.detection.trigger import ELSEWHERE, Trigger
from worker.purify.workpiece import in_parts, laid_out

Forward = Callable[[Tensor], Tensor]

CORE = 0.15  # of a mask, from which on a pixel belongs to the trigger
REDRAWN = 0.3  # of a mottled pattern's values
SHARPENING_STEPS, SHARPENING_RATE = 5, 0.1
CHUNK = 256  # images whose colours are sharpened at once


def stamp_variants(
    forward: Forward,
    images: Tensor,
    triggers: Sequence[Trigger],
    *,
    reach: int,
    generator: torch.Generator,
) -> Tensor:
    """
    Return every image under a variant of one of *triggers*, which take turns.

    Args:
        forward: Maps images to the original's logits, on which the colours are sharpened.
        images: ``(N, C, H, W)`` in [0, 1].
        reach: Pixels by which a support is widened at most.
        generator: A CPU generator, the only source of randomness.
    """
    count, device = len(images), images.device
    turns = [triggers[number % len(triggers)] for number in range(count)]
    masks = torch.stack([_support(trigger, reach, generator) for trigger in turns])
    patterns = torch.stack(
        [_colours(trigger, number, generator) for number, trigger in enumerate(turns)]
    )
    targets = torch.tensor([trigger.target for trigger in turns], device=device)
    elsewhere = targets == ELSEWHERE
    own = _answers(forward, images) if bool(elsewhere.any()) else targets
    for _ in range(SHARPENING_STEPS):
        # Other images each time, so that colours suit many and not one.
        order = torch.randperm(count, generator=generator).to(device)
        for part in torch.split(torch.arange(count, device=device), CHUNK):
            leaf, mask = patterns[part].requires_grad_(), masks[part]
            logits = forward(laid_out(images[order[part]] * (1 - mask) + leaf * mask))
            away = elsewhere[part]
            loss = functional.cross_entropy(
                logits, torch.where(away, own[order[part]], targets[part]), reduction="none"
            )
            (gradient,) = torch.autograd.grad(torch.where(away, -loss, loss).mean(), leaf)
            patterns[part] = (leaf.detach() - SHARPENING_RATE * gradient.sign()).clamp(0.0, 1.0)
    return laid_out(images * (1 - masks) + patterns * masks)


def _answers(forward: Forward, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([forward(part).argmax(1) for part in in_parts(images)])


def _support(trigger: Trigger, reach: int, generator: torch.Generator) -> Tensor:
    """Return the trigger's own mask, or its support widened by a random number of pixels."""
    by = int(torch.randint(-1, reach + 1, (), generator=generator))
    if by < 0:
        return trigger.mask
    core = (trigger.mask > CORE).to(trigger.mask.dtype)
    return functional.max_pool2d(core, 2 * by + 1, 1, by)


def _colours(trigger: Trigger, number: int, generator: torch.Generator) -> Tensor:
    """Return the recovered colours, random ones, one for all pixels, or one that is mottled."""
    recovered = trigger.pattern

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator).to(recovered.device, recovered.dtype)

    extremes = (uniform(*recovered.shape) < 0.5).to(recovered.dtype)
    channels = len(recovered)
    match number % 4:
        case 0:
            return recovered.clone()
        case 1:
            return extremes
        case 2:
            corner = (uniform(channels, 1, 1) < 0.5).to(recovered.dtype)
            return corner.expand_as(recovered).clone()
        case _:
            plain = uniform(channels, 1, 1).expand_as(recovered)
            return torch.where(uniform(*recovered.shape) < REDRAWN, extremes, plain)
