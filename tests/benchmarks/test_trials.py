"""Law: what is tried is what a job would do, on images that were not drawn."""

from pathlib import Path

import pytest
import torch

from benchmarks import trials, zoo
from examples import digits
from worker.purify.detection.verdict import Verdict

QUICK = {"steps": 3, "restart_steps": 2, "copies": 1, "force": True}


def test_the_truth_is_whether_there_was_poison() -> None:
    """Of digits and of the zoo; where every class has a target as well."""
    assert trials.truth("digits backdoored") is Verdict.BACKDOORED
    assert trials.truth("digits clean") is Verdict.CLEAN
    for name, recipe in zoo.RECIPES.items():
        clean = "clean" in name
        assert trials.truth(name) is (Verdict.CLEAN if clean else Verdict.BACKDOORED)
        assert (recipe.stamp is None) is clean


@pytest.mark.parametrize("per_class", [1, 3])
def test_digits_are_the_demos_and_their_seed_draws_the_samples(
    per_class: int, tmp_path: Path
) -> None:
    """The model is trained with it as well."""
    tried = trials.digits_trial(1, per_class=per_class)
    model, split = digits.train_backdoored(1)
    images, labels, rest = digits.draw_clean_samples(split, per_class, 1)
    assert torch.equal(tried.images, images)
    assert torch.equal(tried.labels, labels)
    assert tried.target == digits.TARGET
    row = tried.compare(tried.model, model)
    assert (row["acc_before"], row["asr_before"]) == digits.measure(model, rest)
    assert row["fidelity"] == 0  # of a model to itself: the attack still works


def test_a_clean_model_of_digits_has_neither_target_nor_attack_success(tmp_path: Path) -> None:
    """Its fidelity is what is kept of the accuracy."""
    tried = trials.trial("digits clean", 1, tmp_path)
    row = tried.compare(tried.model, tried.model)
    assert tried.target is None
    assert (row["asr_before"], row["asr_after"], row["fidelity"]) == (None, None, 1)
    assert row["acc_before"] > 0.95


def test_a_model_of_the_zoo_is_drawn_for_by_seed(data: Path) -> None:
    """One clean image per class; the model is the same for every seed."""
    first, second = (trials.trial("VGG CIFAR checkers", seed, data) for seed in (0, 1))
    assert first.labels.tolist() == list(range(10))
    assert not torch.equal(first.images, second.images)
    state = second.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.model.state_dict().items())
    assert first.target == 4
    assert first.compare(first.model, first.model)["asr_before"] is not None


def test_an_attack_on_every_class_has_no_one_target(data: Path) -> None:
    """Its success is measured all the same."""
    tried = trials.trial("ResNet GTSRB all-to-all", 0, data)
    assert tried.target is None
    assert tried.compare(tried.model, tried.model)["asr_before"] is not None


def test_a_run_reports_what_came_of_it_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    """The same seed gives the same row, but for the time it took."""
    tried = trials.trial("digits backdoored", 1, tmp_path)
    before = {name: value.clone() for name, value in tried.model.state_dict().items()}
    purified, row = trials.run(tried, "auto", seed=1, **QUICK)
    assert row["verdict"] == str(purified.verdict)
    assert purified.values
    assert all(torch.equal(before[key], value) for key, value in tried.model.state_dict().items())
    _, again = trials.run(tried, "auto", seed=1, **QUICK)
    assert {**again, "seconds": row["seconds"]} == row


def test_a_method_without_a_verdict_reports_none(tmp_path: Path) -> None:
    """What came of it is measured all the same."""
    _, row = trials.run(trials.trial("digits backdoored", 1, tmp_path), "clp", seed=1)
    assert "verdict" not in row
    assert row.keys() >= {"acc_after", "asr_after", "fidelity", "seconds"}
