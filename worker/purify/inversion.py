"""
Recover triggers: for each class, the smallest patch that sends clean images there.

Wang et al., "Neural Cleanse: Identifying and Mitigating Backdoor Attacks in Neural Networks", IEEE S&P
2019, https://ieeexplore.ieee.org/document/8835365: a mask and a pattern per class, by Adam on the
cross-entropy and the mask's L1 norm, whose weight goes up while the patch succeeds and down while not.

What differs, and why:

- All classes share a batch, so that a handful of images is a matter of seconds.
- What counts is the smallest mask seen that succeeded, not the last.
- An image of the class itself has no part in that class's search.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from worker.purify.errors import NotFinite
from worker.purify.trigger import SUCCESS, Trigger
from worker.purify.workpiece import laid_out

Forward = Callable[[Tensor], Tensor]

LEARNING_RATE, BETAS = 0.1, (0.5, 0.9)  # the reference's
FIRST_PRICE = 1e-3  # weight of the mask's norm at first
DEARER, CHEAPER = 1.05, 1 / 1.1
PRICES = (1e-5, 10.0)
SPREAD = 0.5  # of the random starts, in logits
CHUNK = 256  # images that go through the network at once


def invert(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[int],
    *,
    steps: int,
    per_class: int,
    openness: float,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> list[Trigger]:
    """
    Return the smallest trigger found for each of *targets*; a class may be named more than once.

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        per_class: Images of every step; another random choice each time if there are more.
        openness: Logit around which the masks start: 0 covers half of every pixel.
        generator: A CPU generator, the only source of randomness.
        tick: Called after each step.

    Raises:
        NotFinite: The logits are not.
    """
    count, device, dtype = len(targets), images.device, images.dtype
    channels, height, width = images.shape[1:]

    def start(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator).to(device, dtype)

    mask_logits = (openness + SPREAD * start(1, height, width)).requires_grad_()
    pattern_logits = start(channels, height, width).requires_grad_()
    optimiser = torch.optim.Adam([mask_logits, pattern_logits], lr=LEARNING_RATE, betas=BETAS)
    target = torch.tensor(targets, device=device)
    price = torch.full((count,), FIRST_PRICE, device=device, dtype=dtype)
    best = _Best(mask_logits, pattern_logits)
    size = min(per_class, len(images))
    for _ in range(steps):
        rows = [torch.randperm(len(images), generator=generator)[:size] for _ in targets]
        chosen = torch.stack(rows).to(device)  # (K, n)
        mask, pattern = mask_logits.sigmoid(), pattern_logits.sigmoid()
        stamped = images[chosen] * (1 - mask[:, None]) + (pattern * mask)[:, None]
        foreign = (labels[chosen] != target[:, None]).to(dtype)  # (K, n)
        weights = foreign / foreign.sum(1, keepdim=True).clamp_min(1)
        gradient, hits = _gradient(forward, stamped, target, weights)
        success, norm = (hits * weights).sum(1), mask.sum((1, 2, 3))
        best.keep(mask.detach(), pattern.detach(), success, norm.detach())
        optimiser.zero_grad()
        torch.autograd.backward([stamped, (price * norm).sum()], [gradient, None])
        optimiser.step()
        price = torch.where(success >= SUCCESS, price * DEARER, price * CHEAPER).clamp(*PRICES)
        tick()
    if not bool(mask_logits.isfinite().all()):
        raise NotFinite
    return best.triggers(targets)


def _gradient(
    forward: Forward, stamped: Tensor, target: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss's gradient by the images ``(K, n, C, H, W)``, and which were sent ``(K, n)``."""
    flat = laid_out(stamped.detach().flatten(0, 1))
    wanted = target.repeat_interleave(stamped.shape[1])
    gradients, hits = [], []
    for x, y, w in zip(
        torch.split(flat, CHUNK),
        torch.split(wanted, CHUNK),
        torch.split(weights.flatten(), CHUNK),
        strict=True,
    ):
        leaf = x.detach().requires_grad_()
        logits = forward(leaf)
        loss = (functional.cross_entropy(logits, y, reduction="none") * w).sum()
        gradients.append(torch.autograd.grad(loss, leaf)[0])
        hits.append(logits.argmax(1) == y)
    return (
        torch.cat(gradients).view_as(stamped),
        torch.cat(hits).view_as(weights).to(weights.dtype),
    )


class _Best:
    """Keep the smallest successful patch of each search, or the most successful of none."""

    def __init__(self, mask: Tensor, pattern: Tensor) -> None:
        self._mask, self._pattern = mask.detach().sigmoid(), pattern.detach().sigmoid()
        self._success = mask.new_full((len(mask),), -1.0)
        self._norm = mask.new_full((len(mask),), float("inf"))

    def keep(self, mask: Tensor, pattern: Tensor, success: Tensor, norm: Tensor) -> None:
        both = (success >= SUCCESS) & (self._success >= SUCCESS)
        better = torch.where(both, norm < self._norm, success > self._success)
        where = better.view(-1, 1, 1, 1)
        self._mask = torch.where(where, mask, self._mask)
        self._pattern = torch.where(where, pattern, self._pattern)
        self._success = torch.where(better, success, self._success)
        self._norm = torch.where(better, norm, self._norm)

    def triggers(self, targets: Sequence[int]) -> list[Trigger]:
        return [
            Trigger(target=target, mask=mask, pattern=pattern, success=max(0.0, success))
            for target, mask, pattern, success in zip(
                targets, self._mask, self._pattern, self._success.tolist(), strict=True
            )
        ]
