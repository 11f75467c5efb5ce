"""Take images through a network in parts."""

import pytest
import torch

from worker.purify.workpiece import at_once, in_parts


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 8, 8), 256), ((3, 32, 32), 128), ((3, 64, 64), 32), ((3, 224, 224), 16)],
)
def test_of_larger_images_fewer_go_through_a_network_at_once(
    shape: tuple[int, int, int], expected: int
) -> None:
    """A processor's cache holds what a network makes of so many; a GPU takes as many of any size."""
    assert at_once(torch.empty(1, *shape)) == expected
    assert at_once(torch.empty(1, *shape, device="meta")) == 256


@pytest.mark.parametrize("count", [1, 128, 300])
def test_parts_are_all_images_in_their_order(count: int) -> None:
    """The last part holds what is left."""
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parts = in_parts(images)
    assert torch.equal(torch.cat(parts), images)
    assert [len(part) for part in parts[:-1]] == [128] * (len(parts) - 1)
