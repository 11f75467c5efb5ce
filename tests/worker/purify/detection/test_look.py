"""In which order signs are looked for, when again, and what is spared."""

import math
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from examples.digits import draw_clean_samples, train_clean
from tests.worker.purify.detection.planted_square import IMAGES, PLANTED, answering_to
from worker.purify.detection import search
from worker.purify.detection.evidence import CUTS, Cut, Evidence, Sign
from worker.purify.detection.inversion import Forward
from worker.purify.detection.look import OF, look, ticks
from worker.purify.detection.verdict import Verdict

LABELS = torch.zeros(len(IMAGES), dtype=torch.int64)
CLASSES = 5
NOTHING_PLANTED = answering_to(4, 4, 3, (2.0, 2.0, 2.0))  # no pixel is as bright

pytestmark = pytest.mark.usefixtures("short_searches")


def looked(forward: Forward, *, copies: int = 1) -> Evidence:
    """Return what is found with few steps, having counted the ticks."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    found = look(
        forward,
        IMAGES.repeat(copies, 1, 1, 1),
        LABELS.repeat(copies),
        CLASSES,
        steps=3,
        generator=torch.Generator().manual_seed(0),
        tick=tick,
    )
    assert 0 < count <= ticks(IMAGES[0], CLASSES, 3)
    return found


def test_no_warp_is_searched_where_a_square_has_told() -> None:
    """Nothing that it could find would name another class; elsewhere there is one for each."""
    told = looked(answering_to(4, 4, 3, (1.0, 1.0, 1.0)))
    assert told.stands_out(Sign.SQUARE, PLANTED)
    assert told.warps is None
    warps = looked(NOTHING_PLANTED).warps
    assert warps is not None
    assert len(warps.norms) == CLASSES


def test_no_warp_is_searched_where_two_signs_have_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are; the evidence that decides is that of the other searches."""
    asked = list[Evidence]()

    def told(found: Evidence) -> bool:
        asked.append(found)
        return True

    monkeypatch.setattr("worker.purify.detection.look.has_told", told)
    assert looked(NOTHING_PLANTED).warps is None
    assert [len(found.field.triggers) for found in asked] == [CLASSES]


def test_of_few_samples_doubtful_patches_are_tried_on_shifted_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those between their two cuts, all below the upper one here; of many samples none is."""
    monkeypatch.setattr("worker.purify.detection.look.CARRIED_FROM", -math.inf)
    found = looked(NOTHING_PLANTED)
    below = CUTS[Sign.PATCH].backdoored_from
    doubtful = {cls for cls in range(CLASSES) if found.index(Sign.PATCH, cls) < below}
    assert doubtful
    assert found.carried.keys() == doubtful
    assert all(0 <= share <= 1 for share in found.carried.values())
    assert not looked(NOTHING_PLANTED, copies=1 + OF // len(IMAGES)).carried


def test_where_it_is_doubtful_the_smaller_of_two_warps_and_patches_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first look is the same either way."""
    monkeypatch.setattr("worker.purify.detection.search.WARP_STEPS", 40)
    monkeypatch.setattr("worker.purify.detection.search.STEPS_AGAIN", 110)
    # Of so small an image no slighter one leads anywhere.
    monkeypatch.setattr("worker.purify.detection.search.worst_warp", lambda _: 4.0)
    model, split = train_clean(0)
    images, labels, _ = draw_clean_samples(split, 1, 0)

    cuts = {**CUTS, Sign.WARP: Cut(backdoored_from=1.4, clean_below=-math.inf)}
    monkeypatch.setattr("worker.purify.detection.evidence.CUTS", cuts)

    def norms(verdict: Verdict, seed: int) -> dict[str, list[float]]:
        monkeypatch.setattr("worker.purify.detection.look.judge", lambda _: verdict)
        generator = torch.Generator().manual_seed(seed)
        found = look(model, images, labels, 10, steps=30, generator=generator, tick=lambda: None)
        assert found.warps is not None
        return {
            "warp": list(found.warps.norms),
            "norm": [trigger.norm for trigger in found.field.triggers],
        }

    smaller = set[str]()
    for seed in range(4):  # in one of them a second look finds something, by any rounding
        once, twice = norms(Verdict.CLEAN, seed), norms(Verdict.INCONCLUSIVE, seed)
        for kind in ("warp", "norm"):
            assert all(map(operator.le, twice[kind], once[kind]))
            if twice[kind] != once[kind]:
                smaller.add(kind)
    assert smaller == {"warp", "norm"}


@pytest.mark.parametrize("doubtful", [None, Sign.PATCH, Sign.WARP])
def test_warps_are_searched_again_where_there_is_doubt(
    monkeypatch: pytest.MonkeyPatch, doubtful: Sign | None
) -> None:
    """Whatever is doubtful: a class that another sign leaves in doubt may be that of a warp."""
    far = {sign: Cut(backdoored_from=math.inf, clean_below=math.inf) for sign in Sign}
    near = {} if doubtful is None else {doubtful: replace(far[doubtful], clean_below=-math.inf)}
    monkeypatch.setattr("worker.purify.detection.evidence.CUTS", {**far, **near})
    searches = list[str]()

    def counted(name: str) -> Callable[..., object]:
        search_it = getattr(search, name)

        def searched(*args: object, **given: object) -> object:
            searches.append(name)
            return search_it(*args, **given)

        return searched

    for name in ("search_again", "smallest_warps", "smaller_warps"):
        monkeypatch.setattr(search, name, counted(name))
    looked(NOTHING_PLANTED)
    expected = {
        None: ["smallest_warps"],
        Sign.PATCH: ["smallest_warps", "search_again", "smaller_warps"],
        Sign.WARP: ["smallest_warps", "search_again", "smaller_warps"],
    }
    assert searches == expected[doubtful]
