"""Law: without its batch norms a model answers as before, or it is left alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.worker.purify.networks import PROBE, Beside, Undecided, twice
from worker.purify.batch_norm import absorb_batch_norms


def trained(model: nn.Module) -> nn.Module:
    """Return *model* in eval mode, with batch statistics and affines of its own."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.copy_(torch.rand(norm.num_features, generator=generator))
            assert norm.running_var is not None
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.1)
            if norm.affine:
                nn.init.uniform_(norm.weight, -1.0, 1.0, generator)
                nn.init.uniform_(norm.bias, -1.0, 1.0, generator)
    return model.eval().requires_grad_(False)


def norms(model: nn.Module) -> int:
    """Count the batch norms."""
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def assert_same_answers(model: nn.Module, rewritten: nn.Module) -> None:
    """Compare the logits, and the names of the parameters that masks go by."""
    torch.testing.assert_close(rewritten(PROBE), model(PROBE), rtol=1e-4, atol=1e-5)
    before, after = dict(model.named_parameters()), dict(rewritten.named_parameters())
    assert {name for name in before if before[name].ndim == 4} <= after.keys()


def test_a_batch_norm_behind_a_convolution_is_absorbed() -> None:
    """Grouped or not, with a bias or without, with an affine or without."""
    model = trained(
        nn.Sequential(
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, groups=3, bias=False),
            nn.BatchNorm2d(6, affine=False),
        )
    )
    weight = model.get_parameter("0.weight").clone()
    rewritten = absorb_batch_norms(model, PROBE)
    assert (norms(model), norms(rewritten)) == (2, 0)
    assert_same_answers(model, rewritten)
    assert torch.equal(model.get_parameter("0.weight"), weight)


class Reaching(nn.Module):
    """Read the batch norm's weight beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        """Run it."""
        return self.norm(self.conv(images)) * self.norm.weight.sum()  # type: ignore[no-any-return]


def test_a_batch_norm_that_cannot_be_absorbed_stays() -> None:
    """Shared outputs, repeated or tied convolutions, odd forwards: the model comes back as it is."""
    branched = Beside(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    repeated = twice(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    undecided = Undecided(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3))
    tied[2].weight = tied[0].weight
    reparametrised = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)
    )
    ahead = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))
    without = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    for model in (
        branched, repeated, undecided, Reaching(), tied, reparametrised, ahead, without
    ):  # fmt: skip
        trained(model)
        assert absorb_batch_norms(model, PROBE) is model


def test_what_training_alone_uses_stays() -> None:
    """A head that eval mode leaves out keeps its parameters, by their names."""

    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            hidden = functional.relu(self.norm(self.conv(images)))
            return self.head(hidden) if self.training else hidden

    model = trained(Auxiliary())
    rewritten = absorb_batch_norms(model, PROBE)
    assert norms(rewritten) == 0
    assert_same_answers(model, rewritten)
