"""Stamp images with what the signs of a backdoor call for."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worker.purify import arsenal as module
from worker.purify.arsenal import Arsenal, calls_for_patch, perturbed, warped
from worker.purify.detection.evidence import Sign, Suspect
from worker.purify.detection.trigger import ELSEWHERE, Found, Trigger

IMAGES = 0.2 + 0.6 * torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4


def forward(images: Tensor) -> Tensor:
    """Return logits for four classes: a brighter quarter of the image is its class."""
    halves = torch.cat([images[..., :4, :], images[..., 4:, :]], dim=1)  # (B, 2, 4, 8)
    quarters = [
        halves[:, row, :, 4 * column : 4 * column + 4] for row in (0, 1) for column in (0, 1)
    ]
    return 20 * torch.stack([quarter.mean((1, 2)) for quarter in quarters], dim=1)


def suspect(target: int, *signs: Sign) -> Suspect:
    """Return a class that stands out by these."""
    return Suspect(target=target, signs=frozenset(signs))


def patch(target: int) -> Trigger:
    """Return a white corner."""
    mask = torch.zeros(1, 8, 8)
    mask[:, :2, :2] = 1
    return Trigger(target=target, mask=mask, pattern=torch.ones(1, 8, 8), success=1.0)


def found(shape: Tensor, target: int = 1) -> Found:
    """Return what was found of that shape."""
    return Found(target=target, success=1.0, norm=1.0, shapes=(shape,))


def gather(*suspects: Suspect, at_once: int = 6) -> tuple[Arsenal, int]:
    """Return what is gathered for them, and the ticks."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    gathered = Arsenal.gather(
        forward,
        IMAGES,
        LABELS,
        suspects,
        [patch(each.target) for each in suspects],
        at_once=at_once,
        halves_at_once=2 * at_once,
        generator=torch.Generator().manual_seed(0),
        tick=tick,
    )
    return gathered, count


