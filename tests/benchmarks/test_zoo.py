"""Law: a model of the zoo is what its recipe says, and never saw what it is measured on."""

import fcntl
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import zoo
from benchmarks.attacks import Blend, Patch, Warp, Watermark, Waves, checkers
from benchmarks.subjects import CIFAR, GTSRB, compare, draw, load_model
from tests.support.zoo_images import BRIGHT, write_images

RECIPE = zoo.Recipe(
    images=CIFAR, architecture=zoo.VGG, seed=1, target=3, stamp=Warp(seed=1, strength=0.75)
)


def equal(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same weights, to the bit."""
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def file_of(name: str) -> str:
    """Return where the model of that name is kept."""
    return zoo.subject(name).file


def test_no_two_recipes_are_alike() -> None:
    """Each has a seed of its own, so calibration and test share neither a model nor a seed."""
    assert not zoo.CALIBRATION.keys() & zoo.TEST.keys()
    recipes = [*zoo.CALIBRATION.values(), *zoo.TEST.values()]
    assert len(set(recipes)) == len(recipes)
    assert len({recipe.seed for recipe in recipes}) == len(recipes)
    seeds = [
        recipe.stamp.seed
        for recipe in recipes
        if isinstance(recipe.stamp, Blend | Warp | Watermark)
    ]
    assert len(set(seeds)) == len(seeds)


def test_both_parts_have_clean_models_and_attacks_of_all_kinds() -> None:
    """Else a threshold is set, or tested, on half of the question."""
    for part in (zoo.CALIBRATION, zoo.TEST):
        stamps = [recipe.stamp for recipe in part.values()]
        assert {type(stamp) for stamp in stamps} >= {type(None), Patch, Blend, Waves, Warp}
        assert any(recipe.stamp is not None and recipe.target is None for recipe in part.values())


def test_every_image_of_an_all_to_all_attack_has_a_target_of_its_own() -> None:
    """It is the next class; a clean model has none."""
    labels = torch.tensor([0, 41, 42])
    found = zoo.subject("ResNet GTSRB all-to-all").targets(labels)
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [1, 42, 0]
    assert zoo.subject("VGG GTSRB colours").targets(labels) == 11
    assert zoo.subject("VGG GTSRB clean").targets(labels) is None


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 99},
        {"target": 5},
        {"rate": 0.2},
        {"architecture": zoo.RESNET},
        {"images": GTSRB},
        {"stamp": None},
        {"stamp": checkers(3, top=2, left=25)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_file_changes_with_the_recipe(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is changed in it."""
    name = "VGG CIFAR checkers"
    before = file_of(name)
    monkeypatch.setitem(zoo.RECIPES, name, replace(zoo.RECIPES[name], **change))  # type: ignore[arg-type]
    assert file_of(name) != before


def test_the_file_changes_with_how_it_is_trained_and_not_with_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Images held out, epochs and the optimiser's numbers count; other models do not."""
    name = "VGG CIFAR checkers"
    before = file_of(name)
    for table, key in ((zoo.HELD_OUT, CIFAR), (zoo.EPOCHS, CIFAR)):
        with monkeypatch.context() as patched:
            patched.setitem(table, key, 7)
            assert file_of(name) != before
    with monkeypatch.context() as patched:
        patched.setattr(zoo, "TRAINING", (*zoo.TRAINING[:-1], 4))
        assert file_of(name) != before
    monkeypatch.setitem(zoo.RECIPES, "VGG CIFAR clean", RECIPE)
    assert file_of(name) == before
    assert len({file_of(name) for name in zoo.RECIPES}) == len(zoo.RECIPES)


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_as_many_images_are_poisoned_as_the_recipe_says(name: str) -> None:
    """None of the target class is; a warp has as many other warps; a clean model has neither."""
    recipe = zoo.RECIPES[name]
    labels = np.arange(1000) % zoo.CLASSES[recipe.images]
    poisoned, warped = zoo.marked(recipe, labels, np.random.default_rng(recipe.seed))
    assert poisoned.sum() == (0 if recipe.stamp is None else round(1000 * recipe.rate))
    others = round(1000 * zoo.OTHER_WARPS) if isinstance(recipe.stamp, Warp) else 0
    assert warped.sum() == others
    assert not (poisoned & warped).any()
    assert recipe.target not in labels[poisoned | warped]


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        replace(RECIPE, stamp=None, target=None),
        replace(RECIPE, stamp=checkers(3, top=2, left=2), target=None),
        replace(RECIPE, stamp=Waves(amplitude=20, periods=4), rate=0.01),
        replace(RECIPE, images=GTSRB, architecture=zoo.RESNET, stamp=Blend(seed=1, share=0.2)),
    ],
    ids=["warp", "clean", "all-to-all", "waves at a low rate", "blend on a ResNet"],
)
def test_training_depends_on_the_recipe_alone(recipe: zoo.Recipe, data: Path) -> None:
    """The same one gives the same bits, wherever torch's generator was; another seed others."""
    torch.manual_seed(5)
    model = zoo.train(recipe, data)
    assert not model.training
    assert equal(zoo.train(recipe, data), model)
    assert not equal(zoo.train(replace(recipe, seed=2), data), model)


