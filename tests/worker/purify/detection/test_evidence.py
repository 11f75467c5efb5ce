"""Judge by squares, by the smallest patches and warps, and by the largest margins."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import pytest
import torch

from worker.purify.detection.evidence import (
    CARRIED_FROM,
    CUTS,
    MAX_SUSPECTS,
    NEARLY,
    ONE_TO_ONE,
    SCATTERING,
    WHOLE,
    Cut,
    Evidence,
    Reach,
    Sign,
    anomaly_index,
    has_told,
    judge,
    suspects,
)
from worker.purify.detection.grid import Grid
from worker.purify.detection.margins import Margins
from worker.purify.detection.scattering import Scattering
from worker.purify.detection.squares import Squares
from worker.purify.detection.trigger import ELSEWHERE, SUCCESS, Field, Trigger, Warped
from worker.purify.detection.verdict import Verdict

WORST = 2.0
PLAIN = (0.0,) * 8  # no class stands out
every_sign = pytest.mark.parametrize("sign", Sign)


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


def warped(*norms: float) -> Warped:
    """Return the smallest warps, all of which were searched."""
    return Warped(norms=norms, searched=range(len(norms)))


def scattering(classes: float) -> Scattering:
    """Return a square that leads to so many classes."""
    trigger = replace(field(16.0).triggers[0], target=ELSEWHERE)
    return Scattering(trigger=trigger, classes=classes)


def squares(*indices: float) -> Squares:
    """Return squares that raise an ordinary class by 10 logits, and each by so many doublings more."""
    return Squares(
        triggers=field(*(16.0,) * len(indices)).triggers,
        margins=[1.0] * len(indices),
        rises=[10 * 2**index for index in indices],
        middle=range(len(indices)),
        scattering=scattering(2.0),
        grid=Grid(places=torch.zeros(1, 3, dtype=torch.int64), kinds=torch.zeros(1, 3, 10, 10)),
        leading=torch.zeros(1, len(indices), dtype=torch.int64),
        elsewhere={},
    )


def evidence(
    **by_sign: Sequence[float],
) -> Evidence:
    """Return evidence in which classes have these indices; more than half of each are to be 0."""
    plain = (0.0,) * max(len(PLAIN), *map(len, by_sign.values())) if by_sign else PLAIN
    square, patch, margin, warp = (by_sign.get(sign, plain) for sign in Sign)
    margins = Margins(largest=[10 * 2**index for index in margin], middle=range(len(margin)))
    return Evidence(
        squares=squares(*square),
        field=field(*(16 * 2**-index for index in patch)),
        margins=margins,
        warps=warped(*(WORST * 2**-index for index in warp)),
        worst_warp=WORST,
    )


def by(sign: Sign, *indices: float) -> Evidence:
    """Return evidence of which one sign alone speaks, of the first classes."""
    return evidence(**{sign.value: (*indices, *PLAIN[len(indices) :])})


def scattered(found: Evidence, classes: float) -> Evidence:
    """Return evidence of which one square leads to so many classes."""
    return replace(found, squares=replace(found.squares, scattering=scattering(classes)))


def cut(sign: Sign) -> Cut:
    """Return from where on it speaks."""
    return CUTS[sign]


def test_a_square_that_leads_several_classes_to_the_same_one_does_not_speak() -> None:
    """It is taken for what hides a part of the image; classes that stand out are suspects as ever."""
    one_to_one = scattered(evidence(), 9.0)
    assert judge(one_to_one) is Verdict.BACKDOORED
    together = replace(one_to_one.squares.scattering, one_to_one=ONE_TO_ONE - 0.01)
    quiet = replace(one_to_one, squares=replace(one_to_one.squares, scattering=together))
    assert judge(quiet) is Verdict.CLEAN
    found = by(Sign.PATCH, cut(Sign.PATCH).backdoored_from)
    found = replace(found, squares=replace(found.squares, scattering=together))
    assert [each.target for each in suspects(found)] == [0]


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


@every_sign
def test_each_sign_has_an_index_of_its_own(sign: Sign) -> None:
    """A halved norm or shift and a doubled margin are 1 each, and say nothing by the other signs."""
    found = by(sign, 0.0, 1.0, 0.5)
    for other in Sign:
        indices = [found.index(other, cls) for cls in range(found.classes)]
        expected = (0.0, 1.0, 0.5, *PLAIN[3:]) if other is sign else PLAIN
        assert indices == pytest.approx(expected, abs=1e-6)


def test_ordinary_are_a_warp_that_was_searched_and_a_margin_in_the_middle() -> None:
    """Of many classes the margins of most were only glanced at, and no warp was searched."""
    found = Evidence(
        squares=squares(0, 0, 0, 0, 0),
        field=field(16, 16, 16, 16, 16),
        margins=Margins(largest=[32.0, 7.0, 8.0, 9.0, 0.5], middle=[1, 2, 3]),
        warps=Warped(norms=[0.5, 1.0, 2.0, 2.0, 2.0], searched=[0, 1, 2]),
        worst_warp=WORST,
    )
    assert [found.index(Sign.MARGIN, cls) for cls in (0, 2, 4)] == pytest.approx([2, 0, -4])
    assert [found.index(Sign.WARP, cls) for cls in (0, 1, 3)] == pytest.approx([1, 0, -1])


def test_a_class_that_is_never_ahead_has_a_finite_index() -> None:
    """It is far below the others; and where no class gets ahead there is nothing to stand out from."""
    behind = Margins(largest=[-5.0, 8.0, 8.0, 9.0], middle=range(4))
    plain = replace(evidence(), field=field(16, 16, 16, 16), warps=warped(*[WORST] * 4))
    some = replace(plain, margins=behind)
    assert math.isfinite(some.index(Sign.MARGIN, 0))
    assert some.index(Sign.MARGIN, 0) < -5
    none = replace(plain, margins=Margins(largest=[5.0, -1.0, -1.0, 0.0], middle=range(4)))
    assert [none.index(Sign.MARGIN, cls) for cls in range(4)] == [0.0] * 4


@every_sign
def test_any_sign_speaks_of_a_backdoor_and_a_little_of_one_is_inconclusive(sign: Sign) -> None:
    """The cuts are where they are said to be; between them nothing is."""
    from_here, below = cut(sign).backdoored_from, cut(sign).clean_below
    assert below < from_here
    assert judge(by(sign, from_here + 0.01)) is Verdict.BACKDOORED
    assert by(sign, from_here + 0.01).stands_out(sign, 0)
    for index in (from_here - 0.01, below + 0.01):
        assert judge(by(sign, index)) is Verdict.INCONCLUSIVE
        assert not by(sign, index).stands_out(sign, 0)
    assert judge(by(sign, below - 0.01)) is Verdict.CLEAN
    assert judge(by(sign, -3.0)) is Verdict.CLEAN  # a class that is hard to reach is no backdoor


def test_a_model_is_clean_only_where_all_signs_say_so() -> None:
    """One that stands out is enough for a backdoor, whatever the others say."""
    little = {sign.value: (cut(sign).clean_below - 0.05, *PLAIN[1:]) for sign in Sign}
    assert judge(evidence(**little)) is Verdict.CLEAN
    for sign in Sign:
        doubtful = (cut(sign).clean_below + 0.01, *PLAIN[1:])
        assert judge(evidence(**{**little, sign.value: doubtful})) is Verdict.INCONCLUSIVE
        clear = (cut(sign).backdoored_from + 0.01, *PLAIN[1:])
        assert judge(evidence(**{**little, sign.value: clear})) is Verdict.BACKDOORED


@every_sign
def test_few_classes_prove_nothing(sign: Sign) -> None:
    """There is hardly anybody to stand out from."""
    names = [each.value for each in Sign]
    three = {name: (3.0, 0.0, 0.0) if name == sign.value else PLAIN[:3] for name in names}
    assert judge(evidence(**three)) is Verdict.INCONCLUSIVE
    four = {name: (*indices, 0.0) for name, indices in three.items()}
    assert judge(evidence(**four)) is Verdict.BACKDOORED


def test_a_search_that_found_nothing_proves_nothing() -> None:
    """No success at all is not a clean model."""
    plain = evidence()
    failed = replace(plain, field=field(*(16.0,) * plain.classes, success=0.0))
    assert judge(failed) is Verdict.INCONCLUSIVE
    assert judge(plain) is Verdict.CLEAN


def test_a_suspect_has_the_signs_by_which_it_stands_out() -> None:
    """All of them, and no other one's."""
    everything = {sign.value: (cut(sign).backdoored_from + 1, *PLAIN[1:]) for sign in Sign}
    for left_out in (None, *Sign):
        given = {name: values for name, values in everything.items() if name != left_out}
        (found,) = suspects(evidence(**given))
        assert (found.target, found.signs) == (0, frozenset(set(Sign) - {left_out}))


