"""
Rewrite a model in eval mode without the batch norms that follow its convolutions.

There a batch norm is an affine of each channel, and two affines in a row are one. The convolution's
weight becomes ``θ·s`` and its bias ``(b - mean)·s + shift`` with ``s = scale / sqrt(var + eps)``, so
that a mask on the new weight is the same mask on the old one: ``(m·θ)·s = m·(θ·s)``.
"""

from collections import Counter
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from worker.purify.tracing import changed, traced

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

# Rounding differs between the two models; a wrong rewriting differs by more than that.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


def absorb_batch_norms(model: nn.Module, probe: Tensor) -> nn.Module:
    """
    Return a model that answers like *model*, which is in eval mode and is not changed.

    A batch norm goes where it alone reads what a convolution writes, where both run once, and
    where the convolution shares its weight with nobody. Every other module stays, every parameter
    keeps its name. A model whose graph cannot be traced, or that answers *probe* otherwise once it
    is rewritten, comes back as it is.

    Args:
        probe: A few inputs of the model itself, in its precision and on its device.
    """
    return changed(model, probe, _pairs, _absorb, alike=_alike)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution and the batch norm that it can absorb."""
    graph, called_once = traced(model)
    owners = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    pairs = []
    for node in graph.nodes:
        norm = called_once(node)
        # A subclass may do more than its parent.
        if norm is None or type(norm) not in NORMS or norm.running_var is None:
            continue
        (source,) = node.args
        convolution = called_once(source)
        if convolution is not None and type(convolution) in CONVOLUTIONS and len(source.users) == 1:
            weight = dict(convolution.named_parameters(recurse=False)).get("weight")
            # A reparametrised convolution has no parameter of this name.
            if weight is not None and owners[id(weight)] == 1:
                pairs.append((str(source.target), str(node.target)))
    return pairs


def _absorb(model: nn.Module, pair: tuple[str, str]) -> None:
    """Multiply the affine of a norm into its convolution, in float64 and rounded once."""
    convolution, norm = (model.get_submodule(name) for name in pair)
    norm = cast("_BatchNorm", norm)
    weight = convolution.get_parameter("weight")
    mean = norm.get_buffer("running_mean").double()
    scale = (norm.get_buffer("running_var").double() + norm.eps).rsqrt()
    shift = torch.zeros_like(mean)
    if norm.affine:
        scale = scale * norm.get_parameter("weight").double()
        shift = norm.get_parameter("bias").double()
    bias = convolution.bias.double() if isinstance(convolution.bias, Tensor) else 0.0
    with torch.no_grad():
        weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))
        new_bias = ((bias - mean) * scale + shift).to(weight.dtype)
    convolution.bias = nn.Parameter(new_bias, requires_grad=False)
    model.set_submodule(pair[1], nn.Identity())


def _alike(before: Tensor, after: Tensor) -> bool:
    limit = TOLERANCE[before.dtype] * float(before.abs().max())
    return float((before - after).abs().max()) <= limit
