"""
Purify digits and models of the zoo as a job would, with the preset, and measure what is left.

A trial is a model, clean samples for it and what is known of the attack. For digits one seed decides
both the training and the draw of samples; a model of the zoo is what it is, and the seed draws.
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from benchmarks import zoo
from benchmarks.harness import Row
from benchmarks.subjects import compare, draw, load_model
from common.catalogue.methods import METHODS as CATALOGUE
from examples import digits
from worker.methods import METHODS
from worker.purify.detection.verdict import Verdict
from worker.purify.method import Purified
from worker.purify.metrics import fidelity

DIGITS_BACKDOORED, DIGITS_CLEAN = DIGITS = ("digits backdoored", "digits clean")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """
    Hold a model, clean samples for it, and how it is measured.

    Attributes:
        images: ``(N, C, H, W)`` in [0, 1].
        target: The class that triggered images are sent to; None where there is not one such class.
        compare: Return ACC, ASR and fidelity of the model and of another, on images that were not drawn;
            None for the ASR of a clean one.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    classes: int
    target: int | None
    compare: Callable[[nn.Module, nn.Module], Row]


def trial(model: str, seed: int, data: Path, device: str = "cpu") -> Trial:
    """
    Return a trial of digits or of the zoo's model of that name, with one sample per class.

    Args:
        device: Of a model of the zoo; digits are always on the CPU.
    """
    if model in DIGITS:
        return digits_trial(seed, backdoored=model == DIGITS_BACKDOORED)
    subject = zoo.provide(model, data)
    samples = draw(subject, data, per_class=1, seed=seed)
    return Trial(
        model=load_model(subject, data).to(device),
        images=samples.images,
        labels=samples.labels,
        classes=subject.classes,
        target=subject.target,
        compare=functools.partial(compare, subject, samples),
    )


def digits_trial(seed: int, *, backdoored: bool = True, per_class: int = 1) -> Trial:
    """Train on digits, the demo's way, and draw samples."""
    train = digits.train_backdoored if backdoored else digits.train_clean
    model, split = train(seed)
    images, labels, rest = digits.draw_clean_samples(split, per_class, seed)

    def compare_digits(before: nn.Module, after: nn.Module) -> Row:
        (acc_before, asr_before), (acc_after, asr_after) = (
            digits.measure(network, rest) for network in (before, after)
        )
        row: Row = {
            "acc_before": acc_before,
            "asr_before": asr_before if backdoored else None,
            "acc_after": acc_after,
            "asr_after": asr_after if backdoored else None,
        }
        return {**row, "fidelity": fidelity(**row)}

    return Trial(
        model=model,
        images=images,
        labels=labels,
        classes=digits.ARGUMENTS.classes,
        target=digits.TARGET if backdoored else None,
        compare=compare_digits,
    )


def truth(model: str) -> Verdict:
    """Return the verdict that would be right about digits, or about the zoo's model of that name."""
    backdoored = (
        model == DIGITS_BACKDOORED if model in DIGITS else zoo.RECIPES[model].stamp is not None
    )
    return Verdict.BACKDOORED if backdoored else Verdict.CLEAN


def run(tried: Trial, method: str, *, seed: int, **given: object) -> tuple[Purified, Row]:
    """Return what a method did with its preset, but for what is *given*, and what came of it."""
    purified, seconds = purify(
        method,
        tried.model,
        tried.images,
        tried.labels,
        classes=tried.classes,
        seed=seed,
        **given,
    )
    after = copy.deepcopy(tried.model)
    after.load_state_dict(purified.apply(tried.model.state_dict()))
    row = {**tried.compare(tried.model, after), "seconds": round(seconds, 2)}
    return purified, row if purified.verdict is None else {**row, "verdict": str(purified.verdict)}


def purify(
    method: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    seed: int,
    **given: object,
) -> tuple[Purified, float]:
    """Purify with the preset, but for the parameters that are *given*; return seconds as well."""
    entry = CATALOGUE[method]
    channels, height, width = images.shape[1:]
    params = entry.resolve(
        entry.parameters.model_validate(given),
        count=len(images),
        classes=classes,
        image_shape=(channels, height, width),
    )
    started = time.perf_counter()
    purified = METHODS[method](**params.model_dump()).purify(model, images, labels, seed=seed)
    return purified, time.perf_counter() - started
