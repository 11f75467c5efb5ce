"""How many squares there are."""

import pytest
import torch

from worker.purify.detection.grid import TRIED, Grid


@pytest.mark.parametrize("size", [(32, 32), (224, 224), (32, 4096), (4096, 4096)])
def test_larger_images_have_no_more_squares(size: tuple[int, int]) -> None:
    """Places and sides grow with the image, so that it is as many forward passes."""
    assert len(Grid.over(torch.zeros(3, 1, 1).expand(3, *size))) <= 1.2 * TRIED


def test_tiny_images_have_some() -> None:
    """A pixel is the least there is."""
    assert set(Grid.over(torch.zeros(1, 8, 8)).places[:, 2].tolist()) == {1}
