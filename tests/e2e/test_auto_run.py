"""A run of ``auto`` on a backdoored model, and everything of it that can be downloaded."""

import hashlib
import io
from collections.abc import Iterator

import pytest
import torch

from examples.digits import ARGUMENTS, draw_clean_samples, measure, train_backdoored
from tests.support.inputs import npz, saved
from tests.support.stack import Stack, embedded_stack
from worker.architectures.registry import build

STRENGTHS = "[0.02, 1.0]"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run the service with its worker."""
    with embedded_stack(tmp_path_factory.mktemp("stack")) as running:
        yield running


def test_every_candidate_of_a_run_is_downloaded(stack: Stack) -> None:
    """Each loads where the upload did, is what the report says, and erases as its strength allows."""
    model, split = train_backdoored(0)
    images, labels, rest = draw_clean_samples(split, 1, 0)
    job = stack.submit(
        {"model": saved(model.state_dict()), "samples": npz(images=images.numpy(), labels=labels)},
        method="auto",
        params=f'{{"strengths": {STRENGTHS}}}',
    )
    ended = stack.wait_for_end(job)
    assert (ended["state"], ended["verdict"]) == ("succeeded", "backdoored")
    found = stack.report(ended)["evidence"]["candidates"]
    assert len(found) == 2
    assert ended["links"]["candidates"] == [candidate["model"] for candidate in found]
    success = []
    for number, candidate in enumerate(found):
        with stack.client as client:
            answer = client.get(candidate["model"])
            line = client.get(f"/jobs/{job['id']}/model.sha256", params={"candidate": number}).text
        digest = hashlib.sha256(answer.content).hexdigest()
        assert (candidate["sha256"], candidate["bytes"]) == (digest, len(answer.content))
        assert line == f"{digest}  model-clean-candidate{number}.pt\n"
        assert candidate["chosen"] == (answer.content == stack.download(ended))
        written = torch.load(io.BytesIO(answer.content), weights_only=True)
        assert list(written) == list(model.state_dict())
        purified = build("small_cnn", ARGUMENTS).eval()
        purified.load_state_dict(written)
        success.append(measure(purified, rest)[1])
    assert measure(model, rest)[1] > 0.99
    assert success[1] < success[0]
    with stack.client as client:
        missing = client.get(f"/jobs/{job['id']}/model", params={"candidate": 2})
        assert (missing.status_code, missing.json()["code"]) == (404, "no-such-candidate")
        assert client.delete(f"/jobs/{job['id']}").status_code == 204
        assert client.get(found[0]["model"]).status_code == 410