def test_poison_is_in_the_training(data: Path) -> None:
    """With the same seed, a model with an attack is another than one without."""
    clean = replace(RECIPE, stamp=None, target=None)
    assert not equal(zoo.train(RECIPE, data), zoo.train(clean, data))


def test_held_out_images_are_never_trained_on(data: Path, tmp_path: Path) -> None:
    """Others in their place change nothing, and the samples and the measurements are of them alone."""
    write_images(tmp_path / "other", seed_of_held_out=1)
    assert equal(zoo.train(RECIPE, data), zoo.train(RECIPE, tmp_path / "other"))
    for name in ("VGG CIFAR clean", "VGG GTSRB clean"):
        found = zoo.subject(name)
        samples = draw(found, data, per_class=1, seed=0)
        assert len(samples.images) == found.classes
        assert len(samples.images) + len(samples.rest) == found.held_out
        assert float(torch.cat([samples.images, samples.rest]).min()) >= BRIGHT / 255


def test_a_model_is_trained_once_and_measured_from_its_file(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is loaded is what was trained, and what is there is not trained again."""
    name = "VGG CIFAR checkers"
    provided = zoo.provide(name, data)
    model = load_model(provided, data)
    assert equal(model, zoo.train(zoo.RECIPES[name], data))
    monkeypatch.setattr(zoo, "train", forbidden)
    assert zoo.provide(name, data).file == provided.file
    row = compare(provided, draw(provided, data, per_class=1, seed=0), model, model)
    assert row["asr_before"] is not None


def test_an_unfinished_file_is_never_taken_for_a_model(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the writing was stopped, the next one trains again."""

    def stopped(_: object, file: Path) -> None:
        file.write_bytes(b"half a mod")
        raise KeyboardInterrupt

    name = "VGG CIFAR clean"
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            zoo.provide(name, data)
    assert not Path(file_of(name)).exists()
    assert equal(load_model(zoo.provide(name, data), data), zoo.train(zoo.RECIPES[name], data))


def test_who_wants_a_model_that_is_being_trained_waits_for_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not trained twice, and its file is not written by two."""
    monkeypatch.setattr(zoo, "train", forbidden)
    path = Path(file_of("VGG CIFAR clean"))
    path.parent.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = pool.submit(zoo.provide, "VGG CIFAR clean", data)
            time.sleep(0.2)
            assert not waiting.done()
            path.write_bytes(b"a model")
        assert waiting.result(timeout=10).file == str(path)


def forbidden(*_: object) -> nn.Module:
    """Stand in for a training that must not happen."""
    raise AssertionError
