"""The main job on a public backdoored checkpoint, as it was published; skipped without the data."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.catalogue.architectures import SmallVggArguments
from tests.support.inputs import npz
from tests.support.stack import REPOSITORY, embedded_stack
from worker.architectures.registry import build

DATA = REPOSITORY.parent / "shared" / "data"
CHECKPOINT = DATA / "ibau" / "gtsrbtrojan_wm_2_02_ckpt.pth"
TARGET = 2
CLASSES = 43

pytestmark = pytest.mark.skipif(
    not CHECKPOINT.exists(), reason="the public checkpoints are not beside the project"
)


def test_gtsrb_trojan_is_erased_with_one_image_per_class(tmp_path: Path) -> None:
    """ASR falls from 100 % to at most 5 %, ACC by at most 3 points, and the container comes back."""
    with np.load(DATA / "gtsrb_heldout.npz", allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"].astype(np.int64)
    rng = np.random.default_rng(0)
    drawn = np.array([rng.choice(np.flatnonzero(labels == label)) for label in range(CLASSES)])
    rest = np.setdiff1d(np.arange(len(labels)), drawn)
    trigger = np.asarray(Image.open(DATA / "ibau" / "trojan_wm.png").convert("RGB"), np.int64)
    triggered = np.clip(images[rest] + trigger, 0, 255).astype(np.uint8)
    with embedded_stack(tmp_path) as stack:
        job = stack.submit(
            {
                "model": CHECKPOINT.read_bytes(),
                "samples": npz(images=images[drawn], labels=labels[drawn]),
                "evaluation": npz(images=images[rest], labels=labels[rest]),
                "triggered": npz(images=triggered, labels=labels[rest], target=np.int64(TARGET)),
            },
            method="awm",
        )
        ended = stack.wait_for_end(job, seconds=550)
        content = stack.download(ended)
    before, after = ended["metrics"]["before"], ended["metrics"]["after"]
    assert before["attack_success_rate"] > 0.99
    assert after["attack_success_rate"] <= 0.05
    assert before["accuracy"] - after["accuracy"] <= 0.03

    original = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    written = torch.load(io.BytesIO(content), weights_only=True)
    assert list(written) == ["net", "acc", "epoch"]
    assert (written["acc"], written["epoch"]) == (original["acc"], original["epoch"])
    for key, tensor in original["net"].items():
        assert written["net"][key].dtype == tensor.dtype
        if tensor.ndim != 4:
            assert torch.equal(written["net"][key], tensor)
    model = build("small_vgg", SmallVggArguments(classes=CLASSES))
    model.load_state_dict(written["net"])
