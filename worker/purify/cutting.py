"""
Run a network in two parts, of which the first runs once for all that is made of it.

Results differ in their last layers alone, and all are run on the same images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

MOST = 4  # times as many numbers as an image has may be kept of it


@dataclass(frozen=True, kw_only=True)
class Cut:
    """
    Say where networks of one make are cut.

    Attributes:
        head: What comes before the cut; takes inputs, and gives features ``(B, …)``.
        at: The name of the last step before it in a network's graph; None where the networks stay whole.
    """

    head: nn.Module
    at: str | None

    def tail(self, network: nn.Module) -> nn.Module:
        """Return what comes after the cut in *network*, with the very layers of it; takes features."""
        if self.at is None:
            return network
        graph = fx.Tracer().trace(network)
        return fx.GraphModule(network, _from(graph, self.at))


def cut_before(network: nn.Module, layers: Sequence[str], probe: Tensor) -> Cut:
    """
    Return where to cut *network*, as late as can be before the first of *layers* runs.

    It stays whole where its graph cannot be traced, where nothing but features does not pass from one
    part to the other anywhere, where features are much larger than inputs, where the parts answer
    otherwise than the whole, or where the second one changes its features.

    Args:
        layers: Names of modules that each run once for an image.
        probe: A few inputs.
    """
    whole = Cut(head=nn.Identity(), at=None)
    try:
        at = _last_bridge(fx.Tracer().trace(network), layers)
        if at is None:
            return whole
        cut = Cut(head=fx.GraphModule(network, _until(fx.Tracer().trace(network), at)), at=at)
        with torch.no_grad():
            features = cut.head(probe)
            good = isinstance(features, Tensor) and len(features) == len(probe)
            if not good or features.numel() > MOST * probe.numel():
                return whole
            as_given = features.clone()
            same = torch.equal(cut.tail(network)(features), network(probe))
            # What works on its input in place would find it changed the next time.
            return cut if same and torch.equal(features, as_given) else whole
    except Exception:  # Whatever a model's own forward makes of a symbolic input.
        return whole


def _last_bridge(graph: fx.Graph, layers: Sequence[str]) -> str | None:
    """Return the last step before *layers* that alone leads from what is before it to what follows."""
    steps = list(graph.nodes)
    place = {step: number for number, step in enumerate(steps)}
    last_use = {step: max((place[user] for user in step.users), default=-1) for step in steps}
    bridge = None
    for number, step in enumerate(steps):
        if step.op == "call_module" and step.target in layers:
            return bridge
        crossing = [each for each in steps[: number + 1] if last_use[each] > number]
        if crossing == [step] and step.op != "placeholder":
            bridge = step.name
    return None


def _until(graph: fx.Graph, at: str) -> fx.Graph:
    """Return *graph* as far as its step *at*, which it then gives."""
    steps = list(graph.nodes)
    (last,) = (step for step in steps if step.name == at)
    for step in reversed(steps[steps.index(last) + 1 :]):
        graph.erase_node(step)
    graph.output(last)
    return graph


def _from(graph: fx.Graph, at: str) -> fx.Graph:
    """Return *graph* from after its step *at*, which it then takes."""
    steps = list(graph.nodes)
    (last,) = (step for step in steps if step.name == at)
    with graph.inserting_after(last):
        features = graph.placeholder("features")
    last.replace_all_uses_with(features)
    for step in reversed(steps[: steps.index(last) + 1]):
        graph.erase_node(step)
    return graph
