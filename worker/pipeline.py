"""
One job from files to files, in three stages: convert, purify, pack.

Each stage leaves files for the next one, since each may run in a process of its own (``child.py``).
``sanitise`` runs all three in this one. They know folders and tensors; they know no queue, no database
and no blob store.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import (
    ArchitectureMismatch,
    InvalidParameter,
    NothingLearned,
    NothingToMask,
    Refused,
    TooFewSamples,
    UnknownMethod,
    WeightsNotFinite,
)
from common.spec import JobSpec
from worker import checkpoints, conversion
from worker.architectures.registry import construct
from worker.checkpoints import Checkpoint
from worker.conversion import Uploads
from worker.determinism import noticing
from worker.joining import with_candidates
from worker.meter import Meter, Publish
from worker.methods import METHODS
from worker.normalise import normaliser
from worker.packing import pack, write_changes
from worker.purify import errors as purify_errors
from worker.purify.errors import PurificationError
from worker.purify.method import Method, Purified
from worker.report import Report, describe_samples, environment, evidence, warnings
from worker.trial_files import TRIAL
from worker.trials import Trial, Tried
from worker.yardstick import Network, Yardstick, compare

_PROBLEMS: Mapping[type[PurificationError], type[Refused]] = {
    purify_errors.NothingToMask: NothingToMask,
    purify_errors.NothingLearned: NothingLearned,
    purify_errors.NotEnoughData: TooFewSamples,
    purify_errors.NotFinite: WeightsNotFinite,
    purify_errors.UnusableModel: ArchitectureMismatch,
}


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one job, all in its own folder; candidates and trial are written beside the output."""

    model: Path
    samples: Path
    evaluation: Path | None
    triggered: Path | None
    output: Path


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job comes to; its files lie where they were asked for."""

    verdict: str | None
    remediation: str
    report: Report


def sanitise(files: Files, spec: JobSpec, *, device: torch.device, progress: Publish) -> Result:
    """
    Purify one model, all in this process.

    Raises:
        Refused: A file or a parameter is not what the specification says.
        InternalError: The written model is not the one that was meant.
    """
    started = time.monotonic()
    uploads = Uploads(
        model=files.model,
        samples=files.samples,
        evaluation=files.evaluation,
        triggered=files.triggered,
    )
    with tempfile.TemporaryDirectory(dir=files.output.parent) as name:
        converted, changes = Path(name, "converted"), Path(name, "changes")
        converted.mkdir()
        changes.mkdir()
        progress("load", 0, 1, 0.0)
        conversion.convert(uploads, spec, converted)
        result = purify(converted, spec, changes, device=device, progress=progress)
        progress("save", 0, 1, 0.99)
        written = pack(files.model, spec.model.format, changes, files.output)
        if (changes / TRIAL).exists():
            (changes / TRIAL).rename(files.output.with_name(TRIAL))
    with_candidates(result.report, written)
    result.report["seconds"]["total"] = round(time.monotonic() - started, 3)
    progress("save", 1, 1, 1.0)
    return result


def purify(
    converted: Path, spec: JobSpec, target: Path, *, device: torch.device, progress: Publish
) -> Result:
    """
    Purify what was converted; write what changes, and the trial of the triggers, to *target*.

    The report lacks what only packing knows: the candidates' files.

    Raises:
        Refused: A parameter is not what the specification says, or the method finds nothing to do.
        InternalError: The conversion left something else than it must.
    """
    started = time.monotonic()
    found = conversion.load(converted, spec)
    checkpoint, samples = found.weights, found.samples
    network = _network(spec, checkpoint, device)
    method = _method(spec)
    yardstick = Yardstick(evaluation=found.evaluation, triggered=found.triggered)

    meter = Meter(
        progress,
        measure=yardstick.size,
        purify=0 if method is None else method.cost(spec.samples.count),
    )
    answers_before = yardstick.answers(network, meter.phase("measure", yardstick.size))
    labels = samples.labels
    if labels is None:
        labels = network.predict(samples.images, lambda _: None)

    purifying = time.monotonic()
    purified, nondeterministic = None, list[str]()
    if method is not None:
        with noticing() as nondeterministic:
            purified = _purify(method, network, samples.images, labels, spec.seed, meter)
    purify_seconds = time.monotonic() - purifying
    trial = Trial.of(() if purified is None else purified.triggers, samples.images, labels)
    tried_before = trial.answers(network)
    others = _candidates(checkpoint, purified)
    changes, changed = _apply(checkpoint, purified)

    checkpoints.fill(network.model, checkpoint)  # the weights as they will be downloaded
    tried = Tried(trial=trial, before=tried_before, after=trial.answers(network))
    answers_after = yardstick.answers(network, meter.phase("measure again", yardstick.size))

    write_changes(target, changed, others)
    tried.write(target / TRIAL)
    report: Report = {
        "metrics": compare(yardstick, answers_before, answers_after),
        "samples": describe_samples(samples, labels, spec.classes),
        **changes,
        "evidence": evidence(purified, tried),
        "history": [] if purified is None else list(purified.history),
        "warnings": warnings(samples, labels, spec, yardstick, purified),
        "environment": environment(device, purified, nondeterministic),
        "seconds": {
            "total": round(time.monotonic() - started, 3),
            "purify": round(purify_seconds, 3),
        },
    }
    return Result(
        verdict=None if purified is None else purified.verdict,
        remediation="unchanged" if _is_unchanged(purified) else "purified",
        report=report,
    )


def _is_unchanged(purified: Purified | None) -> bool:
    """Tell whether nothing was asked for, or nothing was done because of the verdict."""
    return purified is None or (purified.verdict is not None and not purified.values)


def _network(spec: JobSpec, checkpoint: Checkpoint, device: torch.device) -> Network:
    model = construct(
        spec.architecture,
        spec.architecture_args,
        shapes={key: tuple(tensor.shape) for key, tensor in checkpoint.tensors.items()},
        image_shape=spec.samples.image_shape,
    )
    checkpoints.fill(model, checkpoint)
    return Network(
        model=model.to(device).eval(),
        preprocess=normaliser(spec.mean, spec.std, device=device),
    )


def _method(spec: JobSpec) -> Method | None:
    """
    Return the method with its parameters, or ``None`` for the one that changes nothing.

    Raises:
        UnknownMethod: This worker does not have it.
        InvalidParameter: A parameter is out of bounds.
    """
    if spec.method == "none":
        return None
    if spec.method not in METHODS:
        raise UnknownMethod(f"This worker has no method {spec.method!r}.")
    try:
        return METHODS[spec.method](**spec.params)
    except PurificationError as exc:
        raise InvalidParameter(str(exc)) from exc


def _purify(
    method: Method, network: Network, images: Tensor, labels: Tensor, seed: int, meter: Meter
) -> Purified:
    tick: Callable[[int], None] | None = None

    def report_step(_step: int, total: int) -> None:
        nonlocal tick
        if tick is None:
            tick = meter.phase("purify", total)
        tick(1)

    try:
        return method.purify(
            network.model,
            images,
            labels,
            preprocess=network.preprocess,
            seed=seed,
            progress=report_step,
        )
    except PurificationError as exc:
        problem = next(
            (problem for kind, problem in _PROBLEMS.items() if isinstance(exc, kind)),
            InvalidParameter,
        )
        raise problem(str(exc)) from exc


def _candidates(checkpoint: Checkpoint, purified: Purified | None) -> list[dict[str, Tensor]]:
    """Return what each candidate changes, as the tensors that it has then."""
    if purified is None:
        return []
    changed = []
    for values in purified.candidates:
        after = Purified(values=values).apply(checkpoint.tensors)
        changed.append({key: after[key].clone() for key in values})
    return changed


def _apply(
    checkpoint: Checkpoint, purified: Purified | None
) -> tuple[Report, Mapping[str, Tensor]]:
    """Write the changes into the weights; return what they came to, and the changed tensors."""
    masks: Report = {}
    values: Report = {}
    if purified is None:
        return {"masks": masks, "values": values}, {}
    after = purified.apply(checkpoint.tensors)
    for key, mask in purified.masks.items():
        masks[checkpoint.prefix + key] = {
            "weights": mask.numel(),
            "mean": round(float(mask.mean()), 6),
            "below_half": int((mask < 0.5).sum()),
        }
    for key in purified.values:
        before = checkpoint.tensors[key].double()
        values[checkpoint.prefix + key] = {
            "weights": before.numel(),
            "relative_change": round(
                float((after[key] - before).norm() / before.norm().clamp_min(1e-12)), 6
            ),
        }
    changed = sorted(purified.masks.keys() | purified.values.keys())
    for key in changed:
        checkpoint.replace(key, after[key])
    return {"masks": masks, "values": values}, {key: checkpoint.tensors[key] for key in changed}
