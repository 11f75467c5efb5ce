"""
Purify a model by Adversarial Weight Masking, step for step as published.

Chai and Chen, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022,
https://arxiv.org/abs/2207.04497; reference code https://github.com/jinghuichen/AWM.

What differs from the reference code, and why:

- A pass goes through the images in a fresh random order and drops what does not fill a batch; the
  reference draws with replacement, so a one-shot run may never see a class in an epoch.
- With fewer images than a batch there is one step per pass; the reference takes none.
- The learning rate of the masks stays constant unless ``mask_lr_decay`` says otherwise; the
  reference multiplies it by 0.9 after every epoch, which the paper does not mention.
- Only the masks of plain convolution weights are learnt and the model itself is never touched.
- A layer that the network does not use in eval mode keeps its weights; the norm alone would halve
  them in a hundred steps. Where the norm alone moves all masks to 0, there is no result.
- What is fast, and gives the same: the perturbation's labels are asked for once per epoch, since
  the weights stand still meanwhile; clean and perturbed images share a batch; batch norms go into
  the convolutions before them. ``tests/worker/purify`` holds a naive loop against it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.purify.augmentation import augment
from worker.purify.batch_norm import absorb_batch_norms
from worker.purify.errors import NotEnoughData, NotFinite, NothingLearned, NothingToMask
from worker.purify.mask_training import MaskTraining
from worker.purify.masking import MaskedModel, maskable_names
from worker.purify.method import Progress, Purified, Record
from worker.purify.metrics import Preprocess
from worker.purify.perturbation import PerturbationSearch
from worker.purify.precision import PRECISIONS, Precision, autocast_type
from worker.purify.workpiece import (
    check_answers,
    check_samples,
    frozen_copy,
    laid_out_for,
    require,
    ticker,
)

# The reference code shrinks at a tenth of the rate it washes with (1e-3 against 1e-2).
SHRINK_LR_RATIO = 0.1

# Enough to see that a rewritten model answers like the one it was made from.
PROBE_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class AdversarialWeightMasking:
    """
    Find masks that keep the answers on clean images and lose those on perturbed ones.

    The defaults are the paper's for several images per class of 3x32x32.

    Attributes:
        epochs: How often a perturbation is searched and the masks are trained against it.
        passes: Goes through the images in each half of an epoch, ``T = passes·max(1, ⌊N/batch⌋)``.
        batch_size: Images per step, at most all.
        alpha: α, weight of the clean loss.
        beta: β, weight of the perturbed loss; None means ``1 - α``.
        gamma: γ, weight of the masks' L1 norm.
        tau: τ, limit of the perturbation's L1 norm.
        perturbation_lr: Step size of the search for the perturbation δ.
        mask_lr: Learning rate of the masks m.
        augmentations: Random variants added for each image.
        flip: Mirror half of those variants.
        mask_linear: Mask the weights of linear layers too.
        shrink_epochs: Epochs on the clean loss and the masks' norm alone, before all else.
        mask_lr_decay: Factor on ``mask_lr`` after every epoch.
        precision: What the network is computed in; weights, masks and δ are float32 all the same.
    """

    epochs: int = 20
    passes: int = 5
    batch_size: int = 128
    alpha: float = 0.9
    beta: float | None = None
    gamma: float = 1e-8
    tau: float = 1000.0
    perturbation_lr: float = 10.0
    mask_lr: float = 1e-2
    augmentations: int = 0
    flip: bool = False
    mask_linear: bool = False
    shrink_epochs: int = 0
    mask_lr_decay: float = 1.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        """
        Check every bound.

        Raises:
            InvalidParameter: A value is out of its bounds; the message names it.
        """
        for name in ("epochs", "passes", "batch_size"):
            require(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("augmentations", "shrink_epochs"):
            require(self, name, getattr(self, name) >= 0, "at least 0")
        for name in ("alpha", "gamma"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "finite and at least 0")
        require(self, "alpha", self.alpha <= 1 or self.beta is not None, "at most 1 without beta")
        if self.beta is not None:
            require(self, "beta", 0 <= self.beta < math.inf, "finite and at least 0")
        require(self, "alpha", self.alpha > 0 or self._beta > 0, "above 0 where beta is 0")
        for name in ("tau", "perturbation_lr", "mask_lr"):
            require(self, name, 0 < getattr(self, name) < math.inf, "finite and above 0")
        require(self, "mask_lr_decay", 0 < self.mask_lr_decay <= 1, "above 0 and at most 1")
        require(self, "precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")

    def cost(self, images: int) -> int:
        """Return about how many forward passes of one image a run with *images* samples takes."""
        # A backward pass costs two, and either half of an epoch runs the model twice per image.
        return 10 * self.epochs * self.passes * images * (1 + self.augmentations)

    def purify(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        preprocess: Preprocess | None = None,
        seed: int,
        progress: Progress | None = None,
    ) -> Purified:
        """
        Return masks for the weights of *model*, which is read only.

        The history has a record per epoch, without the shrinking ones: ``perturbation_norm``, the
        L1 norm of its perturbation after scaling; ``clean_loss`` and ``perturbed_loss``, the mean
        cross-entropy against the labels before each step; ``mask_mean``, the mean of all mask
        values after it, 1 for an untouched model.

        The work is done on the device of the model, in float64 for float64 images and in float32
        otherwise. The same arguments give the same masks wherever torch's operations are
        deterministic; torch's global generator is neither used nor changed.

        Args:
            images: Clean images ``(N, C, H, W)`` in [0, 1].
            labels: Their classes ``(N,)`` int64.
            preprocess: Applied to images right before the model, such as mean and std.
            progress: Called with the steps done and the steps in all after each of them; an
                exception it raises ends the run.

        Raises:
            NotEnoughData: There is no image.
            NothingToMask: The model has no convolution, and linear layers are not to be masked.
            NotFinite: A loss is not a finite number.
            NothingLearned: Every mask fell to 0.
            InvalidParameter: The images or the labels are not what they should be.
            UnusableModel: The model cannot be copied, or gives no logits.
        """
        if len(images) == 0:
            raise NotEnoughData
        check_samples(images, labels)
        names = maskable_names(model, mask_linear=self.mask_linear)
        if not names:
            raise NothingToMask
        weight = model.get_parameter(names[0])
        dtype = torch.promote_types(images.dtype, torch.float32)
        generator = torch.Generator().manual_seed(seed)
        images, labels = augment(
            images, labels, copies=self.augmentations, flip=self.flip, generator=generator
        )
        images = laid_out_for(model, images.to(weight.device, dtype))
        labels = labels.to(weight.device, torch.int64)
        masked = self._masked(model, names, images, preprocess)
        check_answers(masked, images, labels)
        batch_size = min(self.batch_size, len(images))
        steps = self.passes * (len(images) // batch_size)
        tick = ticker(progress, steps * (self.shrink_epochs + 2 * self.epochs))

        def batches() -> Iterator[Tensor]:
            drawn = shuffled_batches(len(images), batch_size, self.passes, generator)
            for batch in drawn.to(weight.device):
                yield batch
                tick()

        shrinking = MaskTraining(
            masked,
            images,
            labels,
            batch_size=batch_size,
            lr=SHRINK_LR_RATIO * self.mask_lr,
            alpha=1.0,
            beta=None,
            gamma=self.gamma,
        )
        for _ in range(self.shrink_epochs):
            shrinking.run(batches())

        search = PerturbationSearch(masked, images, batch_size=batch_size, lr=self.perturbation_lr)
        training = MaskTraining(
            masked,
            images,
            labels,
            batch_size=batch_size,
            lr=self.mask_lr,
            alpha=self.alpha,
            beta=self._beta,
            gamma=self.gamma,
        )
        history = []
        for epoch in range(self.epochs):
            delta = search.run(batches(), tau=self.tau)
            losses = training.run(batches(), delta=delta)
            training.set_lr(self.mask_lr * self.mask_lr_decay ** (epoch + 1))
            history.append(_record(delta, losses / steps, masked))
        if not bool(masked.mask.any()):
            raise NothingLearned
        return Purified(masks=masked.masks, history=tuple(history), computed_in=masked.computed_in)

    @property
    def _beta(self) -> float:
        return 1 - self.alpha if self.beta is None else self.beta

    def _masked(
        self,
        model: nn.Module,
        names: list[str],
        images: Tensor,
        preprocess: Preprocess | None,
    ) -> MaskedModel:
        """Return a masked copy of *model*, in the form that is fastest to train."""
        frozen = frozen_copy(model, images.dtype)
        probe = images[:PROBE_IMAGES]
        frozen = absorb_batch_norms(frozen, probe if preprocess is None else preprocess(probe))
        return MaskedModel(
            frozen,
            names,
            preprocess=preprocess,
            autocast=autocast_type(self.precision, images),
        )


def shuffled_batches(
    count: int, batch_size: int, passes: int, generator: torch.Generator
) -> Tensor:
    """
    Return the positions ``(T, batch)`` of one half epoch's batches, ``T = passes·max(1, ⌊N/batch⌋)``.

    Each pass is a new random order, cut into full batches; what is left over sits out this pass.
    With fewer images than a batch holds, a pass is one batch of all of them.
    """
    size = min(batch_size, count)
    orders = [torch.randperm(count, generator=generator) for _ in range(passes)]
    return torch.cat([order[: count - count % size].view(-1, size) for order in orders])


def _record(delta: Tensor, losses: Tensor, masked: MaskedModel) -> Record:
    """
    Return the epoch in numbers, read from the device once; ``purify`` says what they are.

    Raises:
        NotFinite: One of the numbers is not.
    """
    numbers = torch.stack([delta.abs().sum(), *losses, masked.mask.mean()])
    if not numbers.isfinite().all():
        raise NotFinite
    names = ("perturbation_norm", "clean_loss", "perturbed_loss", "mask_mean")
    return dict(zip(names, numbers.tolist(), strict=True))
