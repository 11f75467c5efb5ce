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


class Inversion:
    """
    One search per row, each for a class of its own; a class may have several.

    Args:
        forward: Maps images to logits.
        images: ``(N, C, H, W)`` in [0, 1].
        labels: ``(N,)`` int64.
        targets: The class of each row.
        openness: For each row the logit around which its mask starts: 0 covers half of every pixel.
        generator: A CPU generator, the only source of randomness.
    """

    def __init__(
        self,
        forward: Forward,
        images: Tensor,
        labels: Tensor,
        targets: Sequence[int],
        *,
        openness: Sequence[float],
        generator: torch.Generator,
    ) -> None:
        self._forward, self._images, self._labels = forward, images, labels
        self._generator = generator
        self.targets = list(targets)
        device, dtype = images.device, images.dtype
        channels, height, width = images.shape[1:]

        def start(*shape: int) -> Tensor:
            noise = torch.randn(len(self.targets), *shape, generator=generator)
            return noise.to(device, dtype)

        level = torch.tensor(openness, device=device, dtype=dtype).view(-1, 1, 1, 1)
        self._mask_logits = (level + SPREAD * start(1, height, width)).requires_grad_()
        self._pattern_logits = start(channels, height, width).requires_grad_()
        self._adam = self._optimiser()
        self._price = torch.full((len(self.targets),), FIRST_PRICE, device=device, dtype=dtype)
        self._best = _Best(self._mask_logits, self._pattern_logits)

    def run(self, steps: int, *, per_row: int, tick: Callable[[], None]) -> None:
        """
        Go on for *steps*.

        Args:
            per_row: Images of every step; another random choice each time if there are more.
            tick: Called after each step.

        Raises:
            NotFinite: The logits are not.
        """
        images, labels, dtype = self._images, self._labels, self._images.dtype
        target = torch.tensor(self.targets, device=images.device)
        size = min(per_row, len(images))
        for _ in range(steps):
            rows = [
                torch.randperm(len(images), generator=self._generator)[:size] for _ in self.targets
            ]
            chosen = torch.stack(rows).to(images.device)  # (K, n)
            mask, pattern = self._mask_logits.sigmoid(), self._pattern_logits.sigmoid()
            stamped = images[chosen] * (1 - mask[:, None]) + (pattern * mask)[:, None]
            foreign = (labels[chosen] != target[:, None]).to(dtype)  # (K, n)
            weights = foreign / foreign.sum(1, keepdim=True).clamp_min(1)
            gradient, hits = _gradient(self._forward, stamped, target, weights)
            success, norm = (hits * weights).sum(1), mask.sum((1, 2, 3))
            self._best.keep(mask.detach(), pattern.detach(), success, norm.detach())
            self._adam.zero_grad()
            torch.autograd.backward([stamped, (self._price * norm).sum()], [gradient, None])
            self._adam.step()
            dearer = success >= SUCCESS
            self._price = torch.where(dearer, self._price * DEARER, self._price * CHEAPER)
            self._price = self._price.clamp(*PRICES)
            tick()
        if not bool(self._mask_logits.isfinite().all()):
            raise NotFinite

    def narrow(self, rows: Sequence[int]) -> None:
        """Go on with *rows* only, as if the others had never been there."""
        at = torch.tensor(list(rows), device=self._images.device)
        moments = [self._adam.state.get(leaf, {}) for leaf in self._leaves]
        self.targets = [self.targets[row] for row in rows]
        self._mask_logits, self._pattern_logits = (
            leaf.detach()[at].requires_grad_() for leaf in self._leaves
        )
        self._adam = self._optimiser()
        for leaf, state in zip(self._leaves, moments, strict=True):
            # Adam counts its steps in a tensor without rows.
            self._adam.state[leaf] = {
                name: value[at] if value.dim() else value for name, value in state.items()
            }
        self._price = self._price[at]
        self._best.narrow(at)

    def triggers(self) -> list[Trigger]:
        """Return the smallest trigger that each row has found."""
        return self._best.triggers(self.targets)

    @property
    def _leaves(self) -> tuple[Tensor, Tensor]:
        return self._mask_logits, self._pattern_logits

    def _optimiser(self) -> torch.optim.Adam:
        return torch.optim.Adam(self._leaves, lr=LEARNING_RATE, betas=BETAS)


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

    def narrow(self, at: Tensor) -> None:
        self._mask, self._pattern = self._mask[at], self._pattern[at]
        self._success, self._norm = self._success[at], self._norm[at]

    def triggers(self, targets: Sequence[int]) -> list[Trigger]:
        return [
            Trigger(target=target, mask=mask, pattern=pattern, success=max(0.0, success))
            for target, mask, pattern, success in zip(
                targets, self._mask, self._pattern, self._success.tolist(), strict=True
            )
        ]
