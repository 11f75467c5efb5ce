"""Find the one square that a network answers to, among all that there are."""

import math

import pytest
import torch
from torch import Tensor

from tests.worker.purify.detection.planted_square import AHEAD, IMAGES, PLANTED, answering_to, find
from worker.purify.detection import squares as module
from worker.purify.detection.grid import Grid
from worker.purify.detection.squares import still_leading
from worker.purify.errors import NotFinite


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


def test_a_square_is_found_beside_others_that_lead_elsewhere() -> None:
    """Whichever lie on an image together, each is tried alone before it is named."""
    planted = answering_to(27, 27, 4, (1.0, 1.0, 1.0))
    another = answering_to(13, 13, 4, (0.0, 0.0, 0.0))

    def forward(images: Tensor) -> Tensor:
        return planted(images) + another(images).roll(1, dims=1)

    found = find(forward)
    for cls, corner in ((PLANTED, 27), (PLANTED + 1, 13)):
        assert found.triggers[cls].mask.nonzero()[0].tolist() == [0, corner, corner]
        assert found.triggers[cls].success == 1.0


@pytest.mark.parametrize(("top", "left"), [(19, 27), (27, 15), (3, 3)])
def test_where_a_network_answers_strides_away_as_well_both_squares_are_found(
    top: int, left: int
) -> None:
    """One of them is the best, and the other lies elsewhere; what leads to a class is both."""
    white = (1.0, 1.0, 1.0)
    here, there = answering_to(27, 27, 4, white), answering_to(top, left, 4, white)
    found = find(lambda images: torch.maximum(here(images), there(images)))
    squares = found.leading_to(PLANTED)
    assert squares[0] is found.triggers[PLANTED]
    corners = {tuple(each.mask.nonzero()[0].tolist()) for each in squares}
    assert corners == {(0, 27, 27), (0, top, left)}
    assert all((each.target, each.success) == (PLANTED, 1.0) for each in squares)
    assert len(found.leading_to(PLANTED + 1)) == 1


def test_a_piece_of_a_larger_trigger_has_none_elsewhere() -> None:
    """Every square in it leads as far; those that touch the best one tell nothing new."""

    def forward(images: Tensor) -> Tensor:
        logits = images[:, 0].flatten(1)[:, :5] / 10
        white = (images[:, :, 10:19, 10:19] == 1).all(1).flatten(1).sum(1)
        logits[:, PLANTED] += AHEAD * (white >= 20)
        return logits

    found = find(forward)
    assert found.triggers[PLANTED].mask[0, 10:19, 10:19].sum() >= 20
    assert found.leading_to(PLANTED) == [found.triggers[PLANTED]]


def test_a_network_runs_fewer_images_than_there_are_squares() -> None:
    """Several are tried at once."""
    images_run = 0

    def forward(images: Tensor) -> Tensor:
        nonlocal images_run
        images_run += len(images)
        return answering_to(27, 27, 4, (1.0, 1.0, 1.0))(images)

    find(forward)
    assert images_run < 0.8 * len(Grid.over(IMAGES[0]))


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
    assert len(Grid.over(images[0]).kinds) == 4


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
