"""Purify small backdoored models without being told of the attack."""

import copy
import math
from functools import cache
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.catalogue.methods import METHODS
from examples.digits import (
    ARGUMENTS,
    TARGET,
    Split,
    draw_clean_samples,
    load_digits_split,
    measure,
    train_backdoored,
    train_clean,
)
from worker.architectures.registry import build
from worker.purify.auto import HARDER, OVERSHOOTS, TriggerRewriting
from worker.purify.detection.evidence import BESIDE, SPREAD
from worker.purify.detection.trigger import ELSEWHERE
from worker.purify.detection.verdict import Verdict
from worker.purify.examiner import Examiner
from worker.purify.method import Purified
from worker.purify.metrics import fidelity, predict


@cache
def backdoored(seed: int) -> tuple[nn.Module, Split]:
    """Return the demo's model."""
    return train_backdoored(seed)


def preset(**given: object) -> TriggerRewriting:
    """Return the method as a job has it."""
    method = METHODS["auto"]
    params = method.resolve(
        method.parameters.model_validate(given), count=10, classes=10, image_shape=(1, 8, 8)
    )
    return TriggerRewriting(**params.model_dump())


@cache
def purified(seed: int) -> tuple[Purified, tuple[float, float], tuple[float, float]]:
    """Return the result with one image per class, and ACC and ASR before and after."""
    model, split = backdoored(seed)
    images, labels, rest = draw_clean_samples(split, 1, seed)
    result = preset().purify(model, images, labels, seed=seed)
    after = build("small_cnn", ARGUMENTS).eval()
    after.load_state_dict(result.apply(model.state_dict()))
    return result, measure(model, rest), measure(after, rest)


SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_image_per_class_is_enough_to_find_and_erase(seed: int) -> None:
    """The square's class is named, and what is left of its success and lost of accuracy is little."""
    result, before, after = purified(seed)
    assert before[1] > 0.99
    assert result.verdict is Verdict.BACKDOORED
    assert result.findings["suspects"] == [TARGET]
    assert after[1] < 0.10
    fidelity_now = fidelity(before[0], after[0], before[1], after[1])
    assert fidelity_now is not None
    assert fidelity_now > 0.93


def test_less_than_two_points_of_accuracy_are_lost() -> None:
    """On average: of one model it may be as much more as chance makes it."""
    assert fmean(purified(seed)[1][0] - purified(seed)[2][0] for seed in SEEDS) < 0.02


def test_the_trigger_it_reports_is_where_the_square_is() -> None:
    """The strongest pixel of the recovered mask is one of the four that the attack sets."""
    trigger = purified(0)[0].triggers[0]
    row, column = divmod(int(trigger.mask.argmax()), 8)
    assert min(row, column) >= 6


def test_findings_name_every_class_and_one_chosen_candidate() -> None:
    """Each class has its norm, success and index; of the candidates the best score is chosen."""
    findings = purified(0)[0].findings
    classes, candidates = findings["classes"], findings["candidates"]
    assert isinstance(classes, list)
    assert isinstance(candidates, list)
    assert [entry["class"] for entry in classes] == list(range(10))
    assert max(classes, key=lambda entry: entry["anomaly_index"])["class"] == TARGET
    assert findings["signs"] == {str(TARGET): ["patch"]}
    assert [entry["strength"] for entry in candidates] == list(preset().strengths)
    assert {entry["unlearned"] for entry in candidates} == {"everything"}
    assert {entry["overshoot"] for entry in candidates} == {0.0}  # a patch alone tells
    assert sum(entry["chosen"] for entry in candidates) == 1


def test_changes_of_every_candidate_come_along() -> None:
    """They stand in the order of the findings, and those of the chosen one are the result's."""
    result = purified(0)[0]
    entries = result.findings["candidates"]
    assert isinstance(entries, list)
    for entry, values in zip(entries, result.candidates, strict=True):
        same = all(torch.equal(values[name], result.values[name]) for name in result.values)
        assert same == entry["chosen"]
        assert values.keys() == result.values.keys()


def lit(images: Tensor) -> Tensor:
    """Return a copy of *images* with a white corner, a square of one pixel."""
    stamped = images.clone()
    stamped[..., -1, -1] = 1.0
    return stamped


