"""Trace a network, to see which of its modules can be given another place."""

from collections import Counter
from collections.abc import Callable

from torch import fx, nn

CalledOnce = Callable[[object], nn.Module | None]


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
