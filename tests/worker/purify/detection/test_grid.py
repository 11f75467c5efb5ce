"""How many squares there are."""

import pytest
import torch

from worker.purify.detection.grid import SIDES, TRIED, Grid


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (32, 4096), (4096, 4096)])
def test_larger_images_have_no_more_squares(size: tuple[int, int]) -> None:
    """Places and sides grow with the image, so that it is as many forward passes."""
    assert len(Grid.over(torch.zeros(3, 1, 1).expand(3, *size))) <= 1.2 * TRIED


def test_tiny_images_have_some() -> None:
    """A pixel is the least there is."""
    assert set(Grid.over(torch.zeros(1, 8, 8)).places[:, 2].tolist()) == {1}


def test_the_largest_squares_are_those_of_the_longest_side() -> None:
    """At the edge as well, where none is cut off."""
    grid = Grid.over(torch.zeros(1, 32, 32))
    each_place = torch.arange(0, len(grid), len(grid.kinds))
    largest = [grid.is_largest(mask) for mask in grid.masks(each_place)]
    assert largest == (grid.places[:, 2] == max(SIDES)).tolist()
