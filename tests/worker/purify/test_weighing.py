"""Estimate what a change costs and leaves, on networks of which both are known."""

import pytest
import torch
from torch import Tensor

from worker.purify.detection.trigger import ELSEWHERE
from worker.purify.weighing import LOSS_BY_FLIPS, UNCHANGED, Candidate, Stamped, Trials

# The logits are the pixels: three classes, a row each.
SURE, BORDERLINE, SUSPECT = [0.9, 0.1, 0.0], [0.6, 0.5, 0.0], [0.0, 0.1, 0.8]


def pixels(*rows: list[float]) -> Tensor:
    """Return images of three pixels."""
    return torch.tensor(rows).view(len(rows), 3, 1, 1)


def answers(images: Tensor) -> Tensor:
    """Return the pixels."""
    return images.flatten(1)


def trials(
    images: Tensor,
    leads: list[float],
    *,
    suspects: tuple[int, ...] = (2,),
    stamped: tuple[Stamped, ...] = (),
) -> Trials:
    """Return trials of a network that answered with the pixels."""
    return Trials(
        images=images,
        before=answers(images),
        leads=torch.tensor(leads),
        suspects=suspects,
        stamped=stamped,
    )


def test_the_network_itself_agrees_and_loses_nothing() -> None:
    """Nothing falls, and no lead is below 0."""
    assert trials(pixels(SURE, BORDERLINE), [0.8, 0.1]).agreement_and_loss(answers) == (1.0, 0.0)


def test_leads_of_the_samples_decide_what_a_fall_costs() -> None:
    """A fall of 0.2 takes those with a lead of 0.1, whatever images it was measured on."""

    def fallen(images: Tensor) -> Tensor:
        return answers(images) - torch.tensor([0.2, 0.0, 0.0])

    images = pixels(SURE, BORDERLINE)
    agreement, lost = trials(images, [0.8, 0.1], suspects=()).agreement_and_loss(fallen)
    assert agreement == 0.5
    assert lost == pytest.approx(min(1.0, LOSS_BY_FLIPS * 0.25))
    agreement, lost = trials(images, [0.8] * 9 + [0.1], suspects=()).agreement_and_loss(fallen)
    assert agreement == pytest.approx(0.9)
    assert lost == pytest.approx(LOSS_BY_FLIPS * 0.01)


def test_images_of_a_suspect_that_change_are_lost() -> None:
    """They are one class of three, and all of them go."""

    def without_the_suspect(images: Tensor) -> Tensor:
        return answers(images) * torch.tensor([1.0, 1.0, 0.0])

    images = pixels(*[SURE] * 19, SUSPECT)
    agreement, lost = trials(images, [0.5]).agreement_and_loss(without_the_suspect)
    assert agreement == pytest.approx(0.95)
    assert lost == pytest.approx(LOSS_BY_FLIPS * 0.05**2 + 1 / 3)


def stamped(bare: Tensor, images: Tensor, control: Tensor, *, stronger: bool) -> Stamped:
    """Return images that lead to class 2."""
    return Stamped(target=2, bare=bare, images=images, control=control, stronger=stronger)


@pytest.mark.parametrize(
    ("shift", "stronger", "residual"),
    [
        (0.0, False, 0.0),
        (0.2, False, 0.0),  # twice that is not enough
        (0.3, False, 0.5),  # twice that is, for the borderline one
        (0.3, True, 0.0),  # patches are taken as they are
        (0.7, True, 0.25),  # and their share is squared
        (2.0, True, 1.0),
    ],
)
def test_a_least_perturbation_counts_twice(shift: float, stronger: bool, residual: float) -> None:
    """A trigger is more than the least that suffices; variants of a patch are more than a trigger."""
    images = pixels([0.9, 0.0, 0.0], [0.6, 0.5, 0.1])
    there = images + torch.tensor([0.0, 0.0, shift]).view(3, 1, 1)
    tried = trials(images, [0.5], stamped=(stamped(images, there, images, stronger=stronger),))
    assert tried.residual(answers) == residual


def test_what_a_control_does_as_well_does_not_count() -> None:
    """Something random of the same size is no trigger; neither is what was the class already."""
    images = pixels(SURE, SUSPECT)
    there = images + torch.tensor([0.0, 0.0, 2.0]).view(3, 1, 1)
    alike = trials(images, [0.5], stamped=(stamped(images, there, there, stronger=False),))
    assert alike.residual(answers) == 0.0
    alone = trials(images, [0.5], stamped=(stamped(images, there, images, stronger=False),))
    assert alone.residual(answers) == 0.5
    assert trials(images, [0.5]).residual(answers) == 0.0


def test_the_score_is_fidelity_as_far_as_it_can_be_seen() -> None:
    """It falls with what is lost and with what is left."""

    def score(lost: float, residual: float) -> float:
        return Candidate(
            strength=1.0,
            overshoot=0.0,
            unlearned="everything",
            agreement=1.0,
            lost=lost,
            residual=residual,
            values={},
        ).score

    assert score(0.0, 0.0) == 1.0
    assert score(0.5, 0.5) == 0.25
    assert UNCHANGED.score == 0.0


def test_what_leads_elsewhere_is_left_where_it_leads_away() -> None:
    """Of four images two change their class, and of the controls one; the excess is squared."""
    images = pixels(SURE, SURE, BORDERLINE, SUSPECT)
    moved = pixels(SUSPECT, [0.1, 0.9, 0.0], BORDERLINE, SUSPECT)
    control = pixels(SURE, [0.1, 0.9, 0.0], BORDERLINE, SUSPECT)
    found = Stamped(target=ELSEWHERE, bare=images, images=moved, control=control, stronger=True)
    assert trials(images, [0.5], stamped=(found,)).residual(answers) == pytest.approx(0.25**2)
