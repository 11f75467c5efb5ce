"""Rewrite layers, held against regressions written out."""

import pytest
import torch
from torch import Tensor, nn

from worker.purify.cutting import Cut
from worker.purify.detection.trigger import ELSEWHERE
from worker.purify.rewriting import LEAST_COLUMNS, PROBE_IMAGES, Pairs, rewritable, rewritten


def inputs(images: Tensor) -> Tensor:
    """Take images as they are."""
    return images


def numbers(*shape: int, seed: int) -> Tensor:
    """Return normal float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rewrite(
    before: nn.Module, pairs: Pairs, layers: list[str], *, strength: float, ridge: float
) -> nn.Module:
    """Return the network as one strength has it."""
    (after,) = rewritten(before, inputs, pairs, layers, strengths=[strength], ridge=ridge)
    return after.model


def paired(clean: Tensor, stamped: Tensor, targets: Tensor | None = None) -> Pairs:
    """Return them as pairs; the targets are the first class if they do not matter."""
    targets = torch.zeros(len(clean), dtype=torch.int64) if targets is None else targets
    return Pairs(clean=clean, stamped=stamped, targets=targets)


def linear(width: int = 3) -> nn.Module:
    """Return a network of one linear layer on 1x2x3 images, or wider ones."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * width, 4)).double()


@pytest.mark.parametrize("width", [3, LEAST_COLUMNS])
def test_linear_layer_solves_the_ridge_regression(width: int) -> None:
    """The change is the minimiser, found here by least squares on stacked and weighted rows."""
    before, columns = linear(width), 2 * width + 1
    pairs = paired(numbers(9, 1, 2, width, seed=1), numbers(9, 1, 2, width, seed=2))
    strength, ridge = 0.3, 0.05
    after = rewrite(before, pairs, ["1"], strength=strength, ridge=ridge)

    def rows(images: Tensor) -> Tensor:
        return torch.cat([images.flatten(1), torch.ones(9, 1).double()], dim=1)

    clean, stamped = rows(pairs.clean), rows(pairs.stamped)
    inertia = (ridge * clean.square().sum() / columns) ** 0.5 * torch.eye(columns).double()
    system = torch.cat([clean, strength**0.5 * stamped, inertia])
    lack = before(pairs.clean) - before(pairs.stamped)
    aim = torch.cat([torch.zeros(9, 4), strength**0.5 * lack, torch.zeros(columns, 4)])
    change = torch.linalg.lstsq(system, aim.double()).solution.detach()
    found = {key: after.state_dict()[key] - tensor for key, tensor in before.state_dict().items()}
    torch.testing.assert_close(found["1.weight"], change[:-1].T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["1.bias"], change[-1], rtol=1e-6, atol=1e-9)


def test_convolution_is_a_regression_over_its_patches() -> None:
    """A convolution is changed as the linear layer on its unfolded inputs is."""
    torch.manual_seed(0)
    before = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False)).double()
    pairs = paired(numbers(4, 2, 6, 6, seed=1), numbers(4, 2, 6, 6, seed=2))
    after = rewrite(before, pairs, ["0"], strength=0.5, ridge=0.1)

    def rows(images: Tensor) -> Tensor:
        patches = nn.functional.unfold(images, 3, padding=1, stride=2)
        return patches.transpose(1, 2).reshape(-1, 18)

    clean, stamped = rows(pairs.clean), rows(pairs.stamped)
    weight = before.state_dict()["0.weight"].reshape(3, 18).T
    system = clean.T @ clean + 0.5 * stamped.T @ stamped
    system += 0.1 * clean.square().sum() / 18 * torch.eye(18)
    change = torch.linalg.solve(system, 0.5 * stamped.T @ (clean - stamped) @ weight)
    found = after.state_dict()["0.weight"].reshape(3, 18).T - weight
    torch.testing.assert_close(found, change, rtol=1e-6, atol=1e-9)


def test_a_direction_that_clean_images_do_not_use_is_taken_away_for_nothing() -> None:
    """A trigger of its own dimension stops to matter, and clean answers stay to 1e-4."""
    before = linear()
    clean = numbers(50, 1, 2, 3, seed=1)
    clean[:, 0, 1, 2] = 0.0
    stamped = clean.clone()
    stamped[:, 0, 1, 2] = 3.0
    pairs = paired(clean, stamped)
    after = rewrite(before, pairs, ["1"], strength=1.0, ridge=1e-8)
    assert float((before(stamped) - before(clean)).detach().abs().max()) > 0.1
    torch.testing.assert_close(after(stamped), before(clean), rtol=0, atol=1e-4)
    torch.testing.assert_close(after(clean), before(clean), rtol=0, atol=1e-4)


def test_same_images_ask_for_no_change() -> None:
    """Where stamping changes nothing there is nothing to rewrite."""
    before = linear()
    images = numbers(9, 1, 2, 3, seed=1)
    after = rewrite(before, paired(images, images), ["1"], strength=1, ridge=0.1)
    torch.testing.assert_close(after(images), before(images), rtol=0, atol=1e-12)


