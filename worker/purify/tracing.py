"""Trace a network, and make of it one that answers alike and is quicker to run."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

CalledOnce = Callable[[object], nn.Module | None]
Place = TypeVar("Place")


def traced(model: nn.Module) -> tuple[fx.Graph, CalledOnce]:
    """
    Return the graph of *model*, and what gives the module that a step calls, if no other step does.

    Raises whatever the model's own forward makes of a symbolic input.
    """
    graph = fx.Tracer().trace(model)
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def called_once(node: object) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module" and calls[node.target] == 1:
            return modules.get(str(node.target))
        return None

    return graph, called_once


def changed(
    model: nn.Module,
    probe: Tensor,
    places: Callable[[nn.Module], Sequence[Place]],
    change: Callable[[nn.Module, Place], None],
    *,
    alike: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> nn.Module:
    """
    Return a copy of *model* that is changed at every place, or *model* as it is where that is no use.

    That is where there is no such place, where its graph cannot be traced, or where the copy's answers
    are not *alike* the model's.

    Args:
        probe: A few inputs of the model itself, in its precision and on its device.
        places: Returns where to change a network that it leaves as it is.
        change: Changes a network at one of them.
        alike: Takes the answers of before, and those of after.
    """
    try:
        found = places(model)
        if not found:
            return model
        result = copy.deepcopy(model)
        for place in found:
            change(result, place)
        with torch.no_grad():
            return result if alike(model(probe), result(probe)) else model
    except Exception:  # Whatever a model's own forward makes of a symbolic input, or of the change.
        return model
