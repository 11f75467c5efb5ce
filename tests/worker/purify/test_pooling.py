"""Law: with its pools before its activations a model answers as before, or it is left alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.purify.pooling import RISING, pool_first

PROBE = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def convolution(inputs: int) -> nn.Conv2d:
    """Return one whose outputs have either sign."""
    torch.manual_seed(0)
    return nn.Conv2d(inputs, 6, 3, padding=1)


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


class Beside(nn.Module):
    """Use what an activation gives twice: in its pool and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.activation, self.pool = convolution(3), nn.ELU(), nn.MaxPool2d(2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the pool with the mean of what it pools."""
        hidden: Tensor = self.activation(self.convolution(images))
        pooled: Tensor = self.pool(hidden)
        return pooled + hidden.mean()


class Twice(Beside):
    """Run the same activation at two places."""

    def forward(self, images: Tensor) -> Tensor:
        """Return what the last of them gives."""
        pooled: Tensor = self.activation(self.pool(self.activation(self.convolution(images))))
        return pooled


class Untraceable(Beside):
    """Ask what a tensor holds."""

    def forward(self, images: Tensor) -> Tensor:
        """Return what is pooled."""
        hidden = self.convolution(images)
        pooled: Tensor = self.pool(self.activation(hidden if hidden.sum() > 0 else -hidden))
        return pooled


class Falling(nn.ELU):
    """Fall, though its parent rises."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the parent's answer with the other sign."""
        return -functional.elu(hidden)


@pytest.mark.parametrize(
    "model",
    [
        Beside(),
        Twice(),
        Untraceable(),
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
