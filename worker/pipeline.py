"""
One job from files to files: load → measure → purify → measure → save → verify.

It knows folders and tensors; it knows no queue, no database and no blob store.
"""

import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from common import __version__
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
from worker.normalise import normaliser
from worker.purify import metrics
from worker.purify.awm import AdversarialWeightMasking, Purified
from worker.purify.errors import NotEnoughData, NotFinite, PurificationError
from worker.purify.masking import fold
from worker.samples import Samples, load_samples

T = TypeVar("T")
Report = dict[str, Any]
Progress = Callable[[str, int, int, float], None]
"""Called with phase, step, total and the fraction of the whole job that is done."""

# What an image costs, counted in forward passes: one to measure it, about ten to purify with it
# once (a backward pass costs two, and a pass of either half of an epoch runs the model twice).
_PURIFY_COST = 10
_PREDICT_BATCH = 256


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


@dataclass(frozen=True, kw_only=True)
class _Network:
    """A network on its device, with what happens to an image before it."""

    model: nn.Module
    preprocess: metrics.Preprocess | None

    def predict(self, images: Tensor, tick: Callable[[int], None]) -> Tensor:
        """Return the class of each image; *tick* hears how many were done."""
        found = [torch.zeros(0, dtype=torch.int64)]
        for batch in images.split(_PREDICT_BATCH):
            found.append(metrics.predict(self.model, batch, preprocess=self.preprocess))
            tick(len(batch))
        return torch.cat(found)


@dataclass(frozen=True, kw_only=True)
class _Yardstick:
    """The sets that only measure; purification never sees them."""

    evaluation: Samples | None
    triggered: Samples | None

    @property
    def sets(self) -> dict[str, Samples]:
        """The sets that are there."""
        sets = {"evaluation": self.evaluation, "triggered": self.triggered}
        return {name: samples for name, samples in sets.items() if samples is not None}

    @property
    def size(self) -> int:
        """How many images there are."""
        return sum(len(samples.images) for samples in self.sets.values())

    def answers(self, network: _Network, tick: Callable[[int], None]) -> dict[str, Tensor]:
        """Return the network's answers on each set."""
        return {name: network.predict(samples.images, tick) for name, samples in self.sets.items()}

    def measure(self, answers: dict[str, Tensor]) -> dict[str, float | None]:
        """Return ACC, ASR and RA; what cannot be measured is ``None``."""
        accuracy = success = robust = None
        if self.evaluation is not None:
            labels = _present(self.evaluation.labels)
            accuracy = metrics.accuracy(answers["evaluation"], labels)
        if self.triggered is not None:
            labels, targets = _present(self.triggered.labels), _present(self.triggered.targets)
            if bool((labels != targets).any()):
                success = metrics.attack_success_rate(answers["triggered"], labels, targets)
                robust = metrics.robust_accuracy(answers["triggered"], labels, targets)
        return {
            "accuracy": accuracy,
            "attack_success_rate": success,
            "robust_accuracy": robust,
        }


class _Meter:
    """Turns what is done in each phase into the fraction of the whole job that is done."""

    def __init__(self, publish: Progress, *, measure: int, purify: int) -> None:
        self._publish = publish
        self._costs = {"measure": measure, "purify": purify, "measure again": measure}
        self._total = max(sum(self._costs.values()), 1)

    def phase(self, name: str, total: int) -> Callable[[int], None]:
        """Begin a phase of *total* steps; return a function that hears of further steps done."""
        before = 0
        for phase, cost in self._costs.items():
            if phase == name:
                break
            before += cost
        done = 0

        def tick(steps: int) -> None:
            nonlocal done
            done += steps
            part = self._costs[name] * done / max(total, 1)
            # The last hundredth is for saving and verifying.
            self._publish(name, done, total, 0.99 * (before + part) / self._total)

        tick(0)
        return tick


def sanitise(files: Files, spec: JobSpec, *, device: torch.device, progress: Progress) -> Result:
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
    yardstick = _Yardstick(
        evaluation=None if files.evaluation is None else load_samples(files.evaluation),
        triggered=None if files.triggered is None else load_samples(files.triggered),
    )
    for found in (samples, yardstick.evaluation, yardstick.triggered):
        _check_samples(found, spec)

    meter = _Meter(progress, measure=yardstick.size, purify=_purification_cost(spec))
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
        "metrics": _metrics(yardstick, answers_before, answers_after),
        "samples": _describe_samples(samples, labels, spec.classes),
        "masks": masked,
        "history": [] if purified is None else [vars(record) for record in purified.history],
        "warnings": _warnings(samples, labels, spec, yardstick),
        "environment": _environment(device),
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


def _network(spec: JobSpec, checkpoint: Checkpoint, device: torch.device) -> _Network:
    architecture = ARCHITECTURES.get(spec.architecture)
    if architecture is None:
        raise UnknownArchitecture(f"This worker cannot build {spec.architecture!r}.")
    model = build(spec.architecture, architecture.arguments.model_validate(spec.architecture_args))
    checkpoints.fill(model, checkpoint)
    return _Network(
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
    spec: JobSpec, network: _Network, images: Tensor, labels: Tensor, meter: _Meter
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
            except (PurificationError, NotEnoughData) as exc:
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


def _metrics(yardstick: _Yardstick, before: dict[str, Tensor], after: dict[str, Tensor]) -> Report:
    measured_before, measured_after = yardstick.measure(before), yardstick.measure(after)
    agreement = fidelity = None
    if "evaluation" in before:
        agreement = metrics.agreement(before["evaluation"], after["evaluation"])
        fidelity = metrics.fidelity(
            _present(measured_before["accuracy"]),
            _present(measured_after["accuracy"]),
            measured_before["attack_success_rate"],
            measured_after["attack_success_rate"],
        )
    return {
        "before": measured_before,
        "after": {**measured_after, "agreement": agreement, "fidelity": fidelity},
    }


def _describe_samples(samples: Samples, labels: Tensor, classes: int) -> Report:
    per_class = Counter(labels.tolist())
    return {
        "count": len(samples.images),
        "classes": classes,
        "per_class": {str(label): per_class[label] for label in sorted(per_class)},
        "labels": "given" if samples.labels is not None else "predicted by the model",
    }


def _warnings(
    samples: Samples, labels: Tensor, spec: JobSpec, yardstick: _Yardstick
) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    absent = sorted(set(range(spec.classes)) - set(labels.tolist()))
    if absent:
        shown = ", ".join(map(str, absent[:20])) + (", …" if len(absent) > 20 else "")
        found.append(
            {
                "code": "classes-without-samples",
                "detail": f"{len(absent)} of {spec.classes} classes have no clean sample "
                f"({shown}); accuracy on them is not protected.",
            }
        )
    if samples.labels is None:
        found.append(
            {
                "code": "labels-predicted",
                "detail": "The samples have no labels; the model's own predictions were used.",
            }
        )
    if yardstick.triggered is not None and yardstick.evaluation is None:
        found.append(
            {
                "code": "accuracy-not-measured",
                "detail": "Without an evaluation set, accuracy and fidelity were not measured.",
            }
        )
    return found


def _environment(device: torch.device) -> Report:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "weightwash": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _present(value: T | None) -> T:
    """Return a value that the gate has made sure of."""
    assert value is not None
    return value
