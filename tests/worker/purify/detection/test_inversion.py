"""Search triggers on networks whose smallest trigger is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from worker.purify.detection.families import Family, Patches, Perturbations, Warps
from worker.purify.detection.inversion import (
    COOLING,
    STEADY,
    Forward,
    Inversion,
    Pace,
    pace_for,
)
from worker.purify.detection.trigger import SUCCESS, Found, Trigger
from worker.purify.errors import NotFinite

IMAGES = 0.6 * torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 2


class OnePixel(nn.Module):
    """Answer 2 where the pixel (5, 6) is nearly white, by its brightness; otherwise 0 or 1."""

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for four classes; the last one needs half of the image to be white."""
        lit = 20 * (images[:, 0, 5, 6] - 0.8)
        half = 40 * (images.mean((1, 2, 3)) - 0.7)
        zero = torch.zeros_like(lit)
        return torch.stack([zero, zero + 0.1, lit, half], dim=1)


def patches(rows: int, generator: torch.Generator) -> Family:
    """Return masks that start a little closed."""
    return Patches.start(IMAGES, [-1.0] * rows, generator)


def perturbations(rows: int, generator: torch.Generator) -> Family:
    """Return faint perturbations."""
    return Perturbations.start(IMAGES, rows, generator)


def warps(rows: int, generator: torch.Generator) -> Family:
    """Return slight warps."""
    return Warps.start(IMAGES, rows, generator)


START = {"patches": patches, "perturbations": perturbations, "warps": warps}
every_family = pytest.mark.parametrize("family", START)


def inversion(
    targets: list[int],
    *,
    seed: int = 0,
    forward: Forward | None = None,
    family: str = "patches",
    success: float = SUCCESS,
) -> Inversion:
    """Return searches on that network, or on another."""
    generator = torch.Generator().manual_seed(seed)
    return Inversion(
        OnePixel() if forward is None else forward,
        IMAGES,
        LABELS,
        targets,
        family=START[family](len(targets), generator),
        generator=generator,
        success=success,
    )


def search(
    targets: list[int], *, seed: int = 0, steps: int = 150, forward: Forward | None = None
) -> list[Trigger]:
    """Search and return what was found."""
    found = inversion(targets, seed=seed, forward=forward)
    found.run(steps, per_row=8, tick=lambda: None)
    return found.triggers()


def run(targets: list[int], steps: int, *, family: str, seed: int = 0) -> list[Found]:
    """Search in any family, and return what was found."""
    searches = inversion(targets, seed=seed, family=family)
    searches.run(steps, per_row=8, tick=lambda: None)
    return searches.found()


def test_a_trigger_of_one_pixel_is_found_where_it_is() -> None:
    """The mask falls everywhere else, and the class that needs half the image needs far more."""
    planted, large = search([2, 3])
    assert (planted.target, large.target) == (2, 3)
    assert planted.success == 1.0
    assert planted.norm < 2.5
    assert int(planted.mask.argmax()) == 5 * 8 + 6
    assert large.norm > 4 * planted.norm


def test_the_rate_falls_by_equal_factors_and_the_price_moves_in_haste() -> None:
    """What a search is given is what its optimiser does, and parts of it make up the whole."""
    rates, prices = list[float](), list[float]()
    searches = inversion([2])

    def note() -> None:
        rates.append(searches._adam.param_groups[0]["lr"] / Patches.rate)
        prices.append(float(searches._price))

    pace = Pace(first=4.0, last=0.25, haste=2.0)
    for start, end in ((0.0, 0.5), (0.5, 1.0)):
        searches.run(2, per_row=8, tick=note, pace=pace.between(start, end))
    assert rates == pytest.approx([4.0, 2.0, 1.0, 0.5])
    factors = [after / before for before, after in pairwise(prices)]
    assert all(
        factor == pytest.approx(1.05**2) or factor == pytest.approx(1.1**-2) for factor in factors
    )


@pytest.mark.parametrize(
    ("shape", "pace"), [((1, 8, 8), STEADY), ((3, 31, 32), STEADY), ((3, 32, 32), COOLING)]
)
def test_searches_on_small_images_do_not_cool(shape: tuple[int, ...], pace: Pace) -> None:
    """What is missed there in haste is not worth the seconds."""
    assert pace_for(torch.empty(shape)) is pace


def test_a_search_that_cools_finds_a_smaller_trigger_in_as_many_steps() -> None:
    """Large steps find the way, and small ones leave less than steps of one size do."""

    def norm(pace: Pace) -> float:
        searches = inversion([2])
        searches.run(60, per_row=8, tick=lambda: None, pace=pace)
        return searches.triggers()[0].norm

    assert norm(COOLING) < 0.5 * norm(STEADY)


