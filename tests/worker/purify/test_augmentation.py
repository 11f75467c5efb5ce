"""Law: copies are images of the same shape, class and range, drawn from the given generator."""

import torch

from worker.purify.augmentation import augment


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
