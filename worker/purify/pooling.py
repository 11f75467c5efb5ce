"""
Rewrite a model so that what pools the largest values comes before the activation that it follows.

An activation that never falls, such as an ELU, leaves the largest value the largest, so the answers are
the same to the last digit, and it has a quarter as many values to work on where two by two are pooled.
Gradients are the same but where it makes different values equal, by rounding: they go to the largest
then, and not to the first.
"""

from torch import Tensor, nn

from worker.purify.tracing import changed, traced

RISING = (nn.ReLU, nn.ReLU6, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
# Of these, what must not be negative.
SLOPES = ("alpha", "negative_slope")


def pool_first(model: nn.Module, probe: Tensor) -> nn.Module:
    """
    Return a model that answers like *model*, which is in eval mode and is not changed.

    Every parameter keeps its name. A model whose graph cannot be traced, or that answers *probe*
    otherwise once it is rewritten, comes back as it is.

    Args:
        probe: A few inputs of the model itself, in its precision and on its device.
    """
    return changed(model, probe, _pairs, _swap)


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each activation and the pool that alone reads it."""
    graph, called_once = traced(model)
    pairs = []
    for node in graph.nodes:
        pool = called_once(node)
        # A subclass may do more than its parent.
        if type(pool) is not nn.MaxPool2d or pool.return_indices:
            continue
        (source,) = node.args
        if _rises(called_once(source)) and len(source.users) == 1:
            pairs.append((str(source.target), str(node.target)))
    return pairs


def _rises(module: nn.Module | None) -> bool:
    """Whether *module* is an activation that never falls."""
    slopes = [getattr(module, name, 0.0) for name in SLOPES]
    return type(module) in RISING and min(slopes) >= 0


def _swap(model: nn.Module, pair: tuple[str, str]) -> None:
    activation, pool = pair
    both = nn.Sequential(model.get_submodule(pool), model.get_submodule(activation))
    model.set_submodule(activation, nn.Identity())
    model.set_submodule(pool, both)
