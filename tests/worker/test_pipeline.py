"""One job from files to files, in this process and without a service."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import differences
from common.catalogue.architectures import ARCHITECTURES, SmallCnnArguments
from common.catalogue.methods import METHODS
from common.errors import (
    ClassCountMismatch,
    InternalError,
    InvalidImages,
    InvalidParameter,
    NothingLearned,
    UnknownArchitecture,
    UnknownMethod,
)
from common.formats.model import ModelFormat
from common.formats.samples import Purpose
from common.spec import JobSpec, ModelInput, SamplesInput
from tests.support.inputs import CLASSES, cnn_state, npz, samples, saved
from worker import checkpoints, trial_files
from worker.architectures.registry import build
from worker.normalise import normaliser
from worker.pipeline import Files, Result, sanitise
from worker.purify.detection.families import bend
from worker.purify.detection.verdict import Verdict
from worker.purify.metrics import predict
from worker.samples import load_samples
from worker.trial_files import TRIAL, Counts

CPU = torch.device("cpu")
# Few steps of each method; the others' presets run for minutes. A small network's layers have too few
# channels for any to lie three deviations above the others.
QUICK: Mapping[str, dict[str, Any]] = {
    "auto": {"steps": 3, "restart_steps": 2, "copies": 1, "strengths": [0.5], "force": True},
    "awm": {"epochs": 2, "passes": 1},
    "anp": {"iterations": 20, "threshold": 0.9, "max_accuracy_drop": 1.0},
    "clp": {"u": 1.0},
    "fine_tuning": {"epochs": 2},
    "ibau": {"rounds": 1, "passes": 2},
    "none": {},
}


def cnn(state: Mapping[str, Tensor]) -> nn.Module:
    """Return the network with the weights of *state*."""
    model = build("small_cnn", SmallCnnArguments(classes=CLASSES, channels=3, width=4)).eval()
    model.load_state_dict(dict(state))
    return model


def _ignore(_phase: str, _step: int, _total: int, _fraction: float) -> None:
    """Take progress and do nothing with it."""


class Job:
    """A job's folder and specification, to be changed before it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: Mapping[str, Tensor] = cnn_state()
        self.root: Any = self.state
        self.samples = samples()
        self.evaluation: bytes | None = None
        self.triggered: bytes | None = None
        self.method = "awm"
        self.given: dict[str, Any] | None = None
        self.changes: dict[str, Any] = {}

    def run(self, progress: Any = _ignore) -> Result:
        """Write the files and run."""
        folder = self.folder
        (folder / "model").write_bytes(saved(self.root))
        for role in ("samples", "evaluation", "triggered"):
            if (content := getattr(self, role)) is not None:
                (folder / role).write_bytes(content)
        shapes = {key: tuple(value.shape) for key, value in self.state.items()}
        method = METHODS[self.method]
        given = method.parameters.model_validate(self.given or QUICK[self.method])
        described = SamplesInput(
            sha256="0" * 64, bytes=1, count=20, classes=CLASSES, image_shape=(3, 8, 8)
        )
        spec = JobSpec(
            model=ModelInput(name="m.pt", sha256="0" * 64, bytes=1, format=ModelFormat.TORCH),
            samples=described,
            architecture="small_cnn",
            architecture_args=ARCHITECTURES["small_cnn"].fit(shapes).model_dump(),
            classes=CLASSES,
            method=self.method,
            params=method.resolve(
                given, count=20, classes=CLASSES, image_shape=(3, 8, 8)
            ).model_dump(),
            seed=0,
        ).model_copy(update=self.changes)
        files = Files(
            model=folder / "model",
            samples=folder / "samples",
            evaluation=folder / "evaluation" if self.evaluation else None,
            triggered=folder / "triggered" if self.triggered else None,
            output=folder / "output",
        )
        return sanitise(files, spec, device=CPU, progress=progress)

    def clear(self) -> None:
        """Remove what a run left."""
        for path in self.folder.iterdir():
            path.unlink()

    @property
    def output(self) -> Any:
        """What the written model holds."""
        return torch.load(self.folder / "output", weights_only=True)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Return an honest job."""
    return Job(tmp_path)


def test_only_convolution_weights_change(job: Job) -> None:
    """``awm`` lowers convolution weights towards 0 and leaves every other tensor as it was."""
    result = job.run()
    assert result.remediation == "purified"
    for key, before in job.state.items():
        after = job.output[key]
        if before.ndim == 4:
            assert bool((after.abs() <= before.abs()).all())
            assert bool((after * before >= 0).all())
        else:
            assert torch.equal(after, before)
    assert set(result.report["masks"]) == {k for k, v in job.state.items() if v.ndim == 4}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_as_a_job(job: Job, method: str) -> None:
    """Each changes what its report names and nothing else, and the same job gives the same bytes."""
    job.method = method
    job.state = {f"module.{key}": value for key, value in job.state.items()}
    job.root = {"net": dict(job.state), "epoch": 3}
    job.state = {key.removeprefix("module."): value for key, value in job.state.items()}
    job.evaluation = samples(seed=1)
    heard: list[float] = []
    result = job.run(lambda _phase, _step, _total, fraction: heard.append(fraction))
    first = (job.folder / "output").read_bytes()
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    written = job.output["net"]
    report = result.report
    named = set(report["masks"]) | set(report["values"])
    changed = {
        key for key, value in job.root["net"].items() if not torch.equal(value, written[key])
    }
    assert changed <= named
    assert bool(changed) == (method != "none")
    assert all(bool(value.isfinite().all()) for value in written.values())
    assert report["metrics"]["after"]["accuracy"] is not None
    assert "nothing-changed" not in [warning["code"] for warning in report["warnings"]]
    job.clear()
    again = job.run()
    assert (job.folder / "output").read_bytes() == first
    for part in ("masks", "values", "history", "metrics", "evidence"):
        assert again.report[part] == report[part]


def test_a_model_found_clean_is_returned_unchanged(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is the upload's tensors, and that nothing changed is the answer, not a warning."""
    monkeypatch.setattr("worker.purify.auto.judge", lambda _: Verdict.CLEAN)
    job.method, job.given = "auto", {"steps": 3, "restart_steps": 2, "copies": 1}
    result = job.run()
    assert (result.verdict, result.remediation) == ("clean", "unchanged")
    assert [warning["code"] for warning in result.report["warnings"]] == []
    assert result.report["values"] == {}
    assert all(torch.equal(value, job.output[key]) for key, value in job.state.items())
    assert result.report["evidence"]["triggers"] == []


