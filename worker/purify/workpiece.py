"""Prepare what a method works on: its own copy of a model, with the images beside it."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worker.purify.errors import InvalidParameter, NotEnoughData, NotFinite, UnusableModel
from worker.purify.method import Progress
from worker.purify.metrics import Preprocess

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_VECTOR_FLOATS = 16  # of the widest vectors
_AT_ONCE, _LEAST_AT_ONCE = 256, 16  # images; with fewer a processor waits for the weights
_IN_CACHE = 128 * 3 * 32 * 32  # values of images; with what a network makes of them a cache is full


@dataclass(frozen=True, kw_only=True)
class Workpiece:
    """
    Hold a copy of a model that may be changed, and the images on its device.

    Attributes:
        model: In eval mode, in the working precision, without gradients.
        images: ``(N, C, H, W)`` in the working precision.
        labels: ``(N,)`` int64.
        preprocess: Applied to images right before the model.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    preprocess: Preprocess | None

    def logits(self, images: Tensor) -> Tensor:
        """Return the answers of the model as it is now, ``(B, classes)``."""
        logits: Tensor = self.model(self.inputs(images))
        return logits

    def inputs(self, images: Tensor) -> Tensor:
        """Return *images* as the model takes them."""
        return images if self.preprocess is None else self.preprocess(images)

    def changes(self, original: nn.Module) -> dict[str, Tensor]:
        """
        Return the tensors of the copy that differ from *original*'s, on the CPU.

        Whole numbers are left out: batch norm's count of batches is a diary, not a weight.

        Raises:
            NotFinite: One of them is not a finite number.
        """
        before = original.state_dict()
        after = {
            name: tensor.detach().clone().cpu()
            for name, tensor in self.model.state_dict().items()
            if tensor.is_floating_point() and not torch.equal(before[name].to(tensor.dtype), tensor)
        }
        if not all(tensor.isfinite().all() for tensor in after.values()):
            raise NotFinite
        return after


def prepare(
    model: nn.Module, images: Tensor, labels: Tensor, preprocess: Preprocess | None
) -> Workpiece:
    """
    Return a workpiece in float64 for float64 images, in float32 otherwise.

    Dropout and the like stay off in it: they would draw from torch's global generator.

    Raises:
        InvalidParameter: The images or the labels are not what they should be.
        UnusableModel: The model cannot be copied, or gives no logits.
    """
    check_samples(images, labels)
    precision = torch.promote_types(images.dtype, torch.float32)
    parameter = next(model.parameters(), None)
    device = images.device if parameter is None else parameter.device
    work = Workpiece(
        model=frozen_copy(model, precision),
        images=laid_out_for(model, images.to(device, precision)),
        labels=labels.to(device, torch.int64),
        preprocess=preprocess,
    )
    check_answers(work.logits, work.images, work.labels)
    return work


