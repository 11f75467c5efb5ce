"""Judge by the norms of triggers."""

import pytest
import torch

from worker.purify.evidence import Verdict, anomaly_index, judge, suspects
from worker.purify.trigger import Field, Trigger


def field(*norms: float, success: float = 1.0) -> Field:
    """Return one trigger per class with these norms; all classes are in the middle."""
    triggers = [
        Trigger(
            target=target,
            mask=torch.full((1, 10, 10), norm / 100),
            pattern=torch.zeros(3, 10, 10),
            success=success,
        )
        for target, norm in enumerate(norms)
    ]
    return Field(triggers=triggers, middle=range(len(norms)))


def test_index_counts_how_often_an_ordinary_norm_is_halved() -> None:
    """The ordinary norm is the median of the middle: 16 of 2, 8, 16, 32 and 64."""
    found = field(16, 8, 32, 2, 64)
    assert found.ordinary == pytest.approx(16)
    indices = [anomaly_index(trigger, found) for trigger in found.triggers]
    assert indices == pytest.approx([0, 1, -1, 3, -2])


def test_only_classes_in_the_middle_make_an_ordinary_norm() -> None:
    """Classes that were given up early, with norms that are too large, have no part in it."""
    found = field(2, 13, 14, 15, 90, 95, 99)
    middle = Field(triggers=found.triggers, middle=[1, 2, 3])
    assert middle.ordinary == pytest.approx(14)


@pytest.mark.parametrize(
    ("norms", "verdict"),
    [
        ((2, 13, 15, 14, 16, 12, 14, 13), Verdict.BACKDOORED),
        ((13.5, 14, 15, 14, 14, 15, 13.5, 14), Verdict.CLEAN),
        ((9, 10, 16, 13, 15, 12, 14, 17), Verdict.CLEAN),
        ((7, 13, 16, 13, 15, 12, 14, 17), Verdict.INCONCLUSIVE),
        ((2, 13, 15), Verdict.INCONCLUSIVE),
    ],
    ids=["one stands out", "none does", "two a little", "nearly half", "too few classes to say"],
)
def test_verdict(norms: tuple[float, ...], verdict: Verdict) -> None:
    """A class that needs less than half of the ordinary is a backdoor; three classes prove nothing."""
    assert judge(field(*norms)) is verdict


def test_a_search_that_found_nothing_proves_nothing() -> None:
    """No success at all is not a clean model."""
    assert judge(field(13, 14, 15, 14, 14, success=0.0)) is Verdict.INCONCLUSIVE


def test_suspects_are_those_that_stand_out_nearly_as_far() -> None:
    """The first is always one; another must be a suspect of its own, and nearly as small."""

    def targets(*norms: float) -> list[int]:
        return [trigger.target for trigger in suspects(field(*norms))]

    assert targets(2, 13, 15, 14, 16, 12, 14, 13) == [0]
    assert targets(2, 2.2, 15, 14, 16, 14, 14, 13) == [0, 1]
    assert targets(2, 3, 15, 14, 16, 14, 14, 13) == [0]
    assert targets(15, 13, 14, 13.1, 14) == [1]