@pytest.mark.parametrize(
    ("signs", "kinds"),
    [
        ((), (True, False, False, False)),
        ((Sign.PATCH,), (True, True, False, False)),
        ((Sign.MARGIN,), (False, False, True, False)),
        ((Sign.WARP,), (False, False, False, True)),
        ((Sign.PATCH, Sign.WARP), (False, False, False, True)),
        ((Sign.MARGIN, Sign.WARP), (False, False, True, True)),
        ((Sign.MARGIN, Sign.PATCH), (True, True, False, False)),
        ((Sign.SQUARE, Sign.WARP), (True, False, False, True)),
        ((Sign.SQUARE, Sign.PATCH, Sign.WARP), (True, False, False, True)),
        ((Sign.SQUARE,), (True, False, False, False)),
        ((Sign.SQUARE, Sign.MARGIN), (True, True, False, False)),
    ],
)
def test_signs_call_for_what_is_gathered(
    signs: tuple[Sign, ...], kinds: tuple[bool, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Patches for who stands out by one or by nothing, warps for warps, waves for a margin alone.

    A patch says nothing where a warp leads there; elsewhere it calls for perturbations as well.
    """
    monkeypatch.setattr(module, "STEPS", 3)
    gathered, ticks = gather(suspect(1, *signs))
    assert ticks == 4 * 3
    found = gathered.patches, gathered.perturbations, gathered.waves, gathered.warps
    assert tuple(bool(kind) for kind in found) == kinds
    assert calls_for_patch([suspect(1, *signs)], 1) is kinds[0]
    assert not calls_for_patch([suspect(1, *signs)], 2)


def test_perturbations_that_are_gathered_lead_to_their_class() -> None:
    """Each is small and works on images that it was not made on; so do waves, and suspects share rows."""
    both, _ = gather(suspect(1, Sign.PATCH), suspect(2, Sign.PATCH))
    assert [each.target for each in both.perturbations] == [1, 2] * 3
    gathered, _ = gather(suspect(1, Sign.MARGIN), suspect(2, Sign.PATCH))
    assert [each.target for each in gathered.perturbations] == [2] * 6
    assert [each.target for each in gathered.waves] == [1] * 6
    for each in (*both.perturbations, *gathered.perturbations, *gathered.waves):
        assert math.isfinite(each.norm)
        answers = forward((IMAGES + 1.5 * each.shapes[0]).clamp(0, 1)).argmax(1)
        assert (answers == each.target).float().mean() > 0.8


def test_a_square_that_a_margin_comes_with_calls_for_halves_of_the_image() -> None:
    """It is a piece of what leads there: twice as many perturbations, each in half of the blocks."""
    gathered, _ = gather(suspect(1, Sign.SQUARE, Sign.MARGIN, Sign.PATCH), suspect(2, Sign.PATCH))
    assert [each.target for each in gathered.perturbations] == [2] * 6 + [1] * 12
    kept, held = gathered.split(6)
    assert [each.target for each in held.perturbations] == [2] * 1 + [1] * 2
    assert len(kept.perturbations) == 15
    touched = [
        int((each.shapes[0].unfold(1, 2, 2).unfold(2, 2, 2) != 0).flatten(3).any(3).sum())
        for each in gathered.perturbations
    ]
    assert touched == [16] * 6 + [8] * 12


def test_a_part_is_held_back_of_every_class() -> None:
    """One in so many, and together they are all; what cannot be parted is on both sides."""
    shapes = [found(torch.full((1, 8, 8), float(row)), target=row % 2) for row in range(10)]
    whole = Arsenal(patches=[patch(1)], perturbations=shapes, waves=shapes, warps=shapes[:1])
    kept, held = whole.split(5)
    assert [each.target for each in held.perturbations] == [0, 1]
    assert len(kept.perturbations) == 8
    assert (len(kept.patches), len(held.patches)) == (1, 0)
    assert kept.warps == held.warps == shapes[:1]
    assert (kept.waves, held.waves) == (kept.perturbations, held.perturbations)


def test_the_smallest_of_each_kind_and_class_is_shown_beside_every_patch() -> None:
    """Waves are held against other perturbations; what led nowhere is none of them."""

    def of(size: float, target: int, norm: float = 1.0) -> Found:
        return replace(found(size * torch.ones(1, 8, 8), target), norm=norm)

    shift = torch.ones(2, 8, 8)
    gathered = Arsenal(
        patches=[patch(1), patch(1)],
        perturbations=[of(0.3, 1), of(0.2, 1), of(0.1, 1, norm=math.inf), of(0.5, 2)],
        waves=[of(0.4, 2, norm=9.0)],
        warps=[replace(found(2 * shift), norm=2.0), found(shift)],
    )
    shown = gathered.recovered(channels=1)
    assert [(str(each.kind), each.target) for each in shown] == [
        ("patch", 1),
        ("patch", 1),
        ("perturbation", 1),
        ("perturbation", 2),
        ("warp", 1),
    ]
    assert [float(each.added.max()) for each in shown[2:4]] == pytest.approx([0.2, 0.4])
    assert torch.equal(shown[4].shift, shift)
    assert shown[4].added.shape == (1, 8, 8)


def test_images_take_the_kinds_in_turn() -> None:
    """Every image is under one, and the rest of it is as it was."""
    shift = torch.zeros(2, 8, 8)
    shift[0] = 1.0
    both = Arsenal(
        patches=[patch(1)], perturbations=[found(torch.full((1, 8, 8), 0.1))], warps=[found(shift)]
    )
    stamped, _ = both.stamp(forward, IMAGES, reach=0, generator=torch.Generator().manual_seed(0))
    changed = (stamped != IMAGES).flatten(2).sum(2)[:, 0]
    assert changed[0::3].max() <= 4
    assert changed[1::3].min() == 64
    difference = (stamped - IMAGES)[1::3]
    assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
    assert torch.equal(stamped[2::3, ..., -1], IMAGES[2::3, ..., -1])


def test_every_image_is_named_the_class_it_is_led_to() -> None:
    """Each kind here, and each of two of a kind, has its own."""
    bright, dark = torch.full((1, 8, 8), 0.1), torch.full((1, 8, 8), -0.1)
    still = torch.zeros(2, 8, 8)
    every = Arsenal(
        patches=[patch(0), patch(ELSEWHERE)],
        perturbations=[found(bright, target=1), found(dark, target=2)],
        warps=[found(still, target=3)],
    )
    grey = torch.full((60, 1, 8, 8), 0.5)
    stamped, targets = every.stamp(
        forward, grey, reach=0, generator=torch.Generator().manual_seed(0)
    )
    assert targets[0::3].tolist() == [0, ELSEWHERE] * 10
    added = (stamped - grey).mean((1, 2, 3))[1::3]
    assert torch.equal(targets[1::3], torch.where(added > 0, 1, 2))
    assert set(targets[1::3].tolist()) == {1, 2}
    assert set(targets[2::3].tolist()) == {3}


@pytest.mark.parametrize(
    ("signs", "of_three"),
    [((Sign.PATCH,), 2), ((Sign.SQUARE, Sign.PATCH), 2), ((Sign.PATCH, Sign.MARGIN), 1.5)],
)
def test_patches_take_two_turns_where_no_margin_speaks(
    signs: tuple[Sign, ...], of_three: float
) -> None:
    """Perturbations cost accuracy: they get a third of the images then, and half of them otherwise."""
    gathered, _ = gather(suspect(1, *signs))
    one = replace(gathered, patches=[patch(1)])
    images = IMAGES[:12]
    stamped, _ = one.stamp(forward, images, reach=0, generator=torch.Generator().manual_seed(0))
    changed = (stamped != images).flatten(2).sum(2)[:, 0]
    assert int((changed <= 4).sum()) == len(images) * of_three / 3


def test_waves_and_perturbations_take_one_turn() -> None:
    """Of one each: about half of the images are under either, at its size."""
    both = Arsenal(
        patches=[],
        perturbations=[found(torch.full((1, 8, 8), 0.1))],
        waves=[found(torch.full((1, 8, 8), -0.1))],
        warps=[],
    )
    grey = torch.full((200, 1, 8, 8), 0.5)
    stamped, _ = both.stamp(forward, grey, reach=0, generator=torch.Generator().manual_seed(0))
    added = (stamped - grey).mean((1, 2, 3))
    assert added.abs().min() >= 0.07 - 1e-6
    assert 0.4 < float((added > 0).float().mean()) < 0.6


def test_sizes_lie_about_what_was_found() -> None:
    """A perturbation is used at 0.7 to 1.5 times its size, a warp at 0.8 to 1.5."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((200, 1, 8, 8), 0.5)
    stamped, _ = perturbed(grey, [found(torch.full((1, 8, 8), 0.1))], generator)
    added = (stamped - 0.5).mean((1, 2, 3))
    assert added.min() >= 0.07 - 1e-6
    assert added.max() <= 0.15 + 1e-6
    assert added.max() - added.min() > 0.06
    ramp = torch.arange(8.0).expand(200, 1, 8, 8) / 8
    shift = torch.zeros(2, 8, 8)
    shift[0] = 1.0
    bent, _ = warped(ramp, [found(shift)], generator)
    moved = (bent - ramp)[..., 2] * 8
    assert moved.min() >= 0.8 - 1e-5
    assert moved.max() <= 1.5 + 1e-5
