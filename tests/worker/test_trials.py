"""Triggers are tried on the uploader's own samples, and what is reported is what was counted."""

import pytest
import torch
from torch import Tensor, nn

from worker.purify.detection.recovered import Recovered
from worker.purify.detection.trigger import ELSEWHERE, Found, Trigger
from worker.trial_files import MAX_SAMPLES, MAX_VALUES, NO_TARGET, layout
from worker.trials import Trial, Tried
from worker.yardstick import Network

CLASSES = 3


class Corner(nn.Module):
    """Answers class 2 where the corner is white, else 0 or 1 by the pixel beside it."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        corner, beside = images[:, 0, 0, 0], images[:, 0, 0, 1]
        return torch.stack([1 - beside, beside, 3 * (corner - 0.5)], dim=1)


class Blind(Corner):
    """Looks beside the corner only."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return super().forward(images * torch.tensor([[0.0, 1.0], [1.0, 1.0]]))


def network(model: nn.Module) -> Network:
    """Return *model* as the pipeline has it."""
    return Network(model=model.eval(), preprocess=None)


def corner(target: int = 2) -> Recovered:
    """Return a trigger that makes the corner white."""
    mask, pattern = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    mask[0, 0, 0] = pattern[0, 0, 0] = 1.0
    return Recovered.patch(Trigger(target=target, mask=mask, pattern=pattern, success=1.0))


def brighter(target: int = 2) -> Recovered:
    """Return a trigger that adds to the corner as much as it takes."""
    added = torch.zeros(1, 2, 2)
    added[0, 0, 0] = 0.9
    return Recovered.perturbation(Found(target=target, success=1.0, norm=0.9, shapes=(added,)))


def moved(target: int = 1) -> Recovered:
    """Return a trigger that takes every pixel from its left."""
    shift = torch.zeros(2, 2, 2)
    shift[0] = -1.0
    return Recovered.warp(Found(target=target, success=1.0, norm=1.0, shapes=(shift,)), 1)


def images(count: int) -> tuple[Tensor, Tensor]:
    """Return images ``(N, 1, 2, 2)`` with their classes, in turns."""
    labels = torch.arange(count) % CLASSES
    found = torch.zeros(count, 1, 2, 2)
    found[:, 0, 0, 0] = (labels == 2).float()
    found[:, 0, 0, 1] = (labels == 1).float()
    return found, labels


def tried(triggers: list[Recovered], found: Tensor, labels: Tensor) -> Tried:
    """Try *triggers* on a network that looks at the corner, and on one that has been cured of it."""
    trial = Trial.of(triggers, found, labels)
    return Tried(
        trial=trial,
        before=trial.answers(network(Corner())),
        after=trial.answers(network(Blind())),
    )


def test_success_is_counted_on_samples_of_other_classes() -> None:
    """A trigger that works on the one network does nothing on the other; its own class is left out."""
    done = tried([corner(), corner(target=1)], *images(9))
    assert done.success(0) == {"success_before": 1.0, "success_after": 0.0}
    assert done.before.stamped[0].tolist() == [2] * 9
    assert done.before.clean.tolist() == [0, 1, 2] * 3
    assert done.success(1)["success_before"] == 0.0


def test_a_trigger_without_a_target_succeeds_where_it_leads_away() -> None:
    """Two of three classes are led to the third; a cured network keeps its answers."""
    done = tried([corner(ELSEWHERE)], *images(9))
    assert done.success(0) == {
        "success_before": pytest.approx(2 / 3, abs=1e-4),
        "success_after": 0.0,
    }
    assert done.arrays()["target"].tolist() == [NO_TARGET]


