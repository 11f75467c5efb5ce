"""Law: the library does what the plain loop in ``naive_awm`` does, only faster."""

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from common.catalogue.architectures import ARCHITECTURES
from tests.worker.purify.naive_awm import NaiveAwm
from worker.architectures.registry import build
from worker.purify.awm import AdversarialWeightMasking, shuffled_batches
from worker.purify.mask_training import MaskTraining
from worker.purify.masking import MaskedModel
from worker.purify.perturbation import PerturbationSearch

Samples = tuple[Tensor, Tensor]


def plain_network() -> nn.Module:
    """Return a network without batch norm, with grouped and depthwise convolutions and dropout."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, stride=2),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1, groups=4, bias=False),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 4),
    )


def one_dimensional_network() -> nn.Module:
    """Return a network for signals ``(B, 3, L)``."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, padding=2),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(2),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def three_dimensional_network() -> nn.Module:
    """Return a network for volumes ``(B, 3, D, H, W)``."""
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def catalogued(name: str, **given: int) -> nn.Module:
    """Return a built-in network with four classes."""
    return build(name, ARCHITECTURES[name].arguments(classes=4, **given))


NETWORKS = {
    "small_cnn": lambda: catalogued("small_cnn", width=4),
    "small_vgg": lambda: catalogued("small_vgg", width=4, input_size=16),
    "resnet18_cifar": lambda: catalogued("resnet18_cifar", width=2),
    "preact_resnet18_cifar": lambda: catalogued("preact_resnet18_cifar", width=2),
    "without batch norm": plain_network,
    "one-dimensional": one_dimensional_network,
    "three-dimensional": three_dimensional_network,
}
SETTINGS = {
    "several images per class": {"tau": 20.0},
    "few images": {"batch_size": 100, "tau": 1.0, "gamma": 1e-2},
    "free beta": {"batch_size": 4, "alpha": 0.3, "beta": 0.5, "perturbation_lr": 1000.0},
    "no perturbed loss": {"alpha": 1.0},
    "shrinking, decaying, linear layers": {
        "shrink_epochs": 2,
        "mask_lr_decay": 0.7,
        "mask_linear": True,
    },
}


def network_and_samples(name: str) -> tuple[nn.Module, Samples]:
    """Return a network whose batch statistics are not the initial ones, and twelve images."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    shape = {"one-dimensional": (3, 16), "three-dimensional": (3, 4, 6, 6)}.get(name, (3, 16, 16))
    for _ in range(5):
        model(torch.rand(16, *shape))
    images = torch.rand(12, *shape, generator=torch.Generator().manual_seed(1))
    return model, (images, torch.arange(12) % 4)


@pytest.fixture
def perturbations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list to which every search adds what it found."""
    found: list[Tensor] = []
    run = PerturbationSearch.run

    def noted(search: PerturbationSearch, batches: Iterable[Tensor], *, tau: float) -> Tensor:
        found.append(run(search, batches, tau=tau))
        return found[-1]

    monkeypatch.setattr(PerturbationSearch, "run", noted)
    return found


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_whole_runs_agree_in_float64(
    name: str, setting: str, seed: int, perturbations: list[Tensor]
) -> None:
    """Every epoch's perturbation and the final masks are the naive loop's to 1e-6."""
    values = {"epochs": 3, "passes": 2, "batch_size": 5} | SETTINGS[setting]
    method = AdversarialWeightMasking(**values)  # type: ignore[arg-type]
    model, (images, labels) = network_and_samples(name)
    model, images = model.double(), images.double()
    naive = NaiveAwm(method, copy.deepcopy(model), images, labels)
    expected = list(naive.run(seed))

    masks = method.purify(model, images, labels, seed=seed).masks

    assert len(perturbations) == len(expected) == method.epochs
    for found, delta in zip(perturbations, expected, strict=True):
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)
    assert masks.keys() == naive.m.keys()
    assert any((mask < 1).any() for mask in masks.values())
    for key, mask in masks.items():
        torch.testing.assert_close(mask.double(), naive.m[key].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_single_step_agrees_in_float32(name: str) -> None:
    """From the same state, a step of the perturbation or of the masks is the same to 1e-4."""
    method = AdversarialWeightMasking(epochs=3, passes=2, batch_size=5, tau=20.0)
    model, (images, labels) = network_and_samples(name)
    naive = NaiveAwm(method, copy.deepcopy(model), images, labels)
    masked = method._masked(model, list(naive.m), images, preprocess=None)
    search = PerturbationSearch(masked, images, batch_size=5, lr=method.perturbation_lr)
    training = MaskTraining(
        masked,
        images,
        labels,
        batch_size=5,
        lr=method.mask_lr,
        alpha=method.alpha,
        beta=naive.beta,
        gamma=method.gamma,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(method.epochs):
        naive.delta.data.zero_()
        for batch in shuffled_batches(len(images), 5, 2, generator):
            search._answers.copy_(masked(images).argmax(dim=1))
            search._delta.copy_(naive.delta.detach())
            before = naive.delta.detach().clone()
            naive.ascend(batch)
            search._batch.copy_(batch)
            search._step()
            assert relative(search._delta - before, naive.delta.detach() - before) < 1e-4
        naive.cut()
        for batch in shuffled_batches(len(images), 5, 2, generator):
            take_over(masked, training, naive)
            naive.descend(batch)
            training.run([batch], delta=naive.delta.detach())
            assert masked.mask.grad is not None
            # As one vector: a layer with hardly any gradient is rounding alone on some processors.
            gradients = [mask.grad for mask in naive.m.values() if mask.grad is not None]
            found, expected = (
                torch.cat([gradient.flatten() for gradient in each])
                for each in (masked._views(masked.mask.grad), gradients)
            )
            assert relative(found, expected) < 1e-4
            for key, mask in masked.masks.items():
                torch.testing.assert_close(mask, naive.m[key].detach(), rtol=1e-4, atol=1e-6)


def take_over(masked: MaskedModel, training: MaskTraining, naive: NaiveAwm) -> None:
    """Bring the library's masks and optimiser into the state of the naive loop's."""
    for view, mask in zip(masked._views(masked.mask), naive.m.values(), strict=True):
        view.copy_(mask.detach())
    masked.update()
    states = [naive.optimiser.state[mask] for mask in naive.m.values()]
    if not states[0]:
        return  # before the first step of all
    state = training._optimiser.state[masked.mask]
    state["step"].copy_(states[0]["step"])
    for key in ("exp_avg", "exp_avg_sq"):
        for view, naive_state in zip(masked._views(state[key]), states, strict=True):
            view.copy_(naive_state[key])


def relative(found: Tensor, expected: Tensor | None) -> float:
    """Return how far *found* is from *expected*, in lengths of the latter."""
    assert expected is not None
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))
