"""A zip of class folders is read without decoding, and never labelled by a guess."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import (
    ClassCountMismatch,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    NoSamples,
    Problem,
    TooLarge,
)
from common.formats.samples import Purpose, SampleFile, check_labels, inspect_samples
from tests.common.formats.test_images import picture
from worker.samples import load_samples

RED, GREY = picture("PNG"), picture("PNG", "L")


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    """Write a zip of *members*; a name that ends with a slash is a folder."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def inspect(path: Path, purpose: Purpose = Purpose.SAMPLES, max_bytes: int = 1 << 20) -> SampleFile:
    """Inspect with the limit of these tests."""
    return inspect_samples(path, purpose, max_bytes=max_bytes)


@pytest.mark.parametrize("top", ["", "clean/"])
def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path, top: str) -> None:
    """Gate and worker see the same images, with or without a folder around all, litter left out."""
    members = {
        f"{top}dog/1.jpg": picture("JPEG"),
        f"{top}cat/b.png": GREY,
        f"{top}cat/a.png": RED,
        f"{top}empty/": b"",
        "__MACOSX/._a.png": b"x",
        f"{top}cat/.DS_Store": b"x",
    }
    members = members if not top else {k: v for k, v in members.items() if "__MACOSX" not in k}
    path = zipped(tmp_path / "clean.zip", members)
    found = inspect(path)
    assert found == SampleFile(
        count=3, image_shape=(3, 5, 7), labels=(0, 0, 1), targets=None, folders=3
    )
    samples = load_samples(path, Purpose.SAMPLES)
    assert samples.images.shape == (3, 3, 5, 7)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]
    red = np.asarray(Image.open(io.BytesIO(RED)))
    assert np.array_equal((samples.images[0] * 255).round().numpy(), red.transpose(2, 0, 1))
    check_labels(found, Purpose.SAMPLES, classes=3)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    """One channel only where every image is grey."""
    path = zipped(tmp_path / "z", {"a/1.png": GREY, "b/1.jpg": picture("JPEG", "L")})
    assert inspect(path).image_shape == (1, 5, 7)
    assert load_samples(path, Purpose.SAMPLES).images.shape == (2, 1, 5, 7)


def test_incomplete_folders_are_never_numbered(tmp_path: Path) -> None:
    """Where a class has no folder the order does not tell the others, so their owner must."""
    path = zipped(tmp_path / "z", {"cat/1.png": RED, "dog/1.png": RED})
    with pytest.raises(ClassCountMismatch, match="2 class folders") as caught:
        check_labels(inspect(path), Purpose.SAMPLES, classes=3)
    assert "classes.json" in caught.value.hint


@pytest.mark.parametrize("told", [["dog", "fish", "cat"], {"cat": 2, "dog": 0}])
def test_classes_file_tells_the_classes(tmp_path: Path, told: Any) -> None:
    """``classes.json`` overrules the order of the names, as a list or as an object."""
    members = {"cat/1.png": RED, "dog/1.png": RED, "classes.json": json.dumps(told).encode()}
    path = zipped(tmp_path / "z", members)
    found = inspect(path)
    assert (found.labels, found.folders) == ((0, 2), None)
    check_labels(found, Purpose.SAMPLES, classes=5)
    labels = load_samples(path, Purpose.SAMPLES).labels
    assert labels is not None
    assert labels.tolist() == [0, 2]


def test_numbers_that_sort_two_ways_need_the_classes_file(tmp_path: Path) -> None:
    """``2`` and ``10`` are in one order by name and in another by value."""
    members = {f"{n}/1.png": RED for n in (2, 10)}
    with pytest.raises(InvalidLabels):
        inspect(zipped(tmp_path / "z", members))
    assert inspect(zipped(tmp_path / "y", {f"{n:02}/1.png": RED for n in (2, 10)})).labels == (0, 1)


CLASSES = "classes.json"
REFUSED: dict[str, tuple[dict[str, bytes], type[Problem]]] = {
    "no image": ({"a/": b"", "b/": b""}, NoSamples),
    "an image outside": ({"a/1.png": RED, "2.png": RED}, InvalidSamples),
    "too deep": ({"a/b/c/1.png": RED}, InvalidSamples),
    "two depths": ({"a/1.png": RED, "b/c/1.png": RED}, InvalidSamples),
    "a text": ({"a/1.png": RED, "a/readme.txt": b"hello"}, InvalidImages),
    "a script named so": ({"a/1.png": b"#!/bin/sh\n"}, InvalidImages),
    "two sizes": ({"a/1.png": RED, "b/1.png": picture("PNG", size=(5, 7))}, InvalidImages),
    "transparency": ({"a/1.png": picture("PNG", "RGBA")}, InvalidImages),
    "more pixels than allowed": ({f"a/{n}.png": picture("PNG", size=(512, 512)) for n in range(2)},
                                 TooLarge),
    "classes that are no JSON": ({"a/1.png": RED, CLASSES: b"{"}, InvalidLabels),
    "classes that are deep": ({"a/1.png": RED, CLASSES: b"[" * 99999}, InvalidLabels),
    "classes that are a number": ({"a/1.png": RED, CLASSES: b"1"}, InvalidLabels),
    "classes that lack one": ({"a/1.png": RED, CLASSES: b'["b"]'}, InvalidLabels),
    "classes of one number": ({"a/1.png": RED, CLASSES: b'{"a": 0, "b": 0}'}, InvalidLabels),
    "classes named twice": ({"a/1.png": RED, CLASSES: b'{"a": 0, "a": 1}'}, InvalidLabels),
    "classes that are listed twice": ({"a/1.png": RED, CLASSES: b'["a", "a"]'}, InvalidLabels),
    "a negative class": ({"a/1.png": RED, CLASSES: b'{"a": -1}'}, InvalidLabels),
    "a class that is true": ({"a/1.png": RED, CLASSES: b'{"a": true}'}, InvalidLabels),
}  # fmt: skip


@pytest.mark.parametrize("wrong", REFUSED)
def test_wrong_folders_are_refused(tmp_path: Path, wrong: str) -> None:
    """Each mistake is refused by its class, with a hint."""
    members, problem = REFUSED[wrong]
    with pytest.raises(Problem) as caught:
        inspect(zipped(tmp_path / "z", members))
    assert type(caught.value) is problem
    assert caught.value.hint


def test_triggered_images_need_a_target(tmp_path: Path) -> None:
    """A zip of images has no place for the attack's target."""
    with pytest.raises(InvalidLabels, match="target"):
        inspect(zipped(tmp_path / "z", {"a/1.png": RED}), Purpose.TRIGGERED)


def test_worker_refuses_what_the_gate_would(tmp_path: Path) -> None:
    """With the gate out of the way, the worker makes the same checks before it decodes."""
    with pytest.raises(InvalidImages):
        load_samples(zipped(tmp_path / "z", {"a/1.png": picture("GIF")}), Purpose.SAMPLES)