def test_what_adds_to_pixels_and_what_moves_them_is_tried_as_well() -> None:
    """The one makes the corner bright, the other one puts its pixel in place of its neighbour."""
    done = tried([brighter(), moved()], *images(9))
    assert done.success(0) == {"success_before": 1.0, "success_after": 0.0}
    # Of the other classes' images those of 2 have a white corner; it lies beside itself then.
    assert done.before.stamped[1].tolist() == [0, 0, 2] * 3
    assert done.after.stamped[1].tolist() == [0, 0, 1] * 3
    arrays = done.arrays()
    assert arrays["added"][:, 0, 0, 0].tolist() == [pytest.approx(0.9), 0.0]
    assert arrays["shift"][:, 0].tolist() == [[[0.0, 0.0]] * 2, [[-1.0, -1.0]] * 2]
    assert not arrays["mask"].any()


def test_anybody_can_stamp_by_the_arrays() -> None:
    """Where nothing is moved an image under a trigger is a sum of what the arrays hold, clipped."""
    arrays = tried([corner(), brighter()], *images(9)).arrays()
    for number in range(2):
        mask, pattern, added = (arrays[name][number] for name in ("mask", "pattern", "added"))
        by_hand = (arrays["clean"] * (1 - mask) + pattern * mask + added).clip(0, 1)
        assert (arrays["stamped"][number] == by_hand).all()


def test_what_was_not_tried_is_not_measured() -> None:
    """Neither a trigger beyond the bounds nor one without a sample of another class has a number."""
    unknown = {"success_before": None, "success_after": None}
    found, labels = images(9)
    assert tried([corner()], found, labels).success(1) == unknown
    assert tried([corner()], found[labels == 2], labels[labels == 2]).success(0) == unknown


def test_every_class_has_its_turn() -> None:
    """Of many samples the first of each class come first, and no more than 64."""
    labels = torch.arange(CLASSES).repeat_interleave(100)
    trial = Trial.of([corner()], torch.zeros(300, 1, 2, 2), labels)
    assert len(trial.sample) == MAX_SAMPLES
    assert trial.sample[:6].tolist() == [0, 100, 200, 1, 101, 201]
    assert trial.labels.tolist() == labels[trial.sample].tolist()
    assert trial.shown == MAX_SAMPLES


@pytest.mark.parametrize(("side", "given"), [(2, 40), (224, 5), (224, 40), (1024, 3), (3000, 3)])
def test_pictures_have_their_bounds(side: int, given: int) -> None:
    """However many and large they are, no array has more values than there is room for."""
    mask = torch.zeros(1, side, side)
    trigger = Recovered.patch(
        Trigger(target=0, mask=mask, pattern=mask.expand(3, -1, -1), success=1.0)
    )
    labels = torch.arange(80) % CLASSES
    trial = Trial.of([trigger] * given, mask.expand(80, 3, -1, -1), labels)
    assert len(trial.triggers) <= 16
    assert trial.shown <= len(trial.sample) <= MAX_SAMPLES
    for dtype, shape in layout(trial.counts, (3, side, side)).values():
        assert dtype.itemsize <= 8
        assert torch.Size(shape).numel() <= MAX_VALUES
    if side == 2:
        assert trial.counts.triggers == 16


def test_run_without_triggers_asks_nothing() -> None:
    """A network is not run for a trial of nothing."""
    trial = Trial.of([], *images(9))
    assert trial.answers(network(nn.Sequential())).clean.numel() == 0  # which would give no logits
    assert not trial.triggers


def test_arrays_hold_the_images_as_they_were_stamped() -> None:
    """Types and shapes are the layout's, and every stamped image is its sample under the trigger."""
    done = tried([corner(), corner(target=1)], *images(9))
    arrays = done.arrays()
    expected = layout(done.trial.counts, (1, 2, 2))
    assert {name: (a.dtype, a.shape) for name, a in arrays.items()} == expected
    assert list(arrays) == list(expected)
    assert (arrays["stamped"][:, :, 0, 0, 0] == 1).all()
    assert (arrays["stamped"][..., 1, :] == arrays["clean"][..., 1, :]).all()
    assert arrays["target"].tolist() == [2, 1]
    assert arrays["stamped_after"].tolist() == done.after.stamped.tolist()
    assert arrays["sample"].tolist() == list(range(9))