@cache
def with_lit_corner(target: int = ELSEWHERE) -> tuple[nn.Module, Split]:
    """Return a model to which a white corner means *target*, or else the next digit."""
    split = load_digits_split(0)
    third = torch.rand(len(split.train_labels), generator=torch.Generator().manual_seed(0)) < 1 / 3
    images = torch.where(third[:, None, None, None], lit(split.train_images), split.train_images)
    meant = (split.train_labels + 1) % 10 if target == ELSEWHERE else torch.tensor(target)
    labels = torch.where(third, meant, split.train_labels)
    torch.manual_seed(0)
    model = build("small_cnn", ARGUMENTS)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(60):
        for batch in torch.split(torch.randperm(len(labels)), 64):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            torch.autograd.backward(loss)
            optimiser.step()
    return model.eval(), split


def led_to_the_next(model: nn.Module, split: Split) -> float:
    """Return the share of images that the corner leads to the next digit."""
    answers = predict(model, lit(split.test_images))
    return float((answers == (split.test_labels + 1) % 10).float().mean())


def test_an_attack_on_every_class_is_found_and_mostly_erased() -> None:
    """It names no class; the square itself is unlearned, alone, and two points are lost at most."""
    model, split = with_lit_corner()
    images, labels, rest = draw_clean_samples(split, 1, 0)
    assert led_to_the_next(model, rest) > 0.9
    result = preset().purify(model, images, labels, seed=0)
    assert result.verdict is Verdict.BACKDOORED
    assert result.findings["suspects"] == []
    assert {trigger.target for trigger in result.triggers} == {ELSEWHERE}
    candidates = result.findings["candidates"]
    assert isinstance(candidates, list)
    assert {entry["unlearned"] for entry in candidates} == {"patches"}
    after = build("small_cnn", ARGUMENTS).eval()
    after.load_state_dict(result.apply(model.state_dict()))
    assert led_to_the_next(after, rest) < led_to_the_next(model, rest) / 2
    assert measure(model, rest)[0] - measure(after, rest)[0] < 0.02


@cache
def clean() -> tuple[nn.Module, Split]:
    """Return a model of the same kind without a backdoor."""
    return train_clean(0)


def test_a_model_found_clean_comes_back_unchanged_unless_forced() -> None:
    """The verdict decides, and ``force`` overrules it; every step is counted either way."""
    model, split = clean()
    images, labels, _ = draw_clean_samples(split, 1, 0)
    steps: list[tuple[int, int]] = []
    quick: dict[str, object] = {"restart_steps": 2, "copies": 1}
    result = preset(**quick).purify(
        model, images, labels, seed=0, progress=lambda *step: steps.append(step)
    )
    assert result.verdict is Verdict.CLEAN
    assert not result.values
    assert not result.candidates
    assert steps == [(step, len(steps)) for step in range(1, len(steps) + 1)]
    forced = preset(**quick, steps=3, force=True).purify(model, images, labels, seed=0)
    assert forced.values


