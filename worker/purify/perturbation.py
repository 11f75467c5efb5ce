"""
Search the universal perturbation: one addend for all images that changes the most answers.

It stands in for the trigger, which is unknown: whatever moves many images at once is suspect.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional

Forward = Callable[[Tensor], Tensor]


def universal_perturbation(
    forward: Forward, batches: Iterable[Tensor], *, lr: float, tau: float
) -> Tensor:
    """
    Return one perturbation ``(1, C, H, W)`` with an L1 norm of at most *tau*.

    It starts from zero and takes one step of gradient ascent per batch on the cross-entropy
    between the answers with and without it. The search itself is free: the norm is cut back once,
    at the end, and pixels may leave [0, 1].

    Where the model is all but certain of every image the gradient vanishes, and the result stays
    close to zero: it then says nothing about a backdoor, and masks trained on it erase none.

    Args:
        forward: Maps images to logits; its weights need no gradient and receive none.
        batches: Images ``(B, C, H, W)``, at least one batch.
        lr: Step size of the ascent.
    """
    delta: Tensor | None = None
    for images in batches:
        if delta is None:
            delta = torch.zeros_like(images[:1]).requires_grad_()
        with torch.no_grad():
            answers = forward(images).argmax(dim=1)  # (B,)
        loss = functional.cross_entropy(forward(images + delta), answers)
        (gradient,) = torch.autograd.grad(loss, delta)
        with torch.no_grad():
            delta += lr * gradient
    assert delta is not None, "the caller gives at least one batch"
    return scale_to_norm(delta.detach(), tau)


def scale_to_norm(delta: Tensor, tau: float) -> Tensor:
    """Return *delta*, scaled down where its L1 norm exceeds *tau*."""
    norm = delta.abs().sum()
    return delta * torch.clamp(tau / norm.clamp_min(torch.finfo(delta.dtype).tiny), max=1.0)


def apply_perturbation(images: Tensor, delta: Tensor) -> Tensor:
    """Return ``clip(images + delta, 0, 1)``: perturbed images that could be photographs."""
    return (images + delta).clamp(0.0, 1.0)
