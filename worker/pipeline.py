"""
One job from files to files: load → measure → purify → measure → save → verify.

It knows folders and tensors; it knows no queue, no database and no blob store.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.catalogue.architectures import ARCHITECTURES
from common.errors import (
    ClassCountMismatch,
    InternalError,
    InvalidImages,
    InvalidLabels,
    InvalidParameter,
    Refused,
    UnknownArchitecture,
    UnknownMethod,
    WeightsNotFinite,
)
from common.spec import JobSpec
from worker import checkpoints
from worker.architectures.registry import build
from worker.checkpoints import Checkpoint
from worker.meter import Meter, Publish
from worker.normalise import normaliser
from worker.purify.awm import AdversarialWeightMasking, Purified
from worker.purify.errors import NotFinite, PurificationError
from worker.purify.masking import fold
from worker.report import Report, describe_samples, environment, warnings
from worker.samples import Samples, load_samples
from worker.yardstick import Network, Yardstick, compare

# What an image costs, counted in forward passes: one to measure it, about ten to purify with it
# once (a backward pass costs two, and a pass of either half of an epoch runs the model twice).
_PURIFY_COST = 10


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one job, all in its own folder."""

    model: Path
    samples: Path
    evaluation: Path | None
    triggered: Path | None
    output: Path


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job comes to; the model lies in ``Files.output``."""

    verdict: str | None
    remediation: str
    report: Report


def sanitise(files: Files, spec: JobSpec, *, device: torch.device, progress: Publish) -> Result:
    """
    Purify one model.

    Raises:
        Refused: A file or a parameter is not what the specification says.
        InternalError: The written model is not the one that was meant.
    """
    started = time.monotonic()
    progress("load", 0, 1, 0.0)
    checkpoint = checkpoints.load(files.model, spec.model.format)
    network = _network(spec, checkpoint, device)
    samples = load_samples(files.samples)
    yardstick = Yardstick(
        evaluation=None if files.evaluation is None else load_samples(files.evaluation),
        triggered=None if files.triggered is None else load_samples(files.triggered),
    )
    for found in (samples, yardstick.evaluation, yardstick.triggered):
        _check_samples(found, spec)

    meter = Meter(progress, measure=yardstick.size, purify=_purification_cost(spec))
    answers_before = yardstick.answers(network, meter.phase("measure", yardstick.size))
    labels = samples.labels
    if labels is None:
        labels = network.predict(samples.images, lambda _: None)

    purifying = time.monotonic()
    purified = _purify(spec, network, samples.images, labels, meter)
    purify_seconds = time.monotonic() - purifying
    masked = {} if purified is None else _fold(checkpoint, purified)

    checkpoints.fill(network.model, checkpoint)  # the weights as they will be downloaded
    answers_after = yardstick.answers(network, meter.phase("measure again", yardstick.size))

    progress("save", 0, 1, 0.99)
    checkpoints.save(checkpoint, files.output)
    _verify(files.output, spec, checkpoint)
    report: Report = {
        "metrics": compare(yardstick, answers_before, answers_after),
        "samples": describe_samples(samples, labels, spec.classes),
        "masks": masked,
        "history": [] if purified is None else [vars(record) for record in purified.history],
        "warnings": warnings(samples, labels, spec, yardstick, purified),
        "environment": environment(device),
        "seconds": {
            "total": round(time.monotonic() - started, 3),
            "purify": round(purify_seconds, 3),
        },
    }
    progress("save", 1, 1, 1.0)
    return Result(
        verdict=None,
        remediation="unchanged" if purified is None else "purified",
        report=report,
    )


def _network(spec: JobSpec, checkpoint: Checkpoint, device: torch.device) -> Network:
    architecture = ARCHITECTURES.get(spec.architecture)
    if architecture is None:
        raise UnknownArchitecture(f"This worker cannot build {spec.architecture!r}.")
    model = build(spec.architecture, architecture.arguments.model_validate(spec.architecture_args))
    checkpoints.fill(model, checkpoint)
    return Network(
        model=model.to(device).eval(),
        preprocess=normaliser(spec.mean, spec.std, device=device),
    )


def _check_samples(samples: Samples | None, spec: JobSpec) -> None:
    if samples is None:
        return
    if tuple(samples.images.shape[1:]) != spec.samples.image_shape:
        raise InvalidImages(
            f"Images of the shape {tuple(samples.images.shape[1:])} lie beside samples of the "
            f"shape {spec.samples.image_shape}."
        )
    for classes in (samples.labels, samples.targets):
        if classes is None:
            continue
        if classes.shape != (len(samples.images),):
            raise InvalidLabels
        if int(classes.min()) < 0 or int(classes.max()) >= spec.classes:
            raise ClassCountMismatch


def _purify(
    spec: JobSpec, network: Network, images: Tensor, labels: Tensor, meter: Meter
) -> Purified | None:
    """Return the masks, or ``None`` for the method that changes nothing."""
    tick: Callable[[int], None] | None = None

    def report_step(_step: int, total: int) -> None:
        nonlocal tick
        if tick is None:
            tick = meter.phase("purify", total)
        tick(1)

    match spec.method:
        case "none":
            return None
        case "awm":
            try:
                return AdversarialWeightMasking(**spec.params).purify(
                    network.model,
                    images,
                    labels,
                    preprocess=network.preprocess,
                    seed=spec.seed,
                    progress=report_step,
                )
            except NotFinite as exc:
                raise WeightsNotFinite(str(exc)) from exc
            except PurificationError as exc:
                raise InvalidParameter(str(exc)) from exc
        case _:
            raise UnknownMethod(f"This worker has no method {spec.method!r}.")


def _purification_cost(spec: JobSpec) -> int:
    """Return about how many forward passes of one image the method will cost."""
    match spec.method:
        case "awm":
            images = spec.samples.count * (1 + int(spec.params["augmentations"]))
            rounds = spec.params["epochs"] * spec.params["passes"]
            return int(_PURIFY_COST * rounds * images)
        case _:
            return 0


def _fold(checkpoint: Checkpoint, purified: Purified) -> Report:
    """Fold the masks into the checkpoint and return what they came to, by tensor."""
    summary: Report = {}
    for key, mask in purified.masks.items():
        checkpoint.replace(key, fold(checkpoint.tensors[key], mask))
        summary[checkpoint.prefix + key] = {
            "weights": mask.numel(),
            "mean": round(float(mask.mean()), 6),
            "below_half": int((mask < 0.5).sum()),
        }
    return summary


def _verify(output: Path, spec: JobSpec, checkpoint: Checkpoint) -> None:
    """Load what was written, from the bytes, and compare it with what was meant."""
    try:
        written = checkpoints.load(output, spec.model.format)
    except Refused as exc:
        raise InternalError(f"The written model cannot be loaded: {exc}") from exc
    meant = dict(checkpoint.tensors)
    container_is_whole = spec.model.format == "safetensors" or checkpoints.identical(
        written.root, checkpoint.root
    )
    if not container_is_whole or not checkpoints.identical(dict(written.tensors), meant):
        raise InternalError("The written model differs from the one that was meant.")
