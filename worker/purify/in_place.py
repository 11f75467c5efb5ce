"""
Rewrite a model so that its exponential units overwrite what they are given.

Their gradient can be found from what they are given, by another exponential, or from what they return,
without one; torch does the second where what they were given is gone. The answers are the same to the
last digit, and gradients but for the rounding of what was returned.
"""

from torch import Tensor, fx, nn

from worker.purify.tracing import CalledOnce, changed, traced

EXPONENTIAL = (nn.ELU, nn.CELU, nn.SELU)
# Modules whose gradient does not look at what they returned.
INDIFFERENT = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)


def elus_in_place(model: nn.Module, probe: Tensor) -> nn.Module:
    """
    Return a model that answers like *model*, which is in eval mode and is not changed.

    A unit overwrites what it alone reads, where the gradient of what wrote it does not ask for that.
    Every parameter keeps its name. A model whose graph cannot be traced, or that answers *probe*
    otherwise once it is rewritten, comes back as it is.

    Args:
        probe: A few inputs of the model itself, in its precision and on its device.
    """
    return changed(model, probe, _units, _overwrite)


def _units(model: nn.Module) -> list[str]:
    """Return the names of the units that may overwrite what they are given."""
    graph, called_once = traced(model)
    names = []
    for node in graph.nodes:
        unit = called_once(node)
        # A subclass may do more than its parent.
        if not isinstance(unit, EXPONENTIAL) or type(unit) not in EXPONENTIAL or unit.inplace:
            continue
        rises = getattr(unit, "alpha", 1.0) >= 0  # if not, what it returned does not tell
        if rises and _is_indifferent(node.args[0], called_once):
            names.append(str(node.target))
    return names


def _is_indifferent(source: object, called_once: CalledOnce) -> bool:
    """Whether one step alone reads *source*, and what it is stands nowhere else."""
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return False
    module = called_once(source)
    if type(module) is nn.Identity:
        return _is_indifferent(source.args[0], called_once)
    return type(module) in INDIFFERENT


def _overwrite(model: nn.Module, name: str) -> None:
    unit = model.get_submodule(name)
    assert isinstance(unit, EXPONENTIAL)
    unit.inplace = True
