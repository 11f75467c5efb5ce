"""Law: copies are images of the same shape, class and range, drawn from the given generator."""

import pytest
import torch

from worker.purify.augmentation import (
    augment,
    mixed_in_pairs,
    pasted_in_pairs,
    shifted,
    some,
)


def test_copies_follow_the_originals() -> None:
    """N images become N * (1 + copies); the first N are the originals; labels repeat."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 8, 10, generator=generator)
    labels = torch.tensor([2, 0, 1])
    more, more_labels = augment(images, labels, copies=2, flip=True, generator=generator)
    assert more.shape == (9, 3, 8, 10)
    assert torch.equal(more[:3], images)
    assert more_labels.tolist() == [2, 0, 1] * 3
    assert more.min() >= 0
    assert more.max() <= 1
    assert not torch.equal(more[3:6], images)


def test_without_copies_nothing_changes() -> None:
    """augment(copies=0) is the identity."""
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    same, labels = augment(
        images, torch.tensor([0, 1]), copies=0, flip=True, generator=torch.Generator()
    )
    assert torch.equal(same, images)
    assert labels.tolist() == [0, 1]


def test_without_flip_left_stays_left() -> None:
    """A crop of a ramp that rises to the right still rises; with flip some copies fall."""
    ramp = torch.linspace(0, 1, 16).repeat(16, 1).reshape(1, 1, 16, 16)

    def rising(flip: bool) -> list[bool]:
        copies, _ = augment(
            ramp,
            torch.zeros(1, dtype=torch.int64),
            copies=20,
            flip=flip,
            generator=torch.Generator().manual_seed(0),
        )
        return (copies[1:, 0, 0, -1] >= copies[1:, 0, 0, 0]).tolist()

    assert all(rising(flip=False))
    assert not all(rising(flip=True))


def test_crops_are_uniform_in_area_from_a_twelfth_to_the_whole() -> None:
    """
    The spans of a ramp across and of one down tell a crop's sides, and so its share of the area.

    It is uniform from 0.08 to 1, but that a crop too long for the image is cut to its side, which
    only shows among the large ones.
    """
    side = 101
    across = torch.linspace(0, 1, side).repeat(side, 1)
    images, _ = augment(
        torch.stack([across, across.T]).unsqueeze(0).double(),
        torch.zeros(1, dtype=torch.int64),
        copies=1000,
        flip=False,
        generator=torch.Generator().manual_seed(0),
    )
    spans = torch.stack([image[..., -1, -1] - image[..., 0, 0] for image in images[1:]])
    shares = ((spans * (side - 1) + 1) / side).prod(dim=1)  # (1000,)
    assert shares.min() == pytest.approx(0.08, abs=0.005)
    assert 0.98 < shares.max() <= 1.0
    for limit in (0.2, 0.4, 0.6):
        part = (shares < limit).double().mean().item()
        assert part == pytest.approx((limit - 0.08) / 0.92, abs=0.05)


PLAIN = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 3, 16, 20) / 40


def test_mixed_images_are_at_least_half_themselves() -> None:
    """Each lies between itself and one other, and not always as near."""
    mixed = mixed_in_pairs(PLAIN, torch.Generator().manual_seed(0))
    assert bool((mixed == mixed[:, :1, :1, :1]).all())  # the same share of every pixel
    apart = (mixed - PLAIN)[:, 0, 0, 0].abs()
    assert float(apart.max()) <= 0.5
    assert len(set(apart.tolist())) > 30


def test_a_window_of_another_image_is_pasted_in() -> None:
    """It is a rectangle of that image's very pixels, between a quarter and three quarters a side."""
    pasted = pasted_in_pairs(PLAIN, torch.Generator().manual_seed(0))
    places = set()
    for image, own in zip(pasted, PLAIN, strict=True):
        changed = (image != own).all(dim=0)
        if not bool(changed.any()):
            continue  # it was its own partner
        rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
        assert int(changed.sum()) == len(rows) * len(columns)
        assert 4 <= len(rows) <= 12
        assert 5 <= len(columns) <= 15
        assert image[:, changed].unique().numel() == 1
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 10


def test_some_are_replaced_whole() -> None:
    """Each is one or the other, and there are many of both."""
    others = PLAIN + 1
    found = some(PLAIN, others, torch.Generator().manual_seed(0))
    kept = (found == PLAIN).flatten(1).all(dim=1)
    assert bool((kept | (found == others).flatten(1).all(dim=1)).all())
    assert 10 < int(kept.sum()) < 30


def test_shifts_are_by_whole_pixels_and_mirror_the_edge() -> None:
    """Every copy is a window of the image with its edges mirrored, an eighth away at most."""
    image = torch.arange(16 * 24).reshape(1, 1, 16, 24) / 1000
    copies, labels = shifted(
        image, torch.tensor([3]), copies=60, flip=False, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(copies[:1], image)
    assert labels.tolist() == [3] * 61
    padded = torch.nn.functional.pad(image, (3, 3, 2, 2), mode="reflect")
    windows = {
        tuple(padded[0, 0, top : top + 16, left : left + 24].flatten().tolist())
        for top in range(5)
        for left in range(7)
    }
    seen = {tuple(copy.flatten().tolist()) for copy in copies[1:]}
    assert seen <= windows
    assert len(seen) > 20


def test_shifts_of_one_pixel_images_are_these() -> None:
    """There is nothing to mirror."""
    image = torch.full((1, 1, 1, 1), 0.5)
    copies, _ = shifted(
        image, torch.zeros(1, dtype=torch.int64), copies=3, flip=True, generator=torch.Generator()
    )
    assert torch.equal(copies, image.expand(4, -1, -1, -1))


def test_shifts_are_mirrored_where_that_is_asked_for() -> None:
    """A ramp that rises to the right falls in about half of the copies."""
    ramp = torch.linspace(0, 1, 16).repeat(16, 1).reshape(1, 1, 16, 16)
    copies, _ = shifted(
        ramp,
        torch.zeros(1, dtype=torch.int64),
        copies=40,
        flip=True,
        generator=torch.Generator().manual_seed(0),
    )
    rising = (copies[1:, 0, 0, 10] > copies[1:, 0, 0, 5]).float().mean()
    assert 0.2 < float(rising) < 0.8