def test_success_is_what_the_stamped_images_show() -> None:
    """A trigger stamps ``x(1 - m) + pm``, and its success is that on the images of other classes."""
    trigger = search([2])[0]
    stamped = trigger.stamp(IMAGES)
    expected = IMAGES * (1 - trigger.mask) + trigger.pattern * trigger.mask
    assert torch.equal(stamped, expected)
    answers = OnePixel()(stamped).argmax(dim=1)
    assert trigger.success == float((answers == 2).float().mean())


def test_a_class_nobody_can_be_sent_to_needs_every_pixel() -> None:
    """Without success a trigger's norm is the whole image, not that of a mask that does nothing."""
    sulking = search(
        [2],
        steps=5,
        forward=lambda images: OnePixel()(images) - torch.tensor([0.0, 0.0, 1e3, 1e3]),
    )[0]
    assert sulking.success == 0.0
    assert sulking.norm == 64.0


def test_an_image_of_the_class_itself_is_not_looked_at() -> None:
    """It has no part in the search for that class; and a class of all images has nothing to search on."""
    seen = list[Tensor]()

    def forward(images: Tensor) -> Tensor:
        seen.append(images)
        logits: Tensor = OnePixel()(images)
        return logits

    search = inversion([0, 2], forward=forward)
    search.run(1, per_row=len(IMAGES), tick=lambda: None)
    (looked_at,) = seen
    assert len(looked_at) == int((LABELS != 0).sum()) + len(IMAGES)
    seen.clear()
    alone = Inversion(
        forward,
        IMAGES,
        torch.zeros_like(LABELS),
        [0],
        family=patches(1, torch.Generator().manual_seed(0)),
        generator=torch.Generator().manual_seed(0),
    )
    alone.run(1, per_row=len(IMAGES), tick=lambda: None)
    assert seen == []
    (found,) = alone.found()
    assert (found.success, found.norm) == (0.0, math.inf)


def test_a_perturbation_is_found_that_is_as_small_as_can_be() -> None:
    """Only one pixel counts, and what is added to it is what the darkest of the images lacks."""
    found = run([2], 200, family="perturbations")[0]
    (delta,) = found.shapes
    lacks = 0.805 - float(IMAGES[:, 0, 5, 6].min())  # the class next to it has a logit of 0.1
    assert found.success >= SUCCESS
    assert found.norm == pytest.approx(float(delta.norm()), rel=1e-5)
    assert found.norm < 1.2 * lacks
    assert int(delta.abs().argmax()) == 5 * 8 + 6


def test_a_trigger_that_never_succeeds_has_no_end() -> None:
    """Whatever its numbers are, nobody is to take it for a small one; as a patch it is the image."""
    hopeless = inversion([3], family="warps")
    hopeless.run(2, per_row=8, tick=lambda: None)
    assert [(found.success, found.norm) for found in hopeless.found()] == [(0.0, math.inf)]


@every_family
@pytest.mark.parametrize("success", [0.7, 0.8])
def test_a_trigger_must_lead_as_many_images_as_are_asked_for(family: str, success: float) -> None:
    """Three of four are enough for one search and not for the other."""

    def leading_three_of_four(images: Tensor) -> Tensor:
        logits = images.mean((1, 2, 3))[:, None] * torch.zeros(3)
        led = torch.arange(len(images)) % 4 > 0
        return logits + torch.stack([~led, torch.zeros_like(led), led], dim=1).to(logits)

    searches = inversion([2], forward=leading_three_of_four, family=family, success=success)
    searches.run(1, per_row=8, tick=lambda: None)
    (found,) = searches.found()
    assert found.success == 0.75
    assert math.isfinite(found.norm) is (success <= 0.75)


@every_family
def test_same_generator_gives_the_same_triggers(family: str) -> None:
    """Nothing else is random."""
    one, two, other = (run([2], 5, family=family, seed=seed)[0] for seed in (0, 0, 1))
    assert all(torch.equal(*pair) for pair in zip(one.shapes, two.shapes, strict=True))
    assert not torch.equal(one.shapes[0], other.shapes[0])


def test_a_network_that_overflows_is_refused() -> None:
    """NaN in the logits ends the search by name."""
    with pytest.raises(NotFinite):
        search([2], steps=2, forward=lambda images: OnePixel()(images) * float("nan"))


@every_family
def test_rows_that_stay_go_on_as_if_the_others_had_never_been(family: str) -> None:
    """Without randomness in the choice of images, a row's way does not depend on its neighbours."""
    alone, narrowed = (inversion([2, 3, 2], family=family) for _ in range(2))
    for found in (alone, narrowed):
        found.run(20, per_row=8, tick=lambda: None)
    narrowed.narrow([2, 0])
    assert narrowed.targets == [2, 2]
    for found in (alone, narrowed):
        found.run(20, per_row=8, tick=lambda: None)
    for row, place in ((2, 0), (0, 1)):
        expected, trigger = alone.found()[row], narrowed.found()[place]
        assert trigger.success == expected.success
        torch.testing.assert_close(trigger.shapes, expected.shapes)