def test_a_margin_speaks_before_a_patch() -> None:
    """Where they name different classes, that of the patch is left alone; a warp's is not."""
    margin = (0.0, 3.0, *PLAIN[2:])
    patch = (0.0, 0.0, 5.0, *PLAIN[3:])
    warp = (0.0, 0.0, 0.0, 4.0, *PLAIN[4:])
    assert targets(evidence(margin=margin, patch=patch)) == [1]
    assert targets(evidence(margin=margin, patch=patch, warp=warp)) == [1, 3]
    assert targets(evidence(patch=patch, warp=warp)) == [3]
    assert targets(evidence(patch=patch)) == [2]


def test_a_square_speaks_before_all_others() -> None:
    """What it names was tried and seen to lead there; the others are not asked."""
    square = (0.0, 0.0, 0.0, 0.0, 3.0, *PLAIN[5:])
    others = {sign.value: (9.0, *PLAIN[1:]) for sign in Sign if sign is not Sign.SQUARE}
    assert targets(evidence(square=square, **others)) == [4]


def test_a_square_that_leads_to_many_classes_speaks_and_names_none() -> None:
    """An attack on every class is the whole of it, whatever else some class stands out by."""
    for classes, verdict in (
        (SCATTERING.clean_below - 0.01, Verdict.CLEAN),
        (SCATTERING.clean_below, Verdict.INCONCLUSIVE),
        (SCATTERING.backdoored_from, Verdict.BACKDOORED),
    ):
        plain = scattered(evidence(), classes)
        assert judge(plain) is verdict
        assert bool(suspects(plain)) is (verdict is not Verdict.BACKDOORED)
    for sign in Sign:
        assert targets(by(sign, 0.0, 5.0)) == [1]
        assert targets(scattered(by(sign, 0.0, 5.0), SCATTERING.backdoored_from)) == []


