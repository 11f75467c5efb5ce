"""Law: with its pools before its activations a model answers as before, or it is left alone."""

import pytest
import torch
from torch import nn

from tests.worker.purify.networks import PROBE, Beside, Falling, Undecided, convolution, twice
from worker.purify.pooling import RISING, pool_first


def order(model: nn.Module) -> list[str]:
    """Return what runs, in its order."""
    calls = list[str]()
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    model(PROBE)
    return calls


@pytest.mark.parametrize("rising", RISING)
def test_what_never_falls_comes_after_the_pool(rising: type[nn.Module]) -> None:
    """The answers are the same to the last digit, and parameters keep their names."""
    model = nn.Sequential(
        convolution(3), rising(), nn.MaxPool2d(2), convolution(6), rising()
    ).eval()
    rewritten = pool_first(model, PROBE)
    assert torch.equal(rewritten(PROBE), model(PROBE))
    name = rising.__name__
    assert order(rewritten) == ["Conv2d", "Identity", "MaxPool2d", name, "Conv2d", name]
    assert dict(rewritten.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert order(model) == ["Conv2d", name, "MaxPool2d", "Conv2d", name]


def test_gradients_are_the_same_where_no_value_is_rounded_to_another() -> None:
    """To all pixels, and with a pool whose windows overlap and reach beyond the edge."""
    model = nn.Sequential(convolution(3), nn.ELU(), nn.MaxPool2d(3, 2, padding=1)).double().eval()
    rewritten = pool_first(model, PROBE.double())
    assert order(rewritten.float()) == ["Conv2d", "Identity", "MaxPool2d", "ELU"]
    rewritten.double()
    leaf = PROBE.double().requires_grad_()
    (before,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    (after,) = torch.autograd.grad(rewritten(leaf).square().sum(), leaf)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    "model",
    [
        Beside(nn.Sequential(convolution(3), nn.ELU()), nn.MaxPool2d(2)),
        nn.Sequential(convolution(3), twice(nn.ELU(), nn.MaxPool2d(2))),
        Undecided(convolution(3), nn.ELU(), nn.MaxPool2d(2)),
        nn.Sequential(convolution(3), Falling(), nn.MaxPool2d(2)),
        nn.Sequential(convolution(3), nn.GELU(), nn.MaxPool2d(2)),
        nn.Sequential(convolution(3), nn.LeakyReLU(-1.0), nn.MaxPool2d(2)),
        nn.Sequential(convolution(3), nn.ELU(), nn.AvgPool2d(2)),
        nn.Sequential(convolution(3), nn.MaxPool2d(2), nn.ELU()),
    ],
)
def test_what_would_answer_otherwise_stays_as_it_is(model: nn.Module) -> None:
    """Or what is in order already, or cannot be traced."""
    assert pool_first(model.eval(), PROBE) is model
