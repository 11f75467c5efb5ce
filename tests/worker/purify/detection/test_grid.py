"""How many squares there are, and which are tried at once."""

import pytest
import torch
from torch import Tensor

from worker.purify.detection.grid import FEW, NOTHING, SIDES, STRIDE, TRIED, Grid, margins

SMALL = torch.zeros(3, 32, 32)


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (32, 4096), (4096, 4096)])
def test_larger_images_have_no_more_squares(size: tuple[int, int]) -> None:
    """Places and sides grow with the image, so that it is as many forward passes."""
    assert len(Grid.over(torch.zeros(3, 1, 1).expand(3, *size)).groups()) <= 1.2 * TRIED


def test_tiny_images_have_some() -> None:
    """A pixel is the least there is."""
    assert set(Grid.over(torch.zeros(1, 8, 8)).places[:, 2].tolist()) == {1}


def test_the_largest_squares_are_those_of_the_longest_side() -> None:
    """At the edge as well, where none is cut off."""
    grid = Grid.over(torch.zeros(1, 32, 32))
    each_place = torch.arange(0, len(grid), len(grid.kinds))
    largest = [grid.is_largest(mask) for mask in grid.masks(each_place)]
    assert largest == (grid.places[:, 2] == max(SIDES)).tolist()


@pytest.mark.parametrize("size", [(32, 32), (32, 50), (8, 8), (65, 40)])
def test_every_square_is_in_one_group(size: tuple[int, int]) -> None:
    """None is left out, at the edges neither, and those of a place follow each other in all kinds."""
    grid = Grid.over(torch.zeros(3, *size))
    groups = grid.groups()
    assert groups[groups != NOTHING].sort().values.tolist() == list(range(len(grid)))
    places = torch.where(groups == NOTHING, NOTHING, groups // len(grid.kinds))
    together = places.view(-1, len(grid.kinds), places.shape[1])
    assert (together == together[:, :1]).all()


def test_squares_of_a_group_are_alike_in_size_apart_and_of_different_kinds() -> None:
    """So what one of them does is not what another of the same does."""
    grid = Grid.over(SMALL)
    groups = grid.groups()
    assert groups.shape[1] == 4
    for group in groups[:: len(groups) // 97]:
        squares = group[group != NOTHING]
        assert len(set((squares % len(grid.kinds)).tolist())) == len(squares)
        masks = grid.masks(squares)
        sides = grid.places[squares // len(grid.kinds), 2]
        assert len(set(sides.tolist())) == 1
        assert float(masks.any(0).sum()) == len(squares) * float(sides[0]) ** 2
        assert float(masks.any(0).float().mean()) <= 0.1


def test_few_squares_are_tried_one_by_one() -> None:
    """There is little to spare, and on a tiny image they would be too near."""
    grid = Grid.over(torch.zeros(1, 8, 8))
    assert len(grid) <= FEW
    assert grid.groups().tolist() == [[number] for number in range(len(grid))]


@pytest.mark.parametrize(("size", "step"), [((32, 32), 1), ((64, 64), 2)])
def test_squares_whole_strides_away_are_like_it(size: tuple[int, int], step: int) -> None:
    """Of its kind and side, wherever both distances are multiples of a stride."""
    grid = Grid.over(torch.zeros(3, *size))
    number = 7 + len(grid.kinds) * int(
        (grid.places == torch.tensor([10 * step, 3 * step, 4 * step])).all(1).nonzero()
    )
    found = grid.steps_away(number)
    assert number in found.tolist()
    assert (found % len(grid.kinds) == 7).all()
    places = grid.places[found // len(grid.kinds)]
    tops = [step * top for top in range(2, 29, STRIDE)]
    lefts = [step * left for left in range(3, 29, STRIDE)]
    assert places.tolist() == [[top, left, 4 * step] for top in tops for left in lefts]


def test_several_squares_lie_on_an_image_at_once() -> None:
    """As if one after the other had been put there; nothing is put for those that fill up."""
    grid = Grid.over(SMALL)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = list[Tensor]()

    def forward(stamped: Tensor) -> Tensor:
        seen.append(stamped)
        return stamped.flatten(1)[:, :4]

    groups = torch.tensor([[5, 44_444, NOTHING], [20_001, 10_307, 32_109]])
    found = grid.margins_under(forward, images, torch.tensor([1, 0]), groups)
    expected = images[[1, 0]]
    for row, group in enumerate(groups.tolist()):
        for number in group:
            if number != NOTHING:
                expected[row] = grid.trigger(number, 0, 1.0).stamp(expected[row])
    assert torch.equal(seen[0], expected)
    assert torch.equal(found, margins(expected.flatten(1)[:, :4]))
