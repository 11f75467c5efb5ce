"""Find out which class a small perturbation leads to, on networks of which that is known."""

import pytest
import torch
from torch import Tensor, nn

from worker.purify.detection.nearness import EACH, ORDINARY, nearness
from worker.purify.detection.trigger import Field, Trigger

IMAGES = torch.full((6, 1, 8, 8), 0.2)
LABELS = torch.zeros(6, dtype=torch.int64)
STEPS, PER_ROW = 300, 3


class Rows(nn.Module):
    """Answer by how bright each class's two rows are, but for 0, which is there from the start."""

    def __init__(self, near: float) -> None:
        super().__init__()
        self.weights = torch.tensor([4.0 * near, 4.0, 4.0, 4.0])
        self.passed = 0

    def forward(self, images: Tensor) -> Tensor:
        """Return logits for five classes."""
        self.passed += len(images)
        bright = images[:, 0].reshape(-1, 4, 16).mean(2)
        return torch.cat([torch.full_like(bright[:, :1], 2.0), bright * self.weights], dim=1)


def field(norms: list[float]) -> Field:
    """Return smallest patches of these norms."""
    triggers = [
        Trigger(target=cls, mask=torch.full((1, 8, 8), norm / 64), pattern=IMAGES[0], success=1.0)
        for cls, norm in enumerate(norms)
    ]
    return Field(triggers=triggers, middle=list(range(len(norms))))


def near(network: nn.Module, targets: list[int], among: Field) -> tuple[dict[int, float], int]:
    """Return what is found, and how often it ticked."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = nearness(
        network,
        IMAGES,
        LABELS,
        targets,
        among,
        steps=STEPS,
        per_row=PER_ROW,
        generator=torch.Generator().manual_seed(0),
        tick=tick,
    )
    return found, count


@pytest.mark.parametrize(("times", "halvings"), [(1.0, 0.0), (0.5 / 0.35, 1.0)])
def test_index_counts_how_often_an_ordinary_perturbation_is_halved(
    times: float, halvings: float
) -> None:
    """From 0.2 an ordinary class's rows must go to 0.5; where they count more, to 0.35."""
    found, ticks = near(Rows(times), [1], field([1.0] * 5))
    assert found == {1: pytest.approx(halvings, abs=0.1)}
    assert ticks == STEPS


def test_only_classes_in_the_middle_of_the_others_are_ordinary() -> None:
    """Nine, by the norm of their patches, of which each is searched once, and each target twice."""

    class Many(nn.Module):
        """Answer by two pixels of each class; nothing leads to those that are not in the middle."""

        passed = 0

        def forward(self, images: Tensor) -> Tensor:
            self.passed += len(images)
            logits = 4.0 * images.flatten(1)[:, :60].reshape(-1, 30, 2).mean(2)
            logits[:, 0] = 2.0
            logits[:, 1] *= 0.5 / 0.35
            logits[:, 3:11] -= 50.0
            logits[:, 20:] -= 50.0
            return logits

    network = Many()
    found, _ = near(network, [1, 2], field([float(cls) for cls in range(1, 31)]))
    assert found == {1: pytest.approx(1.0, abs=0.1), 2: pytest.approx(0.0, abs=0.1)}
    searched = STEPS * PER_ROW * (2 * EACH + ORDINARY)
    assert searched <= network.passed < searched + STEPS * PER_ROW


def test_there_is_no_index_without_other_classes() -> None:
    """Nor a search."""
    assert near(Rows(1.0), [0, 1, 2, 3, 4], field([1.0] * 5)) == ({}, 0)


def test_where_nothing_leads_to_an_ordinary_class_there_is_nothing_to_compare_with() -> None:
    """A class that nothing leads to has no index, and one that something leads to has 0."""

    class Deaf(Rows):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return torch.cat([logits[:, :2], logits[:, 2:] - 50.0], dim=1)

    found, _ = near(Deaf(1.0), [1, 2], field([1.0] * 5))
    assert found == {1: 0.0}
