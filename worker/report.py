"""What a report says beside the numbers: the samples, the warnings, the machine."""

import platform
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import __version__
from common.spec import JobSpec
from worker.purify.detection.recovered import Recovered
from worker.purify.detection.trigger import ELSEWHERE
from worker.purify.method import Purified
from worker.samples import Samples
from worker.trials import Tried
from worker.yardstick import Yardstick

Report = dict[str, Any]

_MAX_CLASSES_SHOWN = 20
_MAX_PIXELS_SHOWN = 256  # of a trigger; a report is not an image format
_STALLED_FRACTION = 0.1  # of tau; a search that moves at all reaches tau


def describe_samples(samples: Samples, labels: Tensor, classes: int) -> Report:
    """Return how many samples there are of each class, and where the labels come from."""
    per_class = Counter(labels.tolist())
    return {
        "count": len(samples.images),
        "classes": classes,
        "per_class": {str(label): per_class[label] for label in sorted(per_class)},
        "labels": "given" if samples.labels is not None else "predicted by the model",
    }


def evidence(purified: Purified | None, tried: Tried) -> Report | None:
    """
    Return what a verdict rests on, or None where nothing was looked for.

    A patch is given as the pixels that it replaces by more than one grey level: ``[row, column]``, how
    much of each (``mask``), and the channels' new values in [0, 1] (``pattern``). Of what adds to every
    pixel, or moves it, only the size is.

    Args:
        tried: What its triggers do to the uploader's samples.
    """
    if purified is None or purified.verdict is None:
        return None
    return {
        **purified.findings,
        "triggers": [
            {**_described(trigger), **tried.success(number)}
            for number, trigger in enumerate(purified.triggers)
        ],
        "trial": asdict(tried.trial.counts) if tried.trial.triggers else None,
    }


def _described(trigger: Recovered) -> Report:
    """Return a trigger as plain values, the strongest pixels first."""
    mask = trigger.mask[0]
    rows, columns = torch.nonzero(mask > 1 / 255, as_tuple=True)
    order = mask[rows, columns].argsort(descending=True, stable=True)[:_MAX_PIXELS_SHOWN]
    rows, columns = rows[order], columns[order]
    pattern = trigger.pattern[:, rows, columns].T
    return {
        "class": None if trigger.target == ELSEWHERE else trigger.target,
        "kind": str(trigger.kind),
        "norm": round(trigger.norm, 3),
        "success": round(trigger.success, 4),
        "pixels": torch.stack([rows, columns], dim=1).tolist(),
        "mask": [round(value, 3) for value in mask[rows, columns].tolist()],
        "pattern": [[round(value, 3) for value in values] for values in pattern.tolist()],
    }


def warnings(
    samples: Samples,
    labels: Tensor,
    spec: JobSpec,
    yardstick: Yardstick,
    purified: Purified | None,
) -> list[dict[str, str]]:
    """Return what the uploader should know before relying on the result."""
    found: list[dict[str, str]] = []
    absent = sorted(set(range(spec.classes)) - set(labels.tolist()))
    if absent:
        shown = ", ".join(map(str, absent[:_MAX_CLASSES_SHOWN])) + (
            ", …" if len(absent) > _MAX_CLASSES_SHOWN else ""
        )
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
    if purified is not None and purified.verdict == "inconclusive" and not purified.values:
        found.append(
            {
                "code": "inconclusive-unchanged",
                "detail": "One class is easier to reach than an ordinary one, but not by so much that it "
                "must be a backdoor; the model is as it was uploaded. Send more clean samples, or "
                "take one of the report's other candidates, or set params.force.",
            }
        )
    elif purified is not None and purified.verdict != "clean" and not _changes_anything(purified):
        found.append(
            {
                "code": "nothing-changed",
                "detail": f"The method {spec.method!r} found nothing to change, so that the model is as "
                "it was uploaded; try other parameters, or another method.",
            }
        )
    if purified is not None and spec.method == "awm":
        found.extend(_stalled(purified, tau=float(spec.params["tau"])))
    return found


def _changes_anything(purified: Purified) -> bool:
    return bool(purified.values) or any(bool((mask != 1).any()) for mask in purified.masks.values())


def _stalled(purified: Purified, *, tau: float) -> list[dict[str, str]]:
    """Warn of a search that did not move: it found nothing to unlearn, which proves nothing."""
    epochs = len(purified.history)
    stalled = sum(
        record["perturbation_norm"] < _STALLED_FRACTION * tau for record in purified.history
    )
    if 2 * stalled < epochs:
        return []
    return [
        {
            "code": "perturbation-stalled",
            "detail": f"In {stalled} of {epochs} epochs the search for a perturbation did not move, "
            "so that little was unlearned; raise perturbation_lr.",
        }
    ]


def environment(
    device: torch.device, purified: Purified | None, nondeterministic: list[str]
) -> Report:
    """
    Return what decides, beside input and seed, which bytes come out.

    Args:
        nondeterministic: Operations of the run whose results may differ from run to run.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "weightwash": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "computed_in": None if purified is None else purified.computed_in,
        "deterministic": torch.are_deterministic_algorithms_enabled() and not nondeterministic,
        "nondeterministic_operations": nondeterministic,
    }