def test_a_square_that_is_a_piece_of_something_speaks_after_margins() -> None:
    """It is one that drives its class nowhere near as far as something else does."""
    square, margin = (0.0, 3.0, *PLAIN[2:]), (0.0, 0.0, 2.0, *PLAIN[3:])
    found = evidence(square=square, margin=margin)
    assert targets(found) == [1]
    largest = found.margins.largest[1]
    for share, named in ((WHOLE * 1.01, [1]), (WHOLE * 0.99, [2])):
        margins = [share * largest] * found.classes
        piece = replace(found, squares=replace(found.squares, margins=margins))
        assert targets(piece) == named
        alone = replace(piece, margins=evidence().margins)
        assert targets(alone) == [1]


def test_a_patch_that_carries_over_stands_out_earlier() -> None:
    """From one halving on; below that, or where it does not carry over, its cut is what it is."""
    for index, share, out in (
        (CARRIED_FROM, SUCCESS, True),
        (CARRIED_FROM, SUCCESS - 0.01, False),
        (CARRIED_FROM - 0.01, 1.0, False),
        (cut(Sign.PATCH).backdoored_from + 0.01, 0.0, True),
    ):
        found = replace(by(Sign.PATCH, index + 1e-6), carried={0: share})
        assert found.stands_out(Sign.PATCH, 0) is out
        assert (judge(found) is Verdict.BACKDOORED) is out


def test_warps_that_were_not_searched_say_nothing() -> None:
    """Neither for a backdoor nor against one."""
    found = replace(by(Sign.SQUARE, 3.0), warps=None)
    assert {found.index(Sign.WARP, cls) for cls in range(found.classes)} == {0.0}
    assert judge(found) is Verdict.BACKDOORED


def test_a_square_that_leads_nowhere_is_no_sign() -> None:
    """However much further than others it drives a class: it is not ahead in the end."""
    far = squares(5.0, *PLAIN[1:])
    assert far.index(0) == pytest.approx(5)
    behind = replace(far, margins=[-0.1, *far.margins[1:]])
    assert behind.index(0) == 0


def targets(found: Evidence) -> list[int]:
    """Return the classes that are suspect."""
    return [suspect.target for suspect in suspects(found)]


def test_without_any_sign_the_smallest_patch_names_the_class() -> None:
    """So that there is something to unlearn where it is asked for; it has no sign."""
    (found,) = suspects(evidence(patch=(0.0, -0.1, 0.2, 0.1, *PLAIN[4:])))
    assert (found.target, found.signs) == (2, frozenset())
    almost = {sign.value: (cut(sign).backdoored_from - 0.01, *PLAIN[1:]) for sign in Sign}
    (first,) = suspects(evidence(**{**almost, "patch": (*PLAIN[:7], 0.1)}))
    assert (first.target, first.signs) == (7, frozenset())


