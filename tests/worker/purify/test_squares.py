"""Find the one square that a network answers to, among all that there are."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from worker.purify import squares as module
from worker.purify.errors import NotFinite
from worker.purify.squares import Squares, best_squares, still_leading, ticks
from worker.purify.trigger import ELSEWHERE

Forward = Callable[[Tensor], Tensor]
PLANTED, AHEAD = 2, 9.0
IMAGES = 0.1 + 0.8 * torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def answering_to(
    top: int, left: int, side: int, colour: tuple[float, ...], *, classes: int = 5
) -> Callable[[Tensor], Tensor]:
    """
    Return a network that is sure of one class where that very square lies, a pixel more not counting.

    Everywhere else it goes by single pixels, which no square moves far.
    """

    def forward(images: Tensor) -> Tensor:
        logits = images[:, 0].flatten(1)[:, :classes] / 10
        wanted = torch.tensor(colour).view(-1, 1, 1)
        around = images[:, :, max(0, top - 1) : top + side + 1, max(0, left - 1) : left + side + 1]
        inside = images[:, :, top : top + side, left : left + side] == wanted
        same = inside.all(dim=1).flatten(1)
        exact = (around == wanted).all(dim=1).flatten(1).sum(1) == side * side
        logits[:, PLANTED] += AHEAD * (same.all(dim=1) & exact)
        return logits

    return forward


def find(
    forward: Callable[[Tensor], Tensor], *, images: Tensor = IMAGES, classes: int = 5, seed: int = 0
) -> Squares:
    """Return the best squares, having counted the ticks."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    generator = torch.Generator().manual_seed(seed)
    found = best_squares(forward, images, classes, generator=generator, tick=tick)
    assert count == ticks(images[0], classes)
    return found


@pytest.mark.parametrize(
    ("top", "left", "side", "colour"),
    [
        (27, 27, 4, (1.0, 1.0, 1.0)),
        (0, 0, 5, (0.0, 0.0, 0.0)),
        (13, 1, 2, (1.0, 1.0, 0.0)),
        (31, 31, 1, (1.0, 0.0, 0.0)),
    ],
)
def test_the_very_square_is_found(
    top: int, left: int, side: int, colour: tuple[float, ...]
) -> None:
    """Its place, its side and its colour, whatever images there are; and no other class stands out."""
    found = find(answering_to(top, left, side, colour))
    trigger = found.triggers[PLANTED]
    mask = torch.zeros(1, 32, 32)
    mask[:, top : top + side, left : left + side] = 1
    assert torch.equal(trigger.mask, mask)
    assert (trigger.pattern[:, top, left]).tolist() == list(colour)
    assert (trigger.target, trigger.success) == (PLANTED, 1.0)
    assert found.margins[PLANTED] == pytest.approx(AHEAD, abs=0.2)
    assert found.index(PLANTED) > 4
    assert all(found.index(cls) < 1 for cls in range(5) if cls != PLANTED)


def bare(images: Tensor) -> Tensor:
    """Go by five pixels, of which no square covers two."""
    return images[:, 0, ::7, 0] * 4


def by_colour(images: Tensor) -> Tensor:
    """Go by the colour of one pixel."""
    towards = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    return (images[:, :, 0, 0] - 0.5) @ towards * 4


def sending_on(images: Tensor, own: Forward = bare) -> Tensor:
    """Give the next class where a square lies, and else what *own* gives."""
    attacked = answering_to(27, 27, 4, (1.0, 1.0, 1.0))
    is_triggered = attacked(images)[:, PLANTED, None] > AHEAD / 2
    return torch.where(is_triggered, 10 * own(images).roll(1, dims=1), own(images))


def test_a_square_that_sends_every_class_to_another_one_leads_to_all() -> None:
    """No class stands out by it; and in a network without one no square does so."""
    plain = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()  # wherever they are shifted to
    own = by_colour(alike).argmax(1)
    attacked = find(lambda images: sending_on(images, by_colour), images=alike)
    found = attacked.scattering
    assert (found.trigger.target, found.trigger.success) == (ELSEWHERE, 1.0)
    assert found.trigger.mask.nonzero().tolist() == [
        [0, row, column] for row in range(27, 31) for column in range(27, 31)
    ]
    shares = torch.bincount(own).float() / len(own)
    entropy = -torch.special.xlogy(shares, shares).sum()
    assert found.classes == pytest.approx(float(entropy.exp()), rel=1e-5)
    assert found.classes > 3
    assert found.alike == []
    assert all(attacked.index(cls) < 1 for cls in range(5))
    assert find(by_colour, images=alike).scattering.classes < found.classes / 2


@pytest.mark.parametrize("count", [2, 6, 24])
def test_a_few_images_are_shifted_to_see_how_many_classes_a_square_leads_to(count: int) -> None:
    """Two images can be led to two classes at most, and their shifts to more."""
    enough = 0.1 + 0.8 * torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, clean = (find(forward, images=enough).scattering for forward in (sending_on, bare))
    assert found.classes > 2
    assert found.trigger.success == 1.0
    assert clean.classes < found.classes / 2


