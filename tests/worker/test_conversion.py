"""What a client sent, as bare tensors and back: nothing is lost, and nothing else is believed."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from common.errors import InternalError
from common.formats.samples import Purpose
from tests.service.forms import in_safetensors
from tests.support.inputs import CLASSES, SPEC, npz, samples, saved
from worker import containers
from worker.conversion import Uploads, convert, load
from worker.interchange import NAMES, WEIGHTS
from worker.samples import load_samples

TIED = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
STATE = {
    "z": TIED,
    "a": TIED,
    "turned": torch.arange(6.0).reshape(2, 3).T,
    "steps": torch.tensor(7),
    "whole": torch.arange(10.0),
    "part": torch.tensor([], dtype=torch.int8),
}


def _converted(folder: Path, state: object = STATE, images: bytes | None = None) -> Path:
    (folder / "model").write_bytes(saved({"net": state, "epoch": 3}))
    (folder / "samples").write_bytes(images or samples())
    target = folder / "converted"
    target.mkdir()
    uploads = Uploads(
        model=folder / "model", samples=folder / "samples", evaluation=None, triggered=None
    )
    convert(uploads, SPEC, target)
    return target


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    """Keys, their order, shapes, dtypes and bits survive, and so does the prefix."""
    state = {f"module.{key}": value for key, value in STATE.items()}
    found = load(_converted(tmp_path, state), SPEC).weights
    assert found.prefix == "module."
    assert list(found.tensors) == list(STATE)
    assert containers.identical(dict(found.tensors), STATE)


def test_one_tensor_of_two_names_stays_one(tmp_path: Path) -> None:
    """What is changed under one name is changed under the other, as in the upload."""
    found = load(_converted(tmp_path), SPEC).weights
    found.replace("a", torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not found.tensors["z"].any()


@pytest.mark.parametrize("kind", ["bytes", "fractions", "tensors"])
def test_images_come_back_as_they_were(tmp_path: Path, kind: str) -> None:
    """Whole grey levels and fractions are both kept to the bit."""
    images = np.random.default_rng(0).random((20, 3, 8, 8), dtype=np.float32)
    labels = np.arange(20) % CLASSES
    given = {
        "bytes": samples(),
        "fractions": npz(images=images, labels=labels),
        "tensors": in_safetensors(images=images, labels=labels),
    }[kind]
    folder = _converted(tmp_path, images=given)
    found = load(folder, SPEC).samples
    expected = load_samples(tmp_path / "samples", Purpose.SAMPLES)
    assert torch.equal(found.images, expected.images)
    assert found.labels is not None
    assert expected.labels is not None
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    "names",
    [
        "",
        "[]",
        '{"prefix": "", "keys": ["gone"], "same": {}}',
        '{"prefix": "", "keys": [], "same": {}}',
        '{"prefix": "", "keys": ["z", "a"], "same": {"z": "a"}}',
        '{"prefix": 1, "keys": [], "same": {}}',
        '{"prefix": "", "keys": ["z"], "same": {"z": "z"}}',
    ],
)
def test_names_that_do_not_fit_are_a_fault(tmp_path: Path, names: str) -> None:
    """A conversion that says something else of its tensors than is there is not worked on."""
    folder = _converted(tmp_path)
    (folder / NAMES).write_text(names)
    with pytest.raises(InternalError):
        load(folder, SPEC)


def test_weights_that_are_none_are_a_fault(tmp_path: Path) -> None:
    """A conversion that leaves no safetensors is not worked on."""
    folder = _converted(tmp_path)
    (folder / WEIGHTS).write_bytes(b"\x80\x02}")
    with pytest.raises(InternalError):
        load(folder, SPEC)


@pytest.mark.parametrize(
    "images",
    [
        torch.full((20, 3, 8, 8), 2.0),
        torch.full((20, 3, 8, 8), torch.nan),
        torch.zeros(20, 1, 8, 8),
    ],
)
def test_images_beyond_the_specification_are_refused(tmp_path: Path, images: torch.Tensor) -> None:
    """The second stage checks the first one's images as if a client had sent them."""
    folder = _converted(tmp_path)
    safetensors.torch.save_file({"images": images}, folder / "samples")
    with pytest.raises(Exception, match=r"none|shape"):
        load(folder, SPEC)
