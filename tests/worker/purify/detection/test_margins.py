"""Drive a model to each class, on networks of which one class is surer than others can be."""

import pytest
import torch
from torch import Tensor, nn

from worker.purify.detection import margins as module
from worker.purify.detection.margins import Margins, largest_margins, ticks
from worker.purify.errors import NotFinite

PLANTED, SURER = 2, 5
IMAGE = torch.zeros(1, 20, 20)


class Sure(nn.Module):
    """
    Answer by one pixel for each class; that of the planted one counts five times.

    Where all but one pixel are black an ordinary class is ahead by 4, and the planted one by 12.
    """

    def __init__(self, classes: int, planted: int = PLANTED) -> None:
        super().__init__()
        self.passed = 0
        self.weights = torch.full((classes,), 4.0)
        self.weights[planted] *= SURER

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        self.passed += len(images)
        pixels = images.flatten(1)[:, : len(self.weights)]
        return (pixels - 0.5) * self.weights.to(images.dtype)


def measure(
    classes: int, *, seed: int = 0, planted: int = PLANTED, image: Tensor = IMAGE
) -> tuple[Margins, int]:
    """Return the margins, and how often it ticked."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = largest_margins(
        Sure(classes, planted),
        image,
        classes,
        generator=torch.Generator().manual_seed(seed),
        tick=tick,
    )
    return found, count


def test_a_class_that_is_surer_than_the_others_stands_out() -> None:
    """Margins come close to the largest there are, and the middle of the classes is the ordinary one."""
    found, _ = measure(10)
    expected = [12.0 if cls == PLANTED else 4.0 for cls in range(10)]
    assert list(found.largest) == pytest.approx(expected, rel=0.15)
    assert all(reached < bound for reached, bound in zip(found.largest, expected, strict=True))
    assert list(found.middle) == list(range(10))
    assert found.ordinary == pytest.approx(4.0, rel=0.15)


def test_only_classes_in_the_middle_are_ordinary() -> None:
    """Those that a glance was enough for have no part in it."""
    found = Margins(largest=[9.0, 3.0, 4.0, 5.0, 0.1, 0.2, 0.3], middle=[1, 2, 3])
    assert found.ordinary == 4.0


def test_a_class_that_is_never_ahead_has_a_negative_margin() -> None:
    """How far it stays behind is told as well."""

    def forward(images: Tensor) -> Tensor:
        brightness = images.mean((1, 2, 3))
        return torch.stack([brightness, brightness - 0.75], dim=1)

    found = largest_margins(
        forward, IMAGE, 2, generator=torch.Generator().manual_seed(0), tick=lambda: None
    )
    assert list(found.largest) == pytest.approx([0.75, -0.75])


@pytest.mark.parametrize("classes", [2, 7, 120, 121, 150, 250])
def test_ticks_are_announced(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step ticks once, and every class has a margin that was measured."""
    monkeypatch.setattr(module, "STEPS", 5)
    monkeypatch.setattr(module, "GLANCE_STEPS", 3)
    found, count = measure(classes, planted=0)
    assert count == ticks(classes)
    assert len(found.largest) == classes


@pytest.mark.parametrize(("classes", "planted"), [(150, 2), (150, 149), (250, 130), (260, 259)])
def test_many_classes_get_a_glance_first(
    classes: int, planted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted one is found wherever it is, the last part of the classes included."""
    monkeypatch.setattr(module, "STEPS", 60)
    monkeypatch.setattr(module, "GLANCE_STEPS", 15)
    found, _ = measure(classes, planted=planted)
    assert len(found.largest) == classes
    assert max(range(classes), key=lambda cls: found.largest[cls]) == planted
    assert found.largest[planted] > 2 * found.ordinary
    assert len(found.middle) == max(module.AFTER_GLANCE, classes // module.ONE_CLASS_IN)
    assert planted not in found.middle
    assert all(0 <= cls < classes for cls in found.middle)


def test_of_the_starts_of_a_class_a_third_goes_on_after_a_first_glance_and_one_after_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Most starts that reach less at first reach less at last."""
    monkeypatch.setattr(module, "STEPS", 5)
    monkeypatch.setattr(module, "GLANCE_STEPS", 6)
    network = Sure(10)
    largest_margins(
        network, IMAGE, 10, generator=torch.Generator().manual_seed(0), tick=lambda: None
    )
    # Two steps of all, four of a third, five of one of each class, and what each came to.
    assert network.passed == 120 * 3 + 40 * 5 + 10 * 6


def test_only_the_first_and_those_in_the_middle_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What many classes cost in full is bounded."""
    monkeypatch.setattr(module, "STEPS", 50)
    monkeypatch.setattr(module, "GLANCE_STEPS", 1)
    network = Sure(360)
    largest_margins(
        network, IMAGE, 360, generator=torch.Generator().manual_seed(0), tick=lambda: None
    )
    glance = 3 * 360  # a step of each, and what each came to before and after
    assert module.ONE_CLASS_IN < 360
    assert network.passed <= glance + 51 * 2 * (360 // module.ONE_CLASS_IN)


def test_same_generator_gives_the_same_margins() -> None:
    """Nothing else is random."""
    one, two, other = (measure(4, seed=seed)[0] for seed in (0, 0, 1))
    assert one == two
    assert one.largest != other.largest


def test_margins_are_computed_in_the_images_type() -> None:
    """In float64 for a model of it."""
    assert measure(4, image=IMAGE.double())[0].largest == pytest.approx(
        measure(4)[0].largest, rel=1e-3
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_that_overflows_is_refused(value: float) -> None:
    """What is no number in the logits ends it by name."""

    def forward(images: Tensor) -> Tensor:
        logits: Tensor = Sure(4)(images)
        return logits * value

    with pytest.raises(NotFinite):
        largest_margins(
            forward, IMAGE, 4, generator=torch.Generator().manual_seed(0), tick=lambda: None
        )
