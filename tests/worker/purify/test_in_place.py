"""Law: with units that overwrite what they are given a model answers as before, or it is left alone."""

import pytest
import torch
from torch import Tensor, nn

from tests.worker.purify.networks import PROBE, Beside, Falling, Undecided, convolution, twice
from worker.purify.in_place import EXPONENTIAL, elus_in_place


def gradient(model: nn.Module, images: Tensor) -> Tensor:
    """Return that of the sum of squares of the answers."""
    leaf = images.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    return found


@pytest.mark.parametrize("unit", EXPONENTIAL)
def test_units_overwrite_what_they_alone_read(unit: type[nn.Module]) -> None:
    """The answers are the same to the last digit, and gradients where nothing is rounded."""
    model = nn.Sequential(
        *(convolution(3), nn.BatchNorm2d(6), unit(), nn.MaxPool2d(2)),
        *(convolution(6), nn.Identity(), nn.Identity(), unit()),
        *(convolution(6), nn.MaxPool2d(2), unit(), nn.Flatten(), nn.Linear(24, 5), unit()),
    ).eval()
    rewritten = elus_in_place(model, PROBE)
    units = [module for module in rewritten.modules() if type(module) is unit]
    assert [each.inplace for each in units] == [True] * 4
    assert not any(module.inplace for module in model.modules() if type(module) is unit)
    assert torch.equal(rewritten(PROBE), model(PROBE))
    assert dict(rewritten.named_parameters()).keys() == dict(model.named_parameters()).keys()
    before = gradient(model.double(), PROBE.double())
    torch.testing.assert_close(gradient(rewritten.double(), PROBE.double()), before)


def test_no_input_is_overwritten() -> None:
    """Neither that of the model, nor one that it hands on."""
    model = nn.Sequential(
        *(nn.ELU(), nn.Identity(), nn.ELU(), nn.Dropout(), nn.ELU(), convolution(3), nn.ELU())
    ).eval()
    rewritten = elus_in_place(model, PROBE)
    units = [module.inplace for module in rewritten.modules() if type(module) is nn.ELU]
    assert units == [False, False, False, True]
    given = PROBE.clone()
    rewritten(given)
    assert torch.equal(given, PROBE)


@pytest.mark.parametrize(
    "model",
    [
        Beside(convolution(3), nn.ELU()),
        nn.Sequential(convolution(3), twice(nn.ELU(), nn.Identity())),
        Undecided(convolution(3), nn.ELU()),
        nn.Sequential(convolution(3), Falling()),
        # Its gradient is found from what it returned.
        nn.Sequential(convolution(3), nn.Sigmoid(), nn.ELU()),
        nn.Sequential(convolution(3), nn.ELU(alpha=-1.0)),
        nn.Sequential(convolution(3), nn.ELU(inplace=True)),
    ],
)
def test_what_would_answer_otherwise_stays_as_it_is(model: nn.Module) -> None:
    """Or what is in order already, or cannot be traced."""
    assert elus_in_place(model.eval(), PROBE) is model