def test_squares_that_scatter_alike_are_all_found() -> None:
    """A network that looks at four white pixels is led away by every white square that holds them."""
    plain = 0.9 * torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()

    def attacked(images: Tensor) -> Tensor:
        own = by_colour(images)
        is_white = (images[:, :, 20:22, 9:11] == 1).flatten(1).all(1, keepdim=True)
        return torch.where(is_white, 10 * own.roll(1, dims=1), own)

    found = find(attacked, images=alike).scattering
    triggers = [found.trigger, *found.alike]
    assert len({tuple(each.mask.flatten().tolist()) for each in triggers}) == len(triggers) > 4
    for trigger in triggers:
        assert (trigger.target, trigger.success) == (ELSEWHERE, 1.0)
        assert trigger.mask[0, 20:22, 9:11].all()
        assert trigger.pattern[:, 20, 9].tolist() == [1.0, 1.0, 1.0]


def test_what_hides_a_place_tells_nothing_if_anything_would() -> None:
    """Whatever covers a pixel there leads each class to another one, so no square is the trigger."""
    plain = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    alike = plain.expand(-1, -1, 32, 32).clone()

    def hiding(images: Tensor) -> Tensor:
        own = by_colour(images)
        is_seen = (images[:, :, 16, 16] == images[:, :, 0, 0]).all(dim=1, keepdim=True)
        return torch.where(is_seen, own, 10 * own.roll(1, dims=1))

    covered = alike.clone()
    covered[:, :, 16, 16] = 1.0
    assert (hiding(covered).argmax(1) != hiding(alike).argmax(1)).all()
    assert find(hiding, images=alike).scattering.classes == 0.0


def test_one_class_that_attracts_all_images_counts_as_one() -> None:
    """The square that leads there leads away as well, but to that class alone."""

    def attracting(images: Tensor) -> Tensor:
        return bare(images) + answering_to(27, 27, 4, (1.0, 1.0, 1.0))(images)

    found = find(attracting).scattering
    assert found.classes <= 1.0
    assert find(sending_on).scattering.classes > 2 * found.classes


def test_chequered_squares_are_tried_in_both_ways() -> None:
    """Of two neighbouring pixels one is black and one is white."""

    def forward(images: Tensor) -> Tensor:
        logits = torch.zeros(len(images), 4)
        corner = images[:, :, 6:8, 9:11]
        board = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        logits[:, 1] = AHEAD * (corner == board).all(dim=1).flatten(1).all(dim=1)
        return logits

    trigger = find(forward, classes=4).triggers[1]
    assert trigger.success == 1.0
    assert trigger.stamp(IMAGES)[0, 0, 6:8, 9:11].tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_grey_images_have_squares_of_two_colours() -> None:
    """One channel has white and black, and both boards."""
    images = IMAGES[:, :1]
    found = find(answering_to(4, 5, 3, (0.0,)), images=images)
    assert found.triggers[PLANTED].mask.sum() == 9
    assert len(module._grid(images[0]).kinds) == 4


def test_the_same_draw_gives_the_same_squares() -> None:
    """Chance lies in the generator alone, and none of torch's own is used."""
    before = torch.random.get_rng_state()
    first, second = (find(answering_to(27, 27, 4, (1.0, 1.0, 1.0)), seed=3) for _ in range(2))
    assert (first.margins, first.rises) == (second.margins, second.rises)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_square_that_still_leads_on_a_result_is_found_again() -> None:
    """On the network as it came it is the same one; where its effect is gone there is none."""
    forward = answering_to(27, 27, 4, (1.0, 1.0, 1.0))
    found, generator = find(forward), torch.Generator().manual_seed(0)
    again = still_leading(found, forward, IMAGES, PLANTED, generator=generator)
    assert again is not None
    assert torch.equal(again.mask, found.triggers[PLANTED].mask)
    assert (again.target, again.success) == (PLANTED, 1.0)

    def erased(images: Tensor) -> Tensor:
        logits = forward(images)
        logits[:, PLANTED] -= AHEAD
        return logits

    assert still_leading(found, erased, IMAGES, PLANTED, generator=generator) is None


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (32, 4096), (4096, 4096)])
def test_larger_images_have_no_more_squares(size: tuple[int, int]) -> None:
    """Places and sides grow with the image, so that it is as many forward passes."""
    assert len(module._grid(torch.zeros(3, 1, 1).expand(3, *size))) <= 1.2 * module.TRIED


def test_tiny_images_have_some() -> None:
    """A pixel is the least there is."""
    assert set(module._grid(torch.zeros(1, 8, 8)).places[:, 2].tolist()) == {1}


def test_of_many_classes_not_all_are_tried_on_many_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those that one image speaks for are, and as many in the middle."""
    monkeypatch.setattr(module, "MANY", 10)
    monkeypatch.setattr(module, "ALL_OF", 4)
    found = find(answering_to(27, 27, 4, (1.0, 1.0, 1.0), classes=30), classes=30)
    assert len(found.middle) == 4
    tried = [cls for cls in range(30) if found.margins[cls] > -math.inf]
    assert PLANTED in tried
    assert 4 <= len(tried) <= 8
    assert found.index(PLANTED) > 4


def test_a_network_of_one_class_is_refused() -> None:
    """There is no other one to get ahead of."""
    with pytest.raises(NotFinite):
        find(lambda images: images[:, 0, 0, :1], classes=1)


def test_answers_that_are_no_numbers_are_refused() -> None:
    """As everywhere."""
    with pytest.raises(NotFinite):
        find(lambda images: torch.full((len(images), 5), math.nan))
