"""A run of ``auto`` on a backdoored model, and everything of it that can be downloaded."""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.digits import ARGUMENTS, TARGET, Split, draw_clean_samples, measure, train_backdoored
from tests.support.inputs import cnn_state, npz, samples, saved
from tests.support.stack import Stack, embedded_stack, wait_for
from worker.architectures.registry import build
from worker.purify.metrics import predict


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished job, and what it was given."""

    job: dict[str, Any]
    model: nn.Module
    images: torch.Tensor
    labels: torch.Tensor
    rest: Split


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run the service with its worker."""
    with embedded_stack(tmp_path_factory.mktemp("stack"), sweep_seconds="0.5") as running:
        yield running


@pytest.fixture(scope="module")
def run(stack: Stack) -> Run:
    """Purify the demo's model at two strengths."""
    model, split = train_backdoored(0)
    images, labels, rest = draw_clean_samples(split, 1, 0)
    job = stack.submit(
        {
            "model": saved(model.state_dict()),
            "samples": npz(images=images.numpy(), labels=labels.numpy()),
        },
        method="auto",
        params='{"strengths": [0.02, 1.0]}',
    )
    ended = stack.wait_for_success(job)
    assert ended["verdict"] == "backdoored"
    return Run(job=ended, model=model, images=images, labels=labels, rest=rest)


def get(stack: Stack, url: str, *, status: int = 200) -> bytes:
    """Return what an address answers."""
    with stack.client as client:
        answer = client.get(url)
    assert answer.status_code == status, answer.text
    return answer.content


def loaded(content: bytes) -> nn.Module:
    """Return the model that a file holds."""
    model = build("small_cnn", ARGUMENTS).eval()
    model.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return model


def test_every_candidate_is_downloaded(stack: Stack, run: Run) -> None:
    """Each loads where the upload did, is what the report says, and erases as its strength allows."""
    found = stack.report(run.job)["evidence"]["candidates"]
    assert [candidate["strength"] for candidate in found] == [0.02, 1.0]
    assert run.job["links"]["candidates"] == [candidate["model"] for candidate in found]
    success = []
    for number, candidate in enumerate(found):
        content = get(stack, candidate["model"])
        digest = hashlib.sha256(content).hexdigest()
        assert (candidate["sha256"], candidate["bytes"]) == (digest, len(content))
        line = get(stack, f"{run.job['links']['model_sha256']}?candidate={number}")
        assert line.decode() == f"{digest}  model-clean-candidate{number}.pt\n"
        assert candidate["chosen"] == (content == stack.download(run.job))
        written = torch.load(io.BytesIO(content), weights_only=True)
        assert list(written) == list(run.model.state_dict())
        success.append(measure(loaded(content), run.rest)[1])
    assert measure(run.model, run.rest)[1] > 0.99
    assert success[1] < success[0]
    assert b"no-such-candidate" in get(
        stack, f"{run.job['links']['model']}?candidate=2", status=404
    )


def test_triggers_are_downloaded_as_arrays(stack: Stack, run: Run) -> None:
    """The file stands by itself: anybody can count from it what the report says of each trigger."""
    with np.load(
        io.BytesIO(get(stack, run.job["links"]["triggers"])), allow_pickle=False
    ) as archive:
        arrays = {name: archive[name] for name in archive.files}
    before, after = run.model, loaded(stack.download(run.job))
    assert (arrays["clean"] == run.images[arrays["sample"]].numpy()).all()
    assert (arrays["label"] == run.labels[arrays["sample"]].numpy()).all()
    report = stack.report(run.job)["evidence"]
    assert report["suspects"] == [TARGET]
    for number, trigger in enumerate(report["triggers"]):
        assert trigger["class"] == arrays["target"][number] == TARGET
        stamped = torch.from_numpy(arrays["stamped"][number])
        others = arrays["label"] != TARGET
        for moment, model in (("before", before), ("after", after)):
            answers = predict(model, stamped).numpy()
            assert (arrays[f"stamped_{moment}"][number] == answers).all()
            success = (answers[others] == TARGET).mean()
            assert trigger[f"success_{moment}"] == pytest.approx(success, abs=1e-4)
    assert report["triggers"][0]["success_before"] > 0.8
    assert report["triggers"][0]["success_after"] < 0.5


def test_triggers_are_seen_as_pictures(stack: Stack, run: Run) -> None:
    """
    Each picture is a PNG in grey, as the digits are, and shows first what is done to an image, enlarged.

    That is the mask of a patch, and of a perturbation what is added.
    """
    with np.load(
        io.BytesIO(get(stack, run.job["links"]["triggers"])), allow_pickle=False
    ) as archive:
        masks, added = archive["mask"], archive["added"]
    pictures = run.job["links"]["trigger_images"]
    found = stack.report(run.job)["evidence"]["triggers"]
    assert [trigger["image"] for trigger in found] == pictures
    assert len(pictures) == len(masks)
    for number, url in enumerate(pictures):
        with Image.open(io.BytesIO(get(stack, url))) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            pixels = np.asarray(image)
        first = pixels[4:100:12, 4:100:12].astype(int)
        if found[number]["kind"] == "patch":
            assert (first == np.rint(masks[number][0] * 255)).all()
        else:
            delta = added[number][0]
            expected = np.rint(127.5 * (1 + delta / np.abs(delta).max()))
            assert np.abs(first - expected).max() <= 1  # rounding


def test_same_job_gives_same_files(stack: Stack) -> None:
    """Candidates, arrays and pictures are bytes that come out again."""
    quick = '{"steps": 5, "restart_steps": 2, "strengths": [0.5], "force": true}'
    links = [
        stack.wait_for_end(
            stack.submit(
                {"model": saved(cnn_state()), "samples": samples()}, method="auto", params=quick
            )
        )["links"]
        for _ in range(2)
    ]
    for name in ("candidates", "trigger_images"):
        one, other = ([get(stack, url) for url in each[name]] for each in links)
        assert one == other
    assert get(stack, links[0]["triggers"]) == get(stack, links[1]["triggers"])

    # One is deleted, files and all; the other one keeps its own.
    with stack.client as client:
        assert client.delete(links[0]["self"]).status_code == 204
    job_id = links[0]["self"].rpartition("/")[2]
    outputs = stack.folder / "var" / "blobs" / "outputs"
    wait_for(lambda: None if list(outputs.glob(f"{job_id}/*")) else True)
    for url in (links[0]["triggers"], *links[0]["candidates"], *links[0]["trigger_images"]):
        get(stack, url, status=410)
    get(stack, links[1]["triggers"])
