"""
Rewrite the last layers of a network in closed form: same answers, but blind to given triggers.

Each layer is a linear map of its inputs, so the change that does this best is a ridge regression
(here with the weight itself as the prior):

    min over Δ of  ‖ΔX_c - R_c‖² + strength·‖ΔX_s - R_s‖² + ridge·‖Δ‖²

with X_c and X_s the layer's inputs on clean and on stamped images, and R what its outputs there lack of
the original's outputs *on the clean image*. The first term keeps the accuracy, the second takes the
trigger's effect away, the third leaves alone whatever neither asks for. Layer by layer from front to
back, each on the inputs that the rewritten ones before it give; nothing is trained.

What is taken away is a part of the effect, as ridge and clean images hold against it. So the layer that
gives the logits can be made to aim beyond, at less for the class that a stamped image is led to than the
clean one got: the *overshoot*.

It is the edit of one layer's associations known from language models (Meng et al., "Locating and
Editing Factual Associations in GPT", NeurIPS 2022, https://arxiv.org/abs/2202.05262), with the
trigger's shift of the features as the association that is overwritten.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.purify.cutting import cut_before
from worker.purify.detection.trigger import ELSEWHERE
from worker.purify.errors import NotFinite

CHUNK = 128  # images that go through both networks at once
PROBE_IMAGES = 2
BLOCKS, LEAST_COLUMNS = 8, 64  # of a matrix that is its own transpose, and of each block
POSITIONS = 24  # of a feature map that a regression sees of each image, spread evenly

Forward = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module], Forward]  # how to run a network


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """
    Hold clean images and what they look like stamped, one for one.

    Attributes:
        clean: ``(N, C, H, W)``.
        stamped: ``(N, C, H, W)``.
        targets: The classes to which the stamped ones are led, ``(N,)`` int64; ``ELSEWHERE`` where any
            other than their own will do.
    """

    clean: Tensor
    stamped: Tensor
    targets: Tensor


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """
    Hold a rewritten network.

    Attributes:
        strength: Weight of the stamped images against the clean ones.
        overshoot: By how many standard deviations of the logits it was to go beyond.
    """

    model: nn.Module
    strength: float
    overshoot: float


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
    inputs: Callable[[Tensor], Tensor],
    pairs: Pairs,
    layers: Sequence[str],
    *,
    strengths: Sequence[float],
    ridge: float,
    overshoots: Sequence[float] = (0.0,),
) -> Iterator[Rewritten]:
    """
    Yield a copy of *original* with its *layers* rewritten for each of *strengths* and *overshoots*.

    All overshoots of a strength come before the next one.

    Args:
        original: It gives the outputs that are aimed at.
        inputs: Makes of images what goes into a network.
        layers: Names that ``rewritable`` gave, in its order.
        strengths: Weights of the stamped images against the clean ones.
        ridge: Weight of the change itself, relative to the mean square of the clean inputs.
        overshoots: In standard deviations of the logits. There is none where the last layer does not give
            these.

    Raises:
        NotFinite: A layer's inputs or outputs are not.
    """
    results = [copy.deepcopy(original) for _ in strengths]
    run, pairs = _from_first(original, inputs, pairs, layers)
    aims = _aims(original, layers, run, pairs.clean)
    beyond = None
    if _gives_logits(original, layers[-1], run, pairs.clean[:1]):
        beyond = _beyond(aims[-1], pairs.targets)

    def sums_of_each(number: int, beyond: Sequence[Tensor] | None = None) -> Iterator[_Sums]:
        # Up to the first layer the results are the same yet.
        shared = _sums(results[0], layers[0], run, pairs, aims[0], beyond) if number == 0 else None
        for result in results:
            yield shared or _sums(result, layers[number], run, pairs, aims[number], beyond)

    for number, name in enumerate(layers[:-1]):
        for result, strength, sums in zip(results, strengths, sums_of_each(number), strict=True):
            _solve(result.get_submodule(name), sums, strength=strength, ridge=ridge)
    last = sums_of_each(len(layers) - 1, beyond)
    for result, strength, sums in zip(results, strengths, last, strict=True):
        for overshoot in (0.0,) if beyond is None else overshoots:
            model = copy.deepcopy(result)
            layer = model.get_submodule(layers[-1])
            _solve(layer, sums, strength=strength, ridge=ridge, overshoot=overshoot)
            yield Rewritten(model=model, strength=strength, overshoot=overshoot)


def _from_first(
    original: nn.Module,
    inputs: Callable[[Tensor], Tensor],
    pairs: Pairs,
    layers: Sequence[str],
) -> tuple[Run, Pairs]:
    """Return how to run results, and on what: what comes before *layers* is run here, once for all."""
    cut = cut_before(original, layers, inputs(pairs.clean[:PROBE_IMAGES]))
    if cut.at is None:
        return lambda network: lambda images: network(inputs(images)), pairs

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([cut.head(inputs(chunk)) for chunk in torch.split(images, CHUNK)])

    features_of = replace(pairs, clean=features(pairs.clean), stamped=features(pairs.stamped))
    return cut.tail, features_of


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
    run: Run,
    clean: Tensor,
) -> list[list[Tensor]]:
    """Return what each layer gives on each chunk of the clean images."""
    layers = [original.get_submodule(name) for name in names]
    aims = [list[Tensor]() for _ in layers]
    forward = run(original)
    with ExitStack() as stack, torch.no_grad():
        watched = [stack.enter_context(_watching(layer)) for layer in layers]
        for chunk in torch.split(clean, CHUNK):
            forward(chunk)
            for layer, seen, own in zip(layers, watched, aims, strict=True):
                own.append(_outputs(layer, seen.outputs))
    return aims


def _gives_logits(original: nn.Module, name: str, run: Run, image: Tensor) -> bool:
    """Whether what a layer gives is what the network answers."""
    with _watching(original.get_submodule(name)) as watched, torch.no_grad():
        logits = run(original)(image)
    return logits.dim() == 2 and torch.equal(watched.outputs, logits)


def _beyond(clean: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """
    Return where to aim, from the logits of each chunk of the clean images, with an overshoot of 1.

    That is less for the target, and where no class is the target, more for the image's own. An image
    that is of the target's class anyway is to keep it.
    """
    spread = torch.cat(list(clean)).std(correction=0)
    steps = []
    for logits, target in zip(clean, torch.split(targets, CHUNK), strict=True):
        own, elsewhere = logits.argmax(1), target == ELSEWHERE
        step = spread * (elsewhere.to(logits) - (~elsewhere & (target != own)).to(logits))
        which = torch.where(elsewhere, own, target)
        steps.append(torch.zeros_like(logits).scatter_(1, which[:, None], step[:, None]))
    return steps


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """``XᵀX`` and ``XᵀR`` over clean and over stamped images, and ``XᵀR`` of an overshoot, in float64."""

    clean: tuple[Tensor, Tensor]
    stamped: tuple[Tensor, Tensor]
    beyond: Tensor


def _sums(
    model: nn.Module,
    name: str,
    run: Run,
    pairs: Pairs,
    aims: Sequence[Tensor],
    beyond: Sequence[Tensor] | None,
) -> _Sums:
    layer, forward = model.get_submodule(name), run(model)

    def over(images: Tensor, beyond: Sequence[Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        gram = product = further = torch.zeros((), dtype=torch.float64)
        with _watching(layer) as watched, torch.no_grad():
            for number, (chunk, aim) in enumerate(
                zip(torch.split(images, CHUNK), aims, strict=True)
            ):
                forward(chunk)
                inputs = _inputs(layer, watched.inputs)
                lack = aim - _outputs(layer, watched.outputs)
                gram = _add_gram(gram, inputs)
                product = product + (inputs.T @ lack).double()
                if beyond is not None:
                    further = further + (inputs.T @ beyond[number]).double()
        return gram.triu() + gram.triu(1).T, product, further

    clean_gram, clean_product, _ = over(pairs.clean, None)
    gram, product, further = over(pairs.stamped, beyond)
    return _Sums(clean=(clean_gram, clean_product), stamped=(gram, product), beyond=further)


def _add_gram(gram: Tensor, rows: Tensor) -> Tensor:
    """Return *gram*, or zeros for a number, with ``XᵀX`` of ``(rows, in)`` added to its upper half."""
    columns = rows.shape[1]
    if gram.dim() == 0:
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=rows.device)
    step = -(-columns // max(1, min(BLOCKS, columns // LEAST_COLUMNS)))
    for first in range(0, columns, step):
        # What is below the diagonal is the same.
        gram[first : first + step, first:] += rows[:, first : first + step].T @ rows[:, first:]
    return gram


def _solve(
    layer: nn.Module, sums: _Sums, *, strength: float, ridge: float, overshoot: float = 0.0
) -> None:
    """Add the change that does best to *layer*."""
    (clean_gram, clean_product), (stamped_gram, stamped_product) = sums.clean, sums.stamped
    inertia = ridge * clean_gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    system = clean_gram + strength * stamped_gram
    system.diagonal().add_(inertia)
    aimed = clean_product + strength * (stamped_product + overshoot * sums.beyond)
    change, failed = torch.linalg.solve_ex(system, aimed)
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