@every_sign
def test_those_that_stand_out_nearly_as_far_are_suspect_as_well(sign: Sign) -> None:
    """The first of all first; those far behind it are not, though they stand out by themselves."""
    high = cut(sign).backdoored_from + 2 * NEARLY
    assert targets(by(sign, high - 0.9 * NEARLY, high)) == [1, 0]
    assert targets(by(sign, high - 1.1 * NEARLY, high)) == [1]
    # Neither are those that are near, but do not stand out by themselves.
    low = cut(sign).backdoored_from + 0.01
    assert targets(by(sign, low, low - 0.02)) == [0]


@every_sign
def test_no_more_than_three_are_suspect(sign: Sign) -> None:
    """To unlearn an innocent class costs accuracy."""
    high = cut(sign).backdoored_from + 1
    many = [high - 0.01 * cls for cls in range(5)]
    assert targets(by(sign, *many, 0, 0, 0, 0, 0, 0)) == list(range(MAX_SUSPECTS))


def test_a_class_that_is_named_twice_takes_one_place() -> None:
    """A class that two signs name does not keep another one from being suspect."""
    margin = (3.0, *PLAIN[1:])
    warp = (4.0, 3.95, 3.9, *PLAIN[3:])
    assert targets(evidence(margin=margin, warp=warp)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("side", "columns", "index", "reach"),
    [
        (5, [range(2, 7)], 2.0, Reach.SQUARE),  # the square itself
        (5, [range(1, 8)], 2.0, Reach.SQUARE),  # a pixel more on either side
        (5, [range(4, 10)], 2.0, Reach.PATCH),  # a third of it further away
        (5, [range(2, 11)], 2.0, Reach.PATCH),  # four pixels more
        (5, [range(2, 13)], 2.0, Reach.IMAGE),  # six, so that two of eleven are far away
        (5, [range(2, 7), range(14, 16)], 2.0, Reach.IMAGE),  # two of seven in another place
        (3, [range(4, 10)], 2.0, Reach.SQUARE),  # a larger square would have led there further
        (5, [range(4, 10)], 1.25, Reach.SQUARE),  # hardly smaller than another class's
    ],
)
def test_a_patch_beside_the_largest_square_speaks_of_a_larger_trigger(
    side: int, columns: Sequence[Iterable[int]], index: float, reach: Reach
) -> None:
    """The square is in the columns from 2 on then, and a piece of that trigger."""
    found = by(Sign.PATCH, index)
    square, patch = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    square[0, :side, 2 : 2 + side] = 1
    for column in chain(*columns):
        patch[0, 0, column] = 1
    patch *= found.field.triggers[0].norm / patch.sum()
    first = replace(found.squares.triggers[0], mask=square)
    grid = replace(found.squares.grid, places=torch.tensor([[0, 2, 5], [0, 2, 3]]))
    small = replace(found.field.triggers[0], mask=patch)
    seen = replace(
        found,
        squares=replace(found.squares, grid=grid, triggers=[first, *found.squares.triggers[1:]]),
        field=replace(found.field, triggers=[small, *found.field.triggers[1:]]),
    )
    assert seen.index(Sign.PATCH, 0) == pytest.approx(index)
    assert seen.reach(0) is reach


def test_a_class_is_known_by_a_whole_square_or_by_a_margin_and_another_sign() -> None:
    """Or where one square leads to all. One sign alone may be a by-product, or two of two classes."""
    stands_out = (0.0, 5.0, *(0.0,) * 6)
    another = (5.0, *(0.0,) * 7)
    assert has_told(evidence(margin=stands_out, patch=stands_out))
    assert not has_told(evidence(margin=stands_out))
    assert not has_told(evidence(patch=stands_out))
    assert not has_told(evidence(warp=stands_out, patch=stands_out))
    assert not has_told(evidence(margin=stands_out, patch=another))
    assert has_told(evidence(square=stands_out))
    piece = evidence(square=stands_out)
    piece = replace(piece, squares=replace(piece.squares, margins=[WHOLE * 10 / 2] * 8))
    assert not has_told(piece)
    assert has_told(replace(piece, margins=evidence(margin=stands_out).margins))
    assert has_told(scattered(evidence(), SCATTERING.backdoored_from))