def test_each_strength_has_what_it_would_have_alone() -> None:
    """What several share does not show, and the network itself stays as it is."""
    torch.manual_seed(0)
    before = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    as_it_was = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    pairs = paired(numbers(9, 2, 6, 6, seed=1), numbers(9, 2, 6, 6, seed=2))
    layers = ["0", "2", "4"]
    together = rewritten(before, inputs, pairs, layers, strengths=[0.1, 1.0], ridge=0.1)
    for after, strength in zip(together, (0.1, 1.0), strict=True):
        alone = rewrite(before, pairs, layers, strength=strength, ridge=0.1)
        for name, tensor in alone.state_dict().items():
            assert torch.equal(tensor, after.model.state_dict()[name])
            assert not torch.equal(tensor, as_it_was[name])
    assert all(torch.equal(as_it_was[name], t) for name, t in before.state_dict().items())


def test_what_comes_before_the_layers_runs_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each image clean and stamped, however many strengths; and the results are what they were."""
    torch.manual_seed(0)
    before = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    pairs = paired(numbers(9, 2, 6, 6, seed=1), numbers(9, 2, 6, 6, seed=2))
    images_run = list[int]()
    before[0].register_forward_hook(lambda _, given, __: images_run.append(len(given[0])))

    def results() -> list[nn.Module]:
        given = (before, inputs, pairs, ["2", "4"])
        return [each.model for each in rewritten(*given, strengths=[0.1, 1.0], ridge=0.1)]

    once = results()
    assert sum(images_run) == 2 * len(pairs.clean) + 2 * PROBE_IMAGES  # to see where to cut
    whole = Cut(head=nn.Identity(), at=None)
    monkeypatch.setattr("worker.purify.rewriting.cut_before", lambda *_: whole)
    for after, expected in zip(once, results(), strict=True):
        for name, tensor in expected.state_dict().items():
            torch.testing.assert_close(after.state_dict()[name], tensor, rtol=1e-12, atol=1e-14)


def test_an_overshoot_aims_beyond_the_clean_answer() -> None:
    """
    Below it for the target, above it for the image's own class where none is the target.

    An image that is of the target's class keeps it. The minimiser is found by least squares.
    """
    before = linear()
    clean, stamped = numbers(60, 1, 2, 3, seed=1), numbers(60, 1, 2, 3, seed=2)
    answers = before(clean).detach()
    own = answers.argmax(1)
    targets = torch.arange(60) % 5 - 1  # ELSEWHERE, and four classes
    assert bool((own == targets).any())
    pairs = paired(clean, stamped, targets)
    strength, ridge = 0.3, 0.05
    plain, beyond = rewritten(
        before, inputs, pairs, ["1"], strengths=[strength], ridge=ridge, overshoots=(0.0, 2.0)
    )
    assert [(each.strength, each.overshoot) for each in (plain, beyond)] == [(0.3, 0.0), (0.3, 2.0)]

    step = 2 * answers.std(correction=0)
    aims = answers.clone()
    for row, (target, first) in enumerate(zip(targets.tolist(), own.tolist(), strict=True)):
        if target == ELSEWHERE:
            aims[row, first] += step
        elif target != first:
            aims[row, target] -= step

    def rows(images: Tensor) -> Tensor:
        return torch.cat([images.flatten(1), torch.ones(60, 1).double()], dim=1)

    inertia = (ridge * rows(clean).square().sum() / 7) ** 0.5 * torch.eye(7).double()
    system = torch.cat([rows(clean), strength**0.5 * rows(stamped), inertia])
    lack = strength**0.5 * (aims - before(stamped)).detach()
    aim = torch.cat([torch.zeros(60, 4), lack, torch.zeros(7, 4)])
    change = torch.linalg.lstsq(system, aim.double()).solution
    found = beyond.model.state_dict()["1.weight"] - before.state_dict()["1.weight"]
    torch.testing.assert_close(found, change[:-1].T, rtol=1e-6, atol=1e-9)
    alone = rewrite(before, pairs, ["1"], strength=strength, ridge=ridge)
    assert torch.equal(plain.model.state_dict()["1.weight"], alone.state_dict()["1.weight"])


def test_a_layer_that_gives_no_logits_is_not_driven_beyond() -> None:
    """There is one result for each strength then."""
    torch.manual_seed(0)
    before = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softplus()
    ).double()
    pairs = paired(numbers(9, 1, 4, 4, seed=1), numbers(9, 1, 4, 4, seed=2))
    found = rewritten(
        before, inputs, pairs, ["0"], strengths=[0.1, 1.0], ridge=0.1, overshoots=(0.0, 0.5)
    )
    assert [(each.strength, each.overshoot) for each in found] == [(0.1, 0.0), (1.0, 0.0)]


class Mixed(nn.Module):
    """Run layers of every kind, one of them twice, in another order than they are declared in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.one, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.other.weight = self.one.weight
        self.unused = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.twice(self.twice(self.grouped(self.first(images))))
        logits: Tensor = self.head(self.other(self.one(hidden)).mean((2, 3)))
        return logits


def test_rewritable_layers_run_once_and_share_nothing() -> None:
    """In the order in which they run; grouped, repeated, shared and unused ones are left out."""
    model = Mixed()
    assert rewritable(model, model, torch.rand(1, 1, 5, 5)) == ["first", "head"]
    assert not any(module._forward_hooks for module in model.modules())