def test_an_inconclusive_model_is_returned_unchanged_with_a_warning(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The uploader is told why, and what else there is; the model as it came is the chosen candidate."""
    monkeypatch.setattr("worker.purify.auto.judge", lambda _: Verdict.INCONCLUSIVE)
    job.method, job.given = (
        "auto",
        {"steps": 3, "restart_steps": 2, "copies": 1, "strengths": [1.0]},
    )
    result = job.run()
    assert (result.verdict, result.remediation) == ("inconclusive", "unchanged")
    assert [warning["code"] for warning in result.report["warnings"]] == ["inconclusive-unchanged"]
    assert all(torch.equal(value, job.output[key]) for key, value in job.state.items())
    as_it_came, rewritten = result.report["evidence"]["candidates"]
    assert (as_it_came["strength"], as_it_came["chosen"]) == (0.0, True)
    assert (rewritten["strength"], rewritten["chosen"]) == (1.0, False)
    assert as_it_came["sha256"] != rewritten["sha256"]


def test_report_holds_the_evidence_of_a_verdict(job: Job) -> None:
    """Norms of every class, candidates, and triggers as pixels with their colours; all of it JSON."""
    job.method, job.given = "auto", {**QUICK["auto"], "strengths": [0.1, 1.0]}
    result = job.run()
    found = json.loads(json.dumps(result.report["evidence"]))
    assert [entry["class"] for entry in found["classes"]] == list(range(CLASSES))
    assert result.verdict in {"clean", "backdoored", "inconclusive"}
    assert {trigger["class"] for trigger in found["triggers"]} <= set(found["suspects"])
    assert set(found["signs"]) == set(map(str, found["suspects"]))
    assert sum(candidate["chosen"] for candidate in found["candidates"]) == 1
    for trigger in found["triggers"]:
        assert (trigger["kind"] == "patch") == bool(trigger["pixels"])
        assert len(trigger["pixels"]) == len(trigger["mask"]) == len(trigger["pattern"]) <= 64
        assert trigger["mask"] == sorted(trigger["mask"], reverse=True)
        assert all(0 <= row < 8 and 0 <= column < 8 for row, column in trigger["pixels"])
        assert all(len(values) == 3 for values in trigger["pattern"])
    job.clear()
    job.method, job.given = "awm", None
    assert job.run().report["evidence"] is None


def test_every_candidate_lies_beside_the_model(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each strength's result has its digest and size in the report, and the chosen one is the model."""
    monkeypatch.setattr("worker.purify.auto.judge", lambda _: Verdict.BACKDOORED)
    job.method, job.given = "auto", {**QUICK["auto"], "strengths": [0.1, 0.5, 1.0]}
    report = job.run().report
    found = report["evidence"]["candidates"]
    assert [candidate["strength"] for candidate in found] == [0.1, 0.5, 1.0]
    digests = set()
    for number, candidate in enumerate(found):
        base, changed = (
            (job.folder / name).open("rb") for name in ("output", f"candidate-{number}")
        )
        with differences.whole(base, changed) as file:
            content = file.read()
        digest = hashlib.sha256(content).hexdigest()
        assert (candidate["sha256"], candidate["bytes"]) == (digest, len(content))
        assert candidate["chosen"] == (content == (job.folder / "output").read_bytes())
        digests.add(digest)
        written = torch.load(io.BytesIO(content), weights_only=True)
        assert list(written) == list(job.state)
        for key, value in written.items():
            assert value.dtype == job.state[key].dtype
            assert key in report["values"] or torch.equal(value, job.state[key])
    assert len(digests) == 3


def test_triggers_are_tried_on_the_samples(job: Job) -> None:
    """The trial's arrays hold what both models say, and the report's numbers are counted from them."""
    job.method = "auto"
    result = job.run()
    evidence = result.report["evidence"]
    counts = Counts(**evidence["trial"])
    assert (counts.samples, counts.shown) == (20, 20)
    with (job.folder / TRIAL).open("rb") as file:
        arrays = trial_files.read(file, counts, image_shape=(3, 8, 8), classes=CLASSES, samples=20)
    before, after = cnn(job.state), cnn(job.output)
    clean = load_samples(job.folder / "samples", Purpose.SAMPLES).images[arrays["sample"].tolist()]
    assert (arrays["clean"] == clean.numpy()).all()
    assert (arrays["clean_before"] == predict(before, clean).numpy()).all()
    assert (arrays["clean_after"] == predict(after, clean).numpy()).all()
    for number, trigger in enumerate(evidence["triggers"]):
        target, mask = arrays["target"][number], arrays["mask"][number]
        assert trigger["class"] == target
        moved = torch.tensor(arrays["shift"][number]).expand(len(clean), -1, -1, -1)
        bent = bend(torch.tensor(arrays["clean"]), moved).numpy()
        assert (bent != arrays["clean"]).any() == (trigger["kind"] == "warp")
        stamped = bent * (1 - mask) + arrays["pattern"][number] * mask + arrays["added"][number]
        assert arrays["stamped"][number] == pytest.approx(stamped.clip(0, 1), abs=1e-6)
        others = arrays["label"] != target
        for moment, model in (("before", before), ("after", after)):
            answers = predict(model, torch.tensor(arrays["stamped"][number])).numpy()
            assert (arrays[f"stamped_{moment}"][number] == answers).all()
            success = (answers[others] == target).mean()
            assert trigger[f"success_{moment}"] == pytest.approx(success, abs=1e-4)
    job.clear()
    job.method = "awm"
    job.run()
    assert not (job.folder / TRIAL).exists()


def test_method_that_changes_nothing_is_a_warning(job: Job) -> None:
    """A pruning that finds no channel to prune says so; the model is as it was."""
    job.method, job.given = "clp", {"u": 3}
    result = job.run()
    assert [warning["code"] for warning in result.report["warnings"]] == ["nothing-changed"]
    assert all(torch.equal(value, job.output[key]) for key, value in job.state.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_come_back_in_their_own_dtype(job: Job, dtype: torch.dtype) -> None:
    """A checkpoint of another precision is purified and keeps that precision."""
    job.state = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in job.state.items()
    }
    job.root = {"net": job.state, "epoch": 3}
    job.run()
    written = job.output["net"]
    assert {key: value.dtype for key, value in written.items()} == {
        key: value.dtype for key, value in job.state.items()
    }
    assert any(not torch.equal(written[key], job.state[key]) for key in written)


def test_data_parallel_prefix_is_kept(job: Job) -> None:
    """Keys with ``module.`` are purified and come back with it, and are so named in the report."""
    job.root = {f"module.{key}": value for key, value in job.state.items()}
    result = job.run()
    assert list(job.output) == list(job.root)
    assert all(key.startswith("module.") for key in result.report["masks"])


def test_missing_labels_are_predicted_and_reported(job: Job) -> None:
    """Without labels the model's own answers serve, and the report says so."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    job.samples = npz(images=images)
    report = job.run().report
    assert report["samples"]["labels"] == "predicted by the model"
    assert "labels-predicted" in [warning["code"] for warning in report["warnings"]]


def test_normalisation_is_part_of_the_network(job: Job) -> None:
    """The network answers as ``f((x - mean) / std)`` does, not as ``f(x)``."""
    mean, std = (0.9, 0.1, 0.5), (0.05, 0.5, 0.2)
    images = np.random.default_rng(1).random((64, 3, 8, 8), dtype=np.float32)
    shift, scale = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, std))
    model = build("small_cnn", SmallCnnArguments(classes=CLASSES, channels=3, width=4)).eval()
    model.load_state_dict(dict(job.state))
    with torch.no_grad():
        logits = model((torch.from_numpy(images) - shift) / scale)
        # Centred, so that an untrained network gives more than one answer.
        job.state["linear.bias"].sub_(logits.mean(0))
        answers = (logits - logits.mean(0)).argmax(1)
    assert len(answers.unique()) > 1
    job.method = "none"
    job.evaluation = npz(images=images, labels=answers.numpy())
    assert job.run().report["metrics"]["before"]["accuracy"] < 1
    job.clear()
    job.changes = {"mean": mean, "std": std}
    assert job.run().report["metrics"]["before"]["accuracy"] == 1


def test_normaliser_is_per_channel() -> None:
    """``(x - mean) / std`` channel by channel; nothing given is no step at all."""
    images = torch.ones(2, 2, 3, 3)
    apply = normaliser((1.0, 0.0), (2.0, 0.5), device=CPU)
    assert apply is not None
    assert apply(images)[0, :, 0, 0].tolist() == [0.0, 2.0]
    assert normaliser(None, None, device=CPU) is None


def test_triggered_images_of_the_target_class_alone_measure_nothing(job: Job) -> None:
    """When no triggered image is left to count, the attack's success is null and not an error."""
    images = np.zeros((4, 8, 8, 3), np.uint8)
    job.triggered = npz(images=images, labels=np.full(4, 2), target=np.int64(2))
    metrics = job.run().report["metrics"]
    assert metrics["after"]["attack_success_rate"] is None


def test_progress_never_goes_back(job: Job) -> None:
    """The fraction grows from 0 to 1 over all phases, whatever they cost."""
    job.evaluation = samples(seed=1, per_class=100)
    heard: list[tuple[str, float]] = []
    job.run(lambda phase, _step, _total, fraction: heard.append((phase, fraction)))
    fractions = [fraction for _, fraction in heard]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    phases = list(dict.fromkeys(phase for phase, _ in heard))
    assert phases == ["load", "measure", "purify", "measure again", "save"]


def test_written_model_is_verified(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was not written as it was meant is never offered."""
    honest = checkpoints.save

    def corrupt(checkpoint: checkpoints.Checkpoint, path: Path) -> None:
        honest(checkpoint, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoints, "save", corrupt)
    with pytest.raises(InternalError):
        job.run()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architecture": "no_such_net"}, UnknownArchitecture),
        ({"method": "no_such_method"}, UnknownMethod),
        ({"classes": 2}, ClassCountMismatch),
    ],
)
def test_worker_trusts_no_specification(
    job: Job, changes: dict[str, Any], problem: type[Exception]
) -> None:
    """What the service should have refused is refused again here."""
    job.changes = changes
    with pytest.raises(problem):
        job.run()


def test_images_of_another_shape_are_refused(job: Job) -> None:
    """An evaluation set of another shape than the samples is refused by name."""
    job.evaluation = npz(images=np.zeros((2, 9, 9, 3), np.uint8), labels=np.zeros(2, np.int64))
    with pytest.raises(InvalidImages):
        job.run()


def test_search_that_does_not_move_is_a_warning(job: Job) -> None:
    """A perturbation that stays near 0 is no sign of a clean model, and the report says so."""
    params = METHODS["awm"].resolve(
        METHODS["awm"].parameters(epochs=2, passes=1, perturbation_lr=1e-9),
        count=20,
        classes=CLASSES,
        image_shape=(3, 8, 8),
    )
    job.changes = {"params": params.model_dump()}
    assert [warning["code"] for warning in job.run().report["warnings"]] == ["perturbation-stalled"]


def test_samples_that_teach_nothing_are_refused(job: Job) -> None:
    """Black images would let the masks' norm erase the whole model: a problem, not a result."""
    method = METHODS["awm"]
    resolved = method.resolve(method.parameters(), count=20, classes=CLASSES, image_shape=(3, 8, 8))
    job.samples = npz(
        images=np.zeros((20, 8, 8, 3), dtype=np.uint8), labels=np.arange(20) % CLASSES
    )
    job.changes = {"params": resolved.model_dump()}
    with pytest.raises(NothingLearned):
        job.run()


def test_bad_parameter_is_the_clients(job: Job) -> None:
    """A parameter that the library refuses is a problem of the request, not a crash."""
    given = METHODS["awm"].resolve(
        METHODS["awm"].parameters(), count=20, classes=CLASSES, image_shape=(3, 8, 8)
    )
    job.changes = {"params": {**given.model_dump(), "epochs": 0}}
    with pytest.raises(InvalidParameter):
        job.run()
