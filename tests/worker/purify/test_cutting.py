"""Law: the two parts of a network answer as the whole does, or it is left whole."""

import pytest
import torch
from torch import Tensor, nn

from worker.purify.cutting import Cut, cut_before

PROBE = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """Go around two convolutions, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4))
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4))
        self.last = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        features = torch.relu(self.stem(images))
        features = torch.relu(features + self.first(features))
        features = torch.relu(features + self.second(features))
        logits: Tensor = self.last(features.flatten(1))
        return logits


def network(kind: type[nn.Module] = Residual) -> nn.Module:
    """Return one with weights of its own."""
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def answers(cut: Cut, whole: nn.Module) -> Tensor:
    """Return what both parts give."""
    logits: Tensor = cut.tail(whole)(cut.head(PROBE))
    return logits


@pytest.mark.parametrize(
    ("layers", "at", "shape"),
    [
        (["last"], "flatten", (64,)),
        (["second.0", "last"], "relu_1", (4, 4, 4)),
        # Between these two the way around it is open.
        (["first.0", "second.0", "last"], "relu", (4, 4, 4)),
    ],
)
def test_a_network_is_cut_as_late_as_can_be(
    layers: list[str], at: str, shape: tuple[int, ...]
) -> None:
    """Where one tensor alone passes; around a block two do."""
    whole = network()
    cut = cut_before(whole, layers, PROBE)
    assert cut.at == at
    assert cut.head(PROBE).shape == (len(PROBE), *shape)
    assert torch.equal(answers(cut, whole), whole(PROBE))


def test_what_comes_after_has_the_very_layers_of_a_network() -> None:
    """One that is changed later on, and one that is another's copy."""
    whole, other = network(), network()
    cut = cut_before(whole, ["second.0", "last"], PROBE)
    tail = cut.tail(other)
    other.get_parameter("last.weight").mul_(2.0)
    other.get_parameter("second.0.bias").add_(1.0)
    assert torch.equal(tail(cut.head(PROBE)), other(PROBE))
    assert not torch.equal(tail(cut.head(PROBE)), whole(PROBE))
    assert tail.get_submodule("last") is other.get_submodule("last")


class Deciding(Residual):
    """Go another way by what is seen, which no graph can show."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(images if images.mean() > 0 else -images)


class Reminded(Residual):
    """Look at the image once more at the end."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(images) + images.flatten(1)[:, :5]


class Widened(Residual):
    """Have far more features than an image has numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 100, 1)
        self.first = nn.Sequential(nn.Identity())
        self.second = nn.Sequential(nn.Conv2d(100, 100, 1))
        self.last = nn.Linear(6400, 5)


class InPlace(Residual):
    """Add to the features what comes after the cut."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        features = torch.relu(self.stem(images))
        features.add_(self.second(features))
        logits: Tensor = self.last(features.flatten(1))
        return logits


@pytest.mark.parametrize("kind", [Deciding, Reminded, Widened, InPlace])
def test_a_network_stays_whole(kind: type[nn.Module]) -> None:
    """Where no cut can be seen or made, where features take much room, or would not stay the same."""
    whole = network(kind)
    cut = cut_before(whole, ["second.0", "last"], PROBE)
    assert cut.at is None
    assert cut.tail(whole) is whole
    assert torch.equal(answers(cut, whole), whole(PROBE))


def test_nothing_comes_before_the_first_layer() -> None:
    """A network of which the first layer differs is run from the image on."""
    whole = network()
    assert cut_before(whole, ["stem", "last"], PROBE).at is None
