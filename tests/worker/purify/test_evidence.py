"""Judge by the norms of triggers."""

import pytest
import torch

from worker.purify.evidence import Verdict, anomaly_indices, judge, suspects
from worker.purify.trigger import Trigger


def triggers(*norms: float, success: float = 1.0) -> list[Trigger]:
    """Return one trigger per class with these norms."""
    return [
        Trigger(
            target=target,
            mask=torch.full((1, 10, 10), norm / 100),
            pattern=torch.zeros(3, 10, 10),
            success=success,
        )
        for target, norm in enumerate(norms)
    ]


def test_index_is_in_deviations_below_the_median() -> None:
    """(median - x) / (1.4826 MAD) of x = log2(norm), which are 4, 3, 5, 1, 6: median 4, MAD 1."""
    assert anomaly_indices([16, 8, 32, 2, 64]) == pytest.approx(
        [0, 1 / 1.4826, -1 / 1.4826, 3 / 1.4826, -2 / 1.4826]
    )


def test_equal_classes_have_no_outlier() -> None:
    """Where the MAD vanishes, ten percent is the unit; rounding makes nobody suspect."""
    assert anomaly_indices([5.0, 5.0, 5.0, 5.5]) == pytest.approx([0, 0, 0, -1])


@pytest.mark.parametrize(
    ("norms", "verdict"),
    [
        ((2, 13, 15, 14, 16, 12, 14, 13), Verdict.BACKDOORED),
        ((13.5, 14, 15, 14, 14, 15, 13.5, 14), Verdict.CLEAN),
        ((10.5, 13, 16, 13, 15, 12, 14, 17), Verdict.INCONCLUSIVE),
        ((2, 13, 15), Verdict.INCONCLUSIVE),
    ],
    ids=["one stands out", "none does", "one does a little", "too few classes to say"],
)
def test_verdict(norms: tuple[float, ...], verdict: Verdict) -> None:
    """A class that needs far less than the others is a backdoor; three classes prove nothing."""
    assert judge(triggers(*norms)) is verdict


def test_a_search_that_found_nothing_proves_nothing() -> None:
    """No success at all is not a clean model."""
    assert judge(triggers(13, 14, 15, 14, 14, success=0.0)) is Verdict.INCONCLUSIVE


def test_suspects_are_those_that_stand_out_nearly_as_far() -> None:
    """The first is always one; an innocent class just below the median never is."""
    far = triggers(2, 13, 15, 14, 16, 12, 14, 13)
    assert [trigger.target for trigger in suspects(far)] == [0]
    two = triggers(2, 3, 15, 14, 16, 14, 14, 13)
    assert [trigger.target for trigger in suspects(two)] == [0, 1]
    close = triggers(15, 13, 14, 15, 14)
    assert [trigger.target for trigger in suspects(close)] == [1]
