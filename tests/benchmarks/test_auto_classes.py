"""One network that reads digits, as networks of ten to a thousand classes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import auto_classes, zoo
from benchmarks.auto_classes import RECIPES, TARGET, class_of, digits_of, drawn, read, trial
from common.catalogue.architectures import ARCHITECTURES
from worker.architectures.registry import build


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep an untrained network for every attack in place of a trained one."""
    monkeypatch.setattr(auto_classes, "FOLDER", tmp_path)
    torch.manual_seed(0)
    model = build("small_vgg", ARCHITECTURES["small_vgg"].arguments(classes=30)).eval()
    for attack in RECIPES:
        zoo.keep(tmp_path / f"{attack}.pt", lambda: model)
    return tmp_path


def test_digits_and_classes_are_told_from_each_other() -> None:
    """The first digit counts most, and those beyond the count do not."""
    assert digits_of(np.array([7, 40, 999]), 3).tolist() == [[0, 0, 7], [0, 4, 0], [9, 9, 9]]
    digits = np.array([[4, 0, 7]])
    assert [class_of(digits, count).tolist() for count in (1, 2, 3)] == [[4], [40], [407]]


def test_the_class_that_is_read_is_that_of_the_digits_that_are_read(folder: Path) -> None:
    """A larger network says what the ten outputs of each digit say."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.random((20, 3, 32, 32), np.float32))
    whole = build("small_vgg", ARCHITECTURES["small_vgg"].arguments(classes=30)).eval()
    whole.load_state_dict(torch.load(folder / "clean.pt", weights_only=True)["state_dict"])
    with torch.no_grad():
        digits = whole(images).view(-1, 3, 10).argmax(2).numpy()
        for count in (1, 2, 3):
            found = read("clean", count)(images)
            assert found.shape[1] == 10**count
            assert found.argmax(1).tolist() == class_of(digits, count).tolist()


def test_an_image_shows_its_digits_in_handwriting_of_one_part() -> None:
    """Another digit changes its own corner alone; the paper is light, and ink is dark."""
    digits = np.array([[1, 2, 3], [1, 2, 3]])
    one = drawn(digits, np.random.default_rng(0), part="test")
    other = drawn(digits, np.random.default_rng(0), part="train")
    assert one.shape == (2, 32, 32, 3)
    assert not np.array_equal(one, other)
    assert one[:, 16:, 16:].min() > one[:, :16, :16].min() + 50


@pytest.mark.parametrize("attack", RECIPES)
def test_a_trial_gives_a_sample_of_every_class_and_knows_the_target(
    attack: str, folder: Path
) -> None:
    """An attack on every class has none, and a clean network neither that nor a success."""
    assert folder.is_dir()
    tried = trial(attack, 2)
    assert tried.labels.tolist() == list(range(100))
    assert tried.images.shape == (100, 3, 32, 32)
    assert tried.target == (11 * TARGET if attack in ("checkers", "waves") else None)
    row = tried.compare(tried.model, tried.model)
    assert (row["asr_before"] is None) == (attack == "clean")
    assert row["acc_before"] == row["acc_after"]
