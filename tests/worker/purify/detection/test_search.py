"""Search every class's smallest trigger, in full only where it matters."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from worker.purify.detection import search as module
from worker.purify.detection.inversion import Forward
from worker.purify.detection.search import (
    search,
    search_again,
    smaller_warps,
    smallest_warps,
    ticks,
    worst_warp,
)
from worker.purify.detection.trigger import Field, Trigger, Warped

PLANTED = 1
CLASSES = 12
IMAGES = 0.6 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12)


class Planted(nn.Module):
    """Answer the planted class where one pixel is white, others where many of a row are."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.passed = classes, 0

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; a class's row is its number modulo 8, all but the planted one's."""
        self.passed += len(images)
        rows = images[:, 0].mean(2)  # (B, 8)
        logits = 30 * (rows[:, torch.arange(self.classes) % 8] - 0.8)
        # Classes of the same row differ by a hair, so that each can be reached by the row's right half.
        logits = (
            logits
            + torch.arange(self.classes) * 0.01
            + 3 * images[:, 0, :, 4:].mean((1, 2))[:, None]
        )
        lit = 30 * (images[:, 0, 5, 6] - 0.7)
        return torch.cat([logits[:, :PLANTED], lit[:, None], logits[:, PLANTED + 1 :]], dim=1)


def look(classes: int = CLASSES, *, steps: int = 60, seed: int = 0) -> tuple[Field, Planted, int]:
    """Return what is found, the network, and how often the search ticked."""
    network, count = Planted(classes), 0

    def tick() -> None:
        nonlocal count
        count += 1

    field = search(
        network,
        IMAGES,
        LABELS % classes,
        classes,
        steps=steps,
        generator=torch.Generator().manual_seed(seed),
        tick=tick,
    )
    return field, network, count


def test_the_planted_class_is_the_smallest_and_not_in_the_middle() -> None:
    """Every class has a trigger, by class; the planted one needs about a pixel."""
    field, _, _ = look(steps=150)
    assert [trigger.target for trigger in field.triggers] == list(range(CLASSES))
    smallest = min(field.triggers, key=lambda trigger: trigger.norm)
    assert smallest.target == PLANTED
    assert smallest.norm < field.ordinary / 2
    assert PLANTED not in field.middle


@pytest.mark.parametrize("classes", [2, 3, 5, 12])
def test_ticks_are_announced(classes: int) -> None:
    """Each step ticks once, for any number of classes."""
    assert look(classes, steps=7)[2] == ticks(7, classes) == 7


@pytest.mark.parametrize(
    ("shape", "per_step"),
    [
        ((1, 8, 8), 192),
        ((1, 28, 28), 192),
        ((3, 28, 28), 125),
        ((3, 32, 32), 96),
        ((3, 64, 64), 96),
    ],
)
def test_of_small_images_a_step_takes_more(shape: tuple[int, ...], per_step: int) -> None:
    """What a step costs is about the same then, up to twice as many; each class has as many of them."""
    network = Planted(4)
    search(
        network,
        torch.zeros(100, *shape),
        torch.full((100,), 9),  # of none of the classes, so that each image counts for all
        4,
        steps=5,
        generator=torch.Generator().manual_seed(0),
        tick=lambda: None,
    )
    two_starts_each, one_each = 8, 4
    expected = sum(
        rows * (per_step // rows) * steps for rows, steps in ((two_starts_each, 2), (one_each, 3))
    )
    assert network.passed == expected


def test_many_classes_get_a_glance_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """More classes than go into one search are searched in parts, and only some stay."""
    monkeypatch.setattr(module, "AT_ONCE", 10)
    monkeypatch.setattr(module, "AFTER_GLANCE", 4)
    field, _, count = look(25, steps=30)
    assert count == ticks(30, 25) == 30 + 3 * module.GLANCE_STEPS
    assert len(field.triggers) == 25
    assert len(field.middle) == module.MIDDLE


def test_what_it_costs_does_not_grow_with_the_classes_squared() -> None:
    """Four times the classes cost at most six times as many images, beyond the fixed part."""
    few, many = look(25, steps=20)[1].passed, look(100, steps=20)[1].passed
    assert many < 6 * few


def test_another_look_never_finds_less() -> None:
    """Of two triggers the smaller counts; classes that were not looked at again stay as they were."""
    field, network, _ = look(steps=20)
    again = search_again(
        field,
        network,
        IMAGES,
        LABELS,
        steps=60,
        generator=torch.Generator().manual_seed(1),
        tick=lambda: None,
    )
    assert list(again.middle) == list(field.middle)
    assert all(
        new.norm <= old.norm for new, old in zip(again.triggers, field.triggers, strict=True)
    )
    assert again.triggers[PLANTED].norm < field.triggers[PLANTED].norm


def test_same_generator_gives_the_same_field() -> None:
    """Nothing else is random."""
    one, two, other = look(steps=9)[0], look(steps=9)[0], look(steps=9, seed=1)[0]
    assert torch.equal(one.triggers[0].mask, two.triggers[0].mask)
    assert not torch.equal(one.triggers[0].mask, other.triggers[0].mask)


# Bright to the right, by one value for each image, so that a shift along the width adds the same to all.
RAMPS = (0.04 * torch.arange(16.0)).expand(12, 1, 16, 16) + 0.01 * torch.arange(12).view(
    -1, 1, 1, 1
)


class Shifted(nn.Module):
    """Answer the planted class where the middle is as bright as half a pixel beside it, or the first."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        """Return logits; those of all other classes are out of reach."""
        slope = images[:, 0, 4:12, 4:12].mean((1, 2)) - images[:, 0, 8:, 0].mean(1)
        moved = 100 * (slope - 0.30 - 0.02)
        logits = torch.full((len(images), self.classes), -50.0).to(images)
        logits[:, 0] = 0.0
        return torch.cat([logits[:, :PLANTED], moved[:, None], logits[:, PLANTED + 1 :]], dim=1)


def patches(norms: Sequence[float]) -> Field:
    """Return a field of patches of these norms."""
    triggers = [
        Trigger(
            target=cls,
            mask=torch.full((1, 16, 16), norm / 256),
            pattern=torch.zeros(1, 16, 16),
            success=1.0,
        )
        for cls, norm in enumerate(norms)
    ]
    return Field(triggers=triggers, middle=range(len(norms)))


def warps(
    network: Forward, field: Field, *, images: Tensor = RAMPS, seed: int = 0
) -> tuple[Warped, int]:
    """Return the smallest warps, and how often the search ticked."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = smallest_warps(
        field,
        network,
        images,
        torch.zeros(12, dtype=torch.int64),
        generator=torch.Generator().manual_seed(seed),
        tick=tick,
    )
    return found, count


