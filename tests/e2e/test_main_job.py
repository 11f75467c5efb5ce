"""The main job over HTTP, the same in both modes: with nothing but processes, curl and files."""

import io
import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.inputs import cnn_state, resnet_state, samples, saved
from tests.support.servers import PostgresServer, RedisServer
from tests.support.stack import REPOSITORY, Stack, distributed_stack, embedded_stack

QUICK = '{"epochs": 2, "passes": 1}'
ENDLESS = '{"epochs": 1000, "passes": 1000}'


@pytest.fixture(scope="module", params=["embedded", "distributed"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Run the whole service, in each mode."""
    folder = tmp_path_factory.mktemp("stack")
    if request.param == "embedded":
        with embedded_stack(folder) as running:
            yield running
        return
    postgres: PostgresServer = request.getfixturevalue("postgres")
    redis: RedisServer = request.getfixturevalue("redis")
    with distributed_stack(
        folder,
        database_url=postgres.create_database(f"stack_{uuid.uuid4().hex}"),
        broker_url=redis.url,
        # The worker's own look at the table must not hide a bell that does not ring.
        poll_seconds="3600",
        sweep_seconds="3600",
    ) as running:
        yield running


def test_curl_session_purifies_a_model(stack: Stack, tmp_path: Path) -> None:
    """The script in examples/ runs as it stands and leaves a verified model behind."""
    state = resnet_state()
    torch.save({"net": state, "acc": 77.5, "epoch": 30}, tmp_path / "model.pt")
    (tmp_path / "clean.npz").write_bytes(samples(side=16))
    subprocess.run(
        ["sh", str(REPOSITORY / "examples" / "sanitise.sh")],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "URL": stack.url, "TOKEN": stack.token},
        check=True,
        timeout=300,
    )
    purified = torch.load(tmp_path / "model-clean.pt", weights_only=True)
    assert list(purified) == ["net", "acc", "epoch"]
    assert (purified["acc"], purified["epoch"]) == (77.5, 30)
    assert list(purified["net"]) == list(state)
    changed = set()
    for key, before in state.items():
        after = purified["net"][key]
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        if not torch.equal(after, before):
            changed.add(key)
    assert changed
    last = {"layer4.1.conv1.weight", "layer4.1.conv2.weight", "linear.weight", "linear.bias"}
    assert changed <= last


def test_same_job_gives_same_bytes(stack: Stack) -> None:
    """The same input and seed give the same file; another seed gives another one."""
    files = {"model": saved(cnn_state()), "samples": samples()}
    jobs = [
        stack.submit(files, architecture="small_cnn", method="awm", params=QUICK, seed=seed)
        for seed in ("7", "7", "8")
    ]
    one, same, other = (stack.download(stack.wait_for_end(job)) for job in jobs)
    assert one == same
    assert one != other


def test_measures_with_evaluation_and_triggered_samples(stack: Stack) -> None:
    """ACC, ASR, RA, agreement and fidelity are measured when there is something to measure on."""
    job = stack.submit(
        {
            "model": saved(cnn_state()),
            "samples": samples(),
            "evaluation": samples(seed=1),
            "triggered": samples(seed=2, target=2),
        },
        method="awm",
        params=QUICK,
    )
    metrics = stack.wait_for_end(job)["metrics"]
    for moment in ("before", "after"):
        for name in ("accuracy", "attack_success_rate", "robust_accuracy"):
            assert 0 <= metrics[moment][name] <= 1
    assert 0 <= metrics["after"]["agreement"] <= 1
    assert metrics["after"]["fidelity"] is not None


def test_what_was_not_measured_is_null(stack: Stack) -> None:
    """Without an evaluation and a triggered set no number is invented."""
    job = stack.submit(
        {"model": saved(cnn_state()), "samples": samples()}, method="awm", params=QUICK
    )
    ended = stack.wait_for_success(job)
    assert ended["verdict"] is None
    assert ended["remediation"] == "purified"
    numbers = {**ended["metrics"]["before"], **ended["metrics"]["after"]}
    assert set(numbers.values()) == {None}


def test_method_none_changes_nothing(stack: Stack) -> None:
    """A scan returns every tensor as it was."""
    state = cnn_state()
    job = stack.submit({"model": saved(state), "samples": samples()}, method="none")
    ended = stack.wait_for_end(job)
    assert ended["remediation"] == "unchanged"
    after = torch.load(io.BytesIO(stack.download(ended)), weights_only=True)
    assert list(after) == list(state)
    assert all(torch.equal(after[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("auto", '{"steps": 5, "restart_steps": 2, "strengths": [0.5], "force": true}'),
        ("anp", '{"iterations": 20, "threshold": 0.9, "max_accuracy_drop": 1}'),
        ("clp", '{"u": 1}'),
        ("fine_tuning", '{"epochs": 2}'),
        ("ibau", '{"rounds": 1, "passes": 2}'),
    ],
)
def test_every_other_method_purifies_a_model(stack: Stack, method: str, params: str) -> None:
    """What GET /methods offers runs in the sandbox of a job, and changes the downloaded model."""
    with stack.client as client:
        offered = {each["name"]: each for each in client.get("/methods").json()["data"]}
    assert {"auto", "awm", "none", "anp", "clp", "fine_tuning", "ibau"} <= offered.keys()
    state = cnn_state()
    job = stack.submit({"model": saved(state), "samples": samples()}, method=method, params=params)
    ended = stack.wait_for_success(job)
    assert ended["remediation"] == "purified"
    assert ended["params"].keys() == offered[method]["parameters"]["properties"].keys()
    assert None not in ended["params"].values()
    after = torch.load(io.BytesIO(stack.download(ended)), weights_only=True)
    assert list(after) == list(state)
    assert any(not torch.equal(after[key], state[key]) for key in state)


def test_classes_without_samples_are_a_warning(stack: Stack) -> None:
    """Fewer than one sample per class is carried out, and the report says what it means."""
    job = stack.submit(
        {"model": saved(cnn_state(classes=6)), "samples": samples(classes=4)},
        method="awm",
        params=QUICK,
    )
    report = stack.report(stack.wait_for_end(job))
    assert [warning["code"] for warning in report["warnings"]] == ["classes-without-samples"]
    assert "2 of 6" in report["warnings"][0]["detail"]


def test_running_job_can_be_cancelled(stack: Stack) -> None:
    """A cancel ends a running job, for good."""
    job = stack.submit(
        {"model": saved(cnn_state()), "samples": samples()}, method="awm", params=ENDLESS
    )
    stack.wait_until_running(job)
    with stack.client as client:
        assert client.post(f"/jobs/{job['id']}/cancel").status_code == 200
    ended = stack.wait_for_end(job)
    assert ended["state"] == "cancelled"
    assert ended["error"]["code"] == "cancelled"
    with stack.client as client:
        assert client.get(f"/jobs/{job['id']}/model").status_code == 409
    assert not list(stack.scratch.glob("*/job_*"))


def test_deadline_cancels(stack: Stack) -> None:
    """A job that outlives its ``cancel_after`` is cancelled by the sweep of the service."""
    if "WEIGHTWASH_SWEEP_SECONDS" in stack.environment:
        pytest.skip("this stack never sweeps")
    job = stack.submit(
        {"model": saved(cnn_state()), "samples": samples()},
        method="awm",
        params=ENDLESS,
        cancel_after="3",
    )
    ended = stack.wait_for_end(job)
    assert (ended["state"], ended["error"]["code"]) == ("cancelled", "deadline-passed")
