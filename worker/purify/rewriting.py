"""
Rewrite the last layers of a network in closed form: same answers, but blind to given triggers.

Each layer is a linear map of its inputs, so the change that does this best is a ridge regression
(here with the weight itself as the prior):

    min over Δ of  ‖ΔX_c - R_c‖² + strength·‖ΔX_s - R_s‖² + ridge·‖Δ‖²

with X_c and X_s the layer's inputs on clean and on stamped images, and R what its outputs there lack of
the original's outputs *on the clean image*. The first term keeps the accuracy, the second takes the
trigger's effect away, the third leaves alone whatever neither asks for. Layer by layer from front to
back, each on the inputs that the rewritten ones before it give; nothing is trained.

It is the edit of one layer's associations known from language models (Meng et al., "Locating and
Editing Factual Associations in GPT", NeurIPS 2022, https://arxiv.org/abs/2202.05262), with the
trigger's shift of the features as the association that is overwritten.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.purify.errors import NotFinite

CHUNK = 128  # images that go through both networks at once
POSITIONS = 64  # of a feature map that a regression sees of each image, spread evenly

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Clean images and what they look like stamped, one for one, ``(N, C, H, W)``."""

    clean: Tensor
    stamped: Tensor


def rewritable(model: nn.Module, forward: Forward, image: Tensor) -> list[str]:
    """
    Return the layers of *model* that can be rewritten, in the order in which they run.

    They are the plain linear layers and the ungrouped 2-d convolutions that run once for an image
    and share their weight with no other.

    Args:
        forward: Runs *model* on images.
        image: ``(1, C, H, W)``.
    """
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    calls: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, module in model.named_modules()
        if _is_plain(module) and owners[id(module.weight)] == 1
    ]
    try:
        with torch.no_grad():
            forward(image)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in calls if calls.count(name) == 1]


def rewrite(
    model: nn.Module,
    original: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    pairs: Pairs,
    layers: list[str],
    *,
    strength: float,
    ridge: float,
) -> None:
    """
    Rewrite *layers* of *model* in place.

    Args:
        original: What *model* was before; it gives the outputs that are aimed at.
        run: Runs a network on images.
        layers: Names that ``rewritable`` gave, in its order.
        strength: Weight of the stamped images against the clean ones.
        ridge: Weight of the change itself, relative to the mean square of the clean inputs.

    Raises:
        NotFinite: A layer's inputs or outputs are not.
    """
    for name in layers:
        layer, source = model.get_submodule(name), original.get_submodule(name)
        clean_gram = clean_lack = stamped_gram = stamped_lack = torch.zeros((), dtype=torch.float64)
        with _watching(layer) as now, _watching(source) as then, torch.no_grad():
            for clean, stamped in zip(
                torch.split(pairs.clean, CHUNK), torch.split(pairs.stamped, CHUNK), strict=True
            ):
                run(original, clean)
                aim = _outputs(source, then.outputs)
                run(model, clean)
                gram, lack = _sums(layer, now, aim)
                clean_gram, clean_lack = clean_gram + gram, clean_lack + lack
                run(model, stamped)
                gram, lack = _sums(layer, now, aim)
                stamped_gram, stamped_lack = stamped_gram + gram, stamped_lack + lack
        inertia = ridge * clean_gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        system = clean_gram + strength * stamped_gram
        system.diagonal().add_(inertia)
        change, failed = torch.linalg.solve_ex(system, clean_lack + strength * stamped_lack)
        if bool(failed.any()) or not bool(change.isfinite().all()):
            raise NotFinite
        _add(layer, change)


def _is_plain(module: nn.Module) -> bool:
    if "weight" not in dict(module.named_parameters(recurse=False)):
        return False
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and module.padding != "same"
    return type(module) is nn.Linear


class _Watched:
    """What went into a layer last, and what came out."""

    def __init__(self) -> None:
        self.inputs = self.outputs = torch.zeros(0)

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        self.inputs, self.outputs = inputs[0], outputs


@contextmanager
def _watching(layer: nn.Module) -> Iterator[_Watched]:
    watched = _Watched()
    handle = layer.register_forward_hook(watched)
    try:
        yield watched
    finally:
        handle.remove()


def _outputs(layer: nn.Module, outputs: Tensor) -> Tensor:
    """Return *outputs* as rows ``(rows, out)``."""
    if isinstance(layer, nn.Linear):
        return outputs.flatten(0, -2)
    return _spread(outputs.flatten(2).transpose(1, 2)).flatten(0, 1)


def _inputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return *inputs* as rows ``(rows, in)``, with a one for the bias at the end where there is one."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = functional.unfold(
            inputs,
            layer.kernel_size,
            dilation=layer.dilation,
            padding=layer.padding,
            stride=layer.stride,
        )  # (B, in, positions)
        rows = _spread(patches.transpose(1, 2)).flatten(0, 1)
    else:
        rows = inputs.flatten(0, -2)
    return rows if layer.bias is None else functional.pad(rows, (0, 1), value=1.0)


def _spread(rows: Tensor) -> Tensor:
    """Return at most ``POSITIONS`` of the positions of ``(B, positions, values)``."""
    return rows[:, :: -(-rows.shape[1] // POSITIONS)]


def _sums(layer: nn.Module, now: _Watched, aim: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``XᵀX`` and ``XᵀR`` over one chunk, in float64."""
    inputs = _inputs(layer, now.inputs)
    lack = aim - _outputs(layer, now.outputs)
    return (inputs.T @ inputs).double(), (inputs.T @ lack).double()


def _add(layer: nn.Module, change: Tensor) -> None:
    """Add a change ``(in, out)``, with the bias as its last row where there is one."""
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        if layer.bias is not None:
            layer.get_parameter("bias").add_(change[-1].to(weight.dtype))
            change = change[:-1]
        weight.add_(change.T.reshape(weight.shape).to(weight.dtype))