def frozen_copy(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """
    Return a copy in eval mode, without gradients, laid out as ``laid_out_for`` says.

    Raises:
        UnusableModel: It holds something that cannot be copied.
    """
    try:
        frozen = copy.deepcopy(model)
    except (RuntimeError, TypeError) as exc:  # a tensor with a history, an open file, a lock
        raise UnusableModel(f"The model cannot be copied: {exc}") from exc
    frozen = frozen.to(precision).eval().requires_grad_(False)
    for parameter in frozen.parameters():
        parameter.data = laid_out_for(model, parameter.data)
    return frozen


def check_samples(images: Tensor, labels: Tensor) -> None:
    """
    Refuse what is not images in [0, 1] with a whole number each.

    Raises:
        InvalidParameter: The message says what it is instead.
    """
    if len(images) != len(labels):
        raise InvalidParameter(f"{len(images)} images but {len(labels)} labels")
    if not images.is_floating_point():
        raise InvalidParameter(f"images are {images.dtype}; give them as floats in [0, 1]")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise InvalidParameter("labels must be one whole number per image")
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise InvalidParameter("images must lie in [0, 1]; mean and std belong into preprocess")
    if len(images) and labels.min() < 0:
        raise InvalidParameter("labels must be at least 0")


def check_answers(logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
    """
    Refuse a model that does not answer an image with one logit per class.

    Raises:
        UnusableModel: It does not take the images, or gives something else.
        InvalidParameter: A label is none of its classes.
    """
    if len(images) == 0:
        return
    try:
        with torch.no_grad():
            logits = logits_of(images[:1])
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as exc:
        shape = tuple(images.shape[1:])
        raise UnusableModel(f"The model does not take images of the shape {shape}: {exc}") from exc
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        raise UnusableModel("The model does not answer with logits (B, classes).")
    if int(labels.max()) >= logits.shape[1]:
        raise InvalidParameter(
            f"label {int(labels.max())} is none of the model's {logits.shape[1]} classes"
        )


def laid_out(tensor: Tensor) -> Tensor:
    """Return *tensor* with its channels last in memory, which 2-d convolutions are faster on."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def at_once(images: Tensor) -> int:
    """
    Return how many of *images* ``(B, C, H, W)`` to take through a network at once, for speed.

    A processor is faster where what the layers hand on fits into its cache; a GPU is with many. The
    answers are the same, to the last digit on the networks that this was tried on.
    """
    if images.device.type != "cpu":
        return _AT_ONCE
    return min(_AT_ONCE, max(_LEAST_AT_ONCE, _IN_CACHE // math.prod(images.shape[1:])))


def in_parts(images: Tensor) -> tuple[Tensor, ...]:
    """Return *images* in parts to take through a network one after another, as ``at_once`` says."""
    return torch.split(images, at_once(images))


def laid_out_for(model: nn.Module, tensor: Tensor) -> Tensor:
    """Return a weight of *model*, or its images, ``laid_out`` if its weights can be learned so."""
    return tensor.contiguous() if _miscomputes_channels_last(model) else laid_out(tensor)


def _miscomputes_channels_last(model: nn.Module) -> bool:
    """
    Return whether a weight's gradient would be wrong, or end the process, with channels last.

    For a strided 1x1 convolution of fewer input channels than a vector has floats (8 with AVX2, 16
    with AVX-512), oneDNN writes past its workspace on processors that have no better kernel. That
    is the shortcut of a narrow ResNet. Only a weight's gradient is concerned, not an image's.

    Source: uxlfoundation/oneDNN#6035, seen with torch 2.13.
    """
    return any(
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < _VECTOR_FLOATS
        for module in model.modules()
    )


def use_batch_statistics(model: nn.Module, images: int, *, remember: bool) -> None:
    """
    Let every batch norm of *model* normalise by the batch, as it does in training.

    Args:
        images: How many there are in a batch.
        remember: Carry the batches over into the running statistics too.

    Raises:
        NotEnoughData: A single image has no statistics.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    if norms and images < 2:
        raise NotEnoughData("batch_statistics needs two images; give more, or set it to false")
    for norm in norms:
        norm.train()
        norm.track_running_stats = norm.track_running_stats and remember


def epoch_batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """
    Yield the indices of one pass in a new random order: ``max(1, count // batch_size)`` batches.

    What does not fill a batch sits out this pass; fewer images than a batch make one of them all.
    """
    size = min(batch_size, count)
    order = torch.randperm(count, generator=generator)
    yield from order[: count - count % size].view(-1, size)


def batches_of(count: int, batch_size: int) -> int:
    """Return how many batches ``epoch_batches`` yields."""
    return max(1, count // batch_size)


def ticker(progress: Progress | None, total: int) -> Callable[[], None]:
    """Return a function to call after each step, which counts up to *total* for *progress*."""
    done = itertools.count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done), total)

    return tick


def require(method: object, name: str, holds: bool, bound: str) -> None:
    """
    Refuse a field of *method* that is out of its bounds.

    Raises:
        InvalidParameter: The message begins with the field's name.
    """
    if not holds:
        raise InvalidParameter(f"{name} must be {bound}, not {getattr(method, name)!r}")
