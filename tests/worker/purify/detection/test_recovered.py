"""A trigger of any kind is what its family made of it, in one form."""

import math

import pytest
import torch
from torch import Tensor

from worker.purify.detection.families import Family, Patches, Perturbations, Warps, Waves
from worker.purify.detection.recovered import Kind, Recovered
from worker.purify.detection.trigger import Found, Trigger

IMAGES = torch.rand(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def found(family: Family) -> Found:
    """Return the first row of *family* as a search does."""
    norm = family.norms()[0].detach().item()
    return Found(target=2, success=0.9, norm=norm, shapes=tuple(each[0] for each in family.shapes))


def generator() -> torch.Generator:
    """Return a fresh one, so that all start alike."""
    return torch.Generator().manual_seed(1)


def patch() -> tuple[Family, Recovered]:
    """Return a random patch, and what is shown of it."""
    family = Patches.start(IMAGES, [0.0], generator())
    mask, pattern = (each[0] for each in family.shapes)
    trigger = Trigger(target=2, mask=mask, pattern=pattern, success=0.9)
    return family, Recovered.patch(trigger)


def perturbation() -> tuple[Family, Recovered]:
    """Return a random perturbation that is large enough to be clipped."""
    family = Perturbations(0.4 * torch.randn(1, 3, 6, 8, generator=generator()))
    return family, Recovered.perturbation(found(family))


def waves() -> tuple[Family, Recovered]:
    """Return random waves."""
    family = Waves(0.2 * torch.randn(1, 3, 6, 8, generator=generator()))
    return family, Recovered.perturbation(found(family))


def warp() -> tuple[Family, Recovered]:
    """Return a random warp of some pixels."""
    family = Warps(torch.randn(1, 2, 5, 5, generator=generator()), (6, 8))
    return family, Recovered.warp(found(family), 3)


KINDS = {
    Kind.PATCH: patch,
    Kind.PERTURBATION: perturbation,
    "waves": waves,
    Kind.WARP: warp,
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_stamps_images_as_its_family_does(kind: str) -> None:
    """Whatever its kind is; what it does not do to an image is nought."""
    family, recovered = KINDS[kind]()
    expected = family.stamp(IMAGES[None]).detach()[0]
    assert recovered.stamp(IMAGES) == pytest.approx(expected, abs=1e-6)
    assert not torch.equal(expected, IMAGES)
    assert (recovered.target, recovered.success) == (2, 0.9)
    idle: dict[Kind, tuple[Tensor, ...]] = {
        Kind.PATCH: (recovered.added, recovered.shift),
        Kind.PERTURBATION: (recovered.mask, recovered.shift),
        Kind.WARP: (recovered.mask, recovered.added),
    }
    assert not any(bool(each.any()) for each in idle[recovered.kind])
    assert recovered.mask.shape == (1, 6, 8)
    assert recovered.pattern.shape == recovered.added.shape == (3, 6, 8)
    assert recovered.shift.shape == (2, 6, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_its_norm_is_in_the_unit_of_its_kind(kind: str) -> None:
    """Of waves it is that of what they add, so that it can be held against other perturbations'."""
    family, recovered = KINDS[kind]()
    norm = family.norms() if kind != "waves" else family.shapes[0].square().sum().sqrt()
    assert recovered.norm == pytest.approx(norm.detach().item(), rel=1e-5)


def test_values_stay_within_their_bounds() -> None:
    """What would be beyond them does no more than what is at them."""
    added = torch.full((3, 6, 8), 3.0)
    plain = Recovered.perturbation(Found(target=0, success=1.0, norm=1.0, shapes=(added,)))
    assert torch.equal(plain.added, torch.ones(3, 6, 8))
    assert torch.equal(plain.stamp(IMAGES), torch.ones(4, 3, 6, 8))
    shift = torch.full((2, 6, 8), -math.inf)
    bent = Recovered.warp(Found(target=0, success=1.0, norm=1.0, shapes=(shift,)), 3)
    assert torch.equal(bent.shift, torch.full((2, 6, 8), -8.0))
    assert torch.equal(bent.stamp(IMAGES), IMAGES[:, :, :1, :1].expand(4, 3, 6, 8))