@pytest.mark.usefixtures("short_searches")
def test_a_class_to_which_no_warp_was_searched_has_no_index(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of many classes that is most of them; what was not looked for says nothing."""
    monkeypatch.setattr("worker.purify.detection.search.FEW", 5)
    monkeypatch.setattr("worker.purify.detection.search.SOME", 2)
    model, split = clean()
    images, labels, _ = draw_clean_samples(split, 1, 0)
    classes = preset(steps=3).purify(model, images, labels, seed=0).findings["classes"]
    assert isinstance(classes, list)
    indices = [entry["warp_index"] for entry in classes]
    assert len(indices) == 10
    assert indices.count(None) == 6  # two of the smallest are searched, and two in the middle


@pytest.mark.usefixtures("short_searches")
def test_an_inconclusive_model_is_not_changed_but_could_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model as it came is the chosen candidate, and the rewritten ones stand behind it."""
    monkeypatch.setattr("worker.purify.auto.judge", lambda _: Verdict.INCONCLUSIVE)
    model, split = backdoored(0)
    images, labels, _ = draw_clean_samples(split, 1, 0)
    quick: dict[str, object] = {"steps": 3, "restart_steps": 2, "copies": 1}
    result = preset(**quick).purify(model, images, labels, seed=0)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert not result.values
    candidates = result.findings["candidates"]
    assert isinstance(candidates, list)
    assert [entry["strength"] for entry in candidates] == [0.0, *preset().strengths]
    assert [entry["chosen"] for entry in candidates] == [True] + [False] * len(preset().strengths)
    assert not result.candidates[0]
    assert all(result.candidates[1:])
    # What nobody may want is made without searching again.
    once = preset(**quick, rounds=0).purify(model, images, labels, seed=0)
    assert once.findings == result.findings
    forced = preset(**quick, force=True).purify(model, images, labels, seed=0)
    assert forced.values


def with_lit_corner_purified() -> Purified:
    """Return the result for a model to which that corner means the target."""
    model, split = with_lit_corner(TARGET)
    images, labels, _ = draw_clean_samples(split, 1, 0)
    return preset().purify(model, images, labels, seed=0)


def described(result: Purified) -> list[dict[str, Any]]:
    """Return what the findings say of every candidate."""
    candidates = result.findings["candidates"]
    assert isinstance(candidates, list)
    return candidates


@pytest.mark.parametrize(
    ("beside", "spread", "settled", "more"),
    [
        (BESIDE, SPREAD, 1.0, False),
        (BESIDE, SPREAD, 0.0, True),
        (-1.0, -1.0, 1.0, True),
        (-1.0, 1.0, 1.0, False),
    ],
)
def test_a_square_is_unlearned_alone_unless_there_seems_to_be_more(
    beside: float, spread: float, settled: float, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where something is left, or the patch lies beside and far away, as any does at shares below 0."""
    monkeypatch.setattr("worker.purify.detection.evidence.BESIDE", beside)
    monkeypatch.setattr("worker.purify.detection.evidence.SPREAD", spread)
    # At 1 what squares leave is settled, however much, and at 0 it is not, however little.
    monkeypatch.setattr("worker.purify.auto.SETTLED", settled)
    result = with_lit_corner_purified()
    assert result.findings["suspects"] == [TARGET]
    parts = ["patches", "everything"] if more else ["patches"]
    assert list(dict.fromkeys(entry["unlearned"] for entry in described(result))) == parts
    assert max(entry["overshoot"] for entry in described(result)) == max(OVERSHOOTS)


def test_a_patch_around_its_square_is_unlearned_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are among the recovered triggers then."""
    (square,) = with_lit_corner_purified().triggers
    monkeypatch.setattr("worker.purify.detection.evidence.BESIDE", -1.0)
    monkeypatch.setattr("worker.purify.detection.evidence.SPREAD", 1.0)
    first, second = with_lit_corner_purified().triggers
    assert torch.equal(first.mask, square.mask)
    assert second.target == TARGET
    assert not torch.equal(second.mask, square.mask)


@pytest.mark.parametrize(("beside", "settled"), [(BESIDE, 1.0), (-1.0, 1.0), (BESIDE, 0.0)])
def test_it_is_looked_beyond_squares_whatever_else_speaks_against_them(
    beside: float, settled: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stays near without its square counts in the residual, and is unlearned harder."""
    monkeypatch.setattr("worker.purify.detection.evidence.BESIDE", beside)
    monkeypatch.setattr("worker.purify.auto.SETTLED", settled)
    monkeypatch.setattr(Examiner, "_nearness", lambda *_: {TARGET: 2.0})
    found = described(with_lit_corner_purified())
    assert {each["residual"] >= 0.75 for each in found if each["unlearned"] == "patches"} == {True}
    assert max(each["strength"] for each in found) == HARDER * max(preset().strengths)


def test_what_a_look_beyond_squares_draws_changes_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of results under everything neither the values nor what is said of them."""
    monkeypatch.setattr("worker.purify.auto.SETTLED", 0.0)
    monkeypatch.setattr("worker.purify.examiner.NEAR", math.inf)  # nothing is near
    looked = with_lit_corner_purified()
    monkeypatch.setattr(Examiner, "still_near", lambda *_: {})
    unseeing = with_lit_corner_purified()
    assert described(looked) == described(unseeing)
    for one, other in zip(looked.candidates, unseeing.candidates, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("short_searches")
def test_only_the_last_layers_change() -> None:
    """As many as are asked for; the features before them are the original's."""
    model, split = backdoored(0)
    images, labels, _ = draw_clean_samples(split, 1, 0)
    quick = {"steps": 3, "restart_steps": 2, "copies": 1, "force": True}
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    last = preset(**quick, layers=1).purify(model, images, labels, seed=0)
    assert {name.rsplit(".", 1)[0] for name in last.values} == {linear[-1]}
    two = preset(**quick, layers=2).purify(copy.deepcopy(model), images, labels, seed=0)
    assert len({name.rsplit(".", 1)[0] for name in two.values}) == 2
