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

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.purify.errors import NotFinite

CHUNK = 128  # images that go through both networks at once
POSITIONS = 24  # of a feature map that a regression sees of each image, spread evenly

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


def rewritten(
    original: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    pairs: Pairs,
    layers: Sequence[str],
    *,
    strengths: Sequence[float],
    ridge: float,
) -> list[nn.Module]:
    """
    Return a copy of *original* with its *layers* rewritten for each of *strengths*.

    Args:
        original: It gives the outputs that are aimed at.
        run: Runs a network on images.
        layers: Names that ``rewritable`` gave, in its order.
        strengths: Weights of the stamped images against the clean ones.
        ridge: Weight of the change itself, relative to the mean square of the clean inputs.

    Raises:
        NotFinite: A layer's inputs or outputs are not.
    """
    results = [copy.deepcopy(original) for _ in strengths]
    aims_of_all = _aims(original, layers, run, pairs.clean)
    for number, (name, aims) in enumerate(zip(layers, aims_of_all, strict=True)):
        sums = None
        for result, strength in zip(results, strengths, strict=True):
            # Up to the first layer the results are the same yet.
            if sums is None or number > 0:
                sums = _sums(result, name, run, pairs, aims)
            _solve(result.get_submodule(name), sums, strength=strength, ridge=ridge)
    return results


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
    # An odd step comes by all columns of a map whose side is a power of two.
    return rows[:, :: -(-rows.shape[1] // POSITIONS) | 1]


def _aims(
    original: nn.Module,
    names: Sequence[str],
    run: Callable[[nn.Module, Tensor], Tensor],
    clean: Tensor,
) -> list[list[Tensor]]:
    """Return what each layer gives on each chunk of the clean images."""
    layers = [original.get_submodule(name) for name in names]
    aims = [list[Tensor]() for _ in layers]
    with ExitStack() as stack, torch.no_grad():
        watched = [stack.enter_context(_watching(layer)) for layer in layers]
        for chunk in torch.split(clean, CHUNK):
            run(original, chunk)
            for layer, seen, own in zip(layers, watched, aims, strict=True):
                own.append(_outputs(layer, seen.outputs))
    return aims


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """``XᵀX`` and ``XᵀR`` over clean and over stamped images, in float64."""

    clean: tuple[Tensor, Tensor]
    stamped: tuple[Tensor, Tensor]


def _sums(
    model: nn.Module,
    name: str,
    run: Callable[[nn.Module, Tensor], Tensor],
    pairs: Pairs,
    aims: Sequence[Tensor],
) -> _Sums:
    layer = model.get_submodule(name)

    def over(images: Tensor) -> tuple[Tensor, Tensor]:
        gram = product = torch.zeros((), dtype=torch.float64)
        with _watching(layer) as watched, torch.no_grad():
            for chunk, aim in zip(torch.split(images, CHUNK), aims, strict=True):
                run(model, chunk)
                inputs = _inputs(layer, watched.inputs)
                lack = aim - _outputs(layer, watched.outputs)
                gram = gram + (inputs.T @ inputs).double()
                product = product + (inputs.T @ lack).double()
        return gram, product

    return _Sums(clean=over(pairs.clean), stamped=over(pairs.stamped))


def _solve(layer: nn.Module, sums: _Sums, *, strength: float, ridge: float) -> None:
    """Add the change that does best to *layer*."""
    (clean_gram, clean_product), (stamped_gram, stamped_product) = sums.clean, sums.stamped
    inertia = ridge * clean_gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    system = clean_gram + strength * stamped_gram
    system.diagonal().add_(inertia)
    change, failed = torch.linalg.solve_ex(system, clean_product + strength * stamped_product)
    if bool(failed.any()) or not bool(change.isfinite().all()):
        raise NotFinite
    _add(layer, change)


def _add(layer: nn.Module, change: Tensor) -> None:
    """Add a change ``(in, out)``, with the bias as its last row where there is one."""
    weight = layer.get_parameter("weight")
    with torch.no_grad():
        if layer.bias is not None:
            layer.get_parameter("bias").add_(change[-1].to(weight.dtype))
            change = change[:-1]
        weight.add_(change.T.reshape(weight.shape).to(weight.dtype))
