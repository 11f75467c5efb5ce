"""An operator's network over HTTP: from the entry point to the purified file, or to a clear problem."""

import io
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import operator
from tests.support.inputs import CLASSES, samples, saved
from tests.support.stack import Stack, embedded_stack, wait_for

QUICK = '{"epochs": 2, "passes": 1}'
STATE = {
    "up.weight": (6, 3, 3, 3),
    "up.bias": (6,),
    "across.weight": (6, 3, 3, 3),
    "across.bias": (6,),
    "answer.weight": (CLASSES, 6),
    "answer.bias": (CLASSES,),
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Run the service beside an operator's package, one network of which is broken."""
    folder = tmp_path_factory.mktemp("stack")
    packages = tmp_path_factory.mktemp("packages")
    networks = {"ladder": "acme_networks:ladder", "broken": "acme_broken:ladder"}
    with pytest.MonkeyPatch.context() as patch:
        path = os.pathsep.join(
            filter(None, [str(operator.install(packages, networks)), os.environ.get("PYTHONPATH")])
        )
        patch.setenv("PYTHONPATH", path)
        with embedded_stack(folder) as running:
            wait_for(lambda: "ladder" in announced(running) or None, seconds=120)
            yield running


def announced(stack: Stack) -> set[str]:
    """Return the names that are not built in."""
    with stack.client as client:
        listed = client.get("/architectures").json()["data"]
    return {each["name"] for each in listed if not each["built_in"]}


def ladder(**changes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the state dict of a ladder, with *changes* of shape."""
    torch.manual_seed(0)
    shapes = STATE | {key.replace("__", "."): shape for key, shape in changes.items()}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def ended(stack: Stack, state: dict[str, torch.Tensor], **fields: str) -> dict[str, Any]:
    """Send a job for a ladder and return it at its end."""
    files = {"model": saved(state), "samples": samples()}
    return stack.wait_for_end(
        stack.submit(files, architecture="ladder", method="awm", params=QUICK, **fields)
    )


def test_operators_network_is_purified(stack: Stack) -> None:
    """Its file comes back with its own keys and shapes, and only convolutions differ."""
    state = ladder()
    job = ended(stack, state)
    assert job["state"] == "succeeded", job
    purified = torch.load(io.BytesIO(stack.download(job)), weights_only=True)
    assert list(purified) == list(state)
    changed = {key for key in state if not torch.equal(purified[key], state[key])}
    assert changed
    assert changed <= {"up.weight", "across.weight"}


@pytest.mark.parametrize(
    ("changes", "fields", "code", "says"),
    [
        ({"across__weight": (6, 6, 3, 3)}, {}, "architecture-mismatch", "across.weight is (6, 6"),
        ({"extra": (1,)}, {}, "architecture-mismatch", "unexpected: extra"),
        ({}, {"architecture_args": '{"steps": 3}'}, "architecture-mismatch", "'steps'"),
    ],
)
def test_what_does_not_fit_fails_with_its_own_problem(
    stack: Stack,
    changes: dict[str, tuple[int, ...]],
    fields: dict[str, str],
    code: str,
    says: str,
) -> None:
    """The worker finds it at its first attempt, and the job says what differs."""
    job = ended(stack, ladder(**changes), **fields)
    assert (job["state"], job["attempt"]) == ("failed", 1)
    assert job["error"]["code"] == code
    assert says in job["error"]["detail"]


def test_broken_network_is_left_out(stack: Stack) -> None:
    """The worker lives, and nobody is offered what cannot be built."""
    assert "broken" not in announced(stack)
    assert "no licence file" in (stack.folder / "service.log").read_text()