def test_a_class_that_a_slight_warp_leads_to_is_found() -> None:
    """Half a pixel is what it takes, and no other class is led to by any warp."""
    found, count = warps(Shifted(4), patches([9.0] * 4))
    norms = found.norms
    assert count == module.WARP_STEPS
    assert worst_warp(RAMPS) == 1.0
    assert 0.2 < norms[PLANTED] < 0.65
    assert [norms[cls] for cls in (2, 3)] == [1.0] * 2


@pytest.mark.parametrize(("immune", "is_found"), [(2, True), (9, False)])
def test_a_warp_may_fail_on_a_few_images(immune: int, is_found: bool) -> None:
    """The attack itself does; what leads to few of them is none."""
    # The second channel is plain, so that no warp changes it.
    marks = (torch.arange(12) < immune).float().view(-1, 1, 1, 1).expand(-1, 1, 16, 16)
    network = Shifted(4)

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = network(images)
        return logits - 100 * images[:, 1, :1, 0] * (torch.arange(4) == PLANTED)

    images = torch.cat([RAMPS, marks], dim=1)
    norm = warps(forward, patches([9.0] * 4), images=images)[0].norms[PLANTED]
    assert norm < 0.65 if is_found else norm == worst_warp(images)


@pytest.mark.parametrize(
    ("shape", "pixels"), [((1, 8, 8), 0.5), ((3, 32, 32), 2.0), ((3, 224, 96), 6.0)]
)
def test_the_worst_warp_grows_with_the_image(shape: tuple[int, ...], pixels: float) -> None:
    """A sixteenth of the shorter side."""
    assert worst_warp(torch.zeros(2, *shape)) == pixels


def test_of_many_classes_only_those_with_small_patches_are_bent_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And some in the middle; the others have the worst warp, even one that a warp would lead to."""
    monkeypatch.setattr(module, "FEW", 11)
    monkeypatch.setattr(module, "SOME", 3)
    monkeypatch.setattr(module, "WARP_STEPS", 120)
    sizes = [9.0 - 0.1 * cls for cls in range(12)]
    found, _ = warps(Shifted(12), patches(sizes))
    assert found.searched == [5, 6, 7, 9, 10, 11]
    assert found.norms == [1.0] * 12
    sizes[PLANTED] = 2.0
    found, _ = warps(Shifted(12), patches(sizes))
    assert PLANTED in found.searched
    assert found.norms[PLANTED] < 0.75
    assert [norm for cls, norm in enumerate(found.norms) if cls != PLANTED] == [1.0] * 11


@pytest.mark.parametrize(
    ("doubtful", "is_found"),
    [([PLANTED], True), ([3, PLANTED, 2], True), ([2, 3, 4, 5, PLANTED], False)],
)
def test_warps_to_doubtful_classes_are_searched_alone(
    doubtful: list[int], is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first few of them; the others keep what they had, as does one for which no smaller is found."""
    monkeypatch.setattr(module, "STEPS_AGAIN", 130)
    before, count = Warped(norms=[0.9] * 6, searched=range(6)), 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = smaller_warps(
        before,
        doubtful,
        Shifted(6),
        RAMPS,
        torch.zeros(12, dtype=torch.int64),
        generator=torch.Generator().manual_seed(0),
        tick=tick,
    )
    assert count == module.STEPS_AGAIN
    assert (found.norms[PLANTED] < 0.65) == is_found
    assert [norm for cls, norm in enumerate(found.norms) if cls != PLANTED] == [0.9] * 5
    assert found.searched == before.searched


def test_same_generator_gives_the_same_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is random."""
    monkeypatch.setattr(module, "WARP_STEPS", 60)
    one, two, other = (warps(Shifted(4), patches([9.0] * 4), seed=seed)[0] for seed in (0, 0, 1))
    assert one == two
    assert one != other
