"""
Name the methods of purification, their parameters, and the presets that fill what is not given.

Torch-free, so that the service can validate and list them without a worker.
"""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from common.catalogue.alternatives import ALTERNATIVES
from common.catalogue.auto import AUTO
from common.catalogue.method import (
    AscentRate,
    BatchSize,
    Copies,
    Decay,
    DescentRate,
    Epochs,
    ImageShape,
    Method,
    MethodParameters,
    Norm,
    Passes,
    Penalty,
    Precision,
    Samples,
    ShrinkEpochs,
    Weight,
)

PAPER_SHAPE: ImageShape = (3, 32, 32)
TAU = 1000.0
ONE_SHOT_TAU = 100.0

# Below a quarter of the paper's 3072 values an epoch costs next to nothing, and its 100 steps with 50
# samples end wherever the last perturbations left them: docs/decisions/0001-presets-off-the-paper.md.
SMALL_IMAGE_VALUES = math.prod(PAPER_SHAPE) // 4
SMALL_TAU_FACTOR = 1.44


class AwmParameters(MethodParameters):
    """Hold the parameters of Adversarial Weight Masking, named as in the paper."""

    epochs: Epochs | None = Field(
        None, description="Outer epochs. Preset: 20; 200 for images of fewer than 768 values."
    )
    passes: Passes | None = Field(
        None,
        description="Passes through the samples in each half of an epoch. Preset: 5; 2 for images of "
        "fewer than 768 values.",
    )
    batch_size: BatchSize | None = Field(
        None,
        description="Images per step. Preset: 128, 32 with one sample per class, 10 for images of "
        "fewer than 768 values; at most all samples.",
    )
    alpha: Weight | None = Field(
        None,
        description="α, weight of the loss on clean images. Preset: 0.9; 0.8 for images of fewer than "
        "768 values; 0.99 for one sample per class and up to ten classes.",
    )
    beta: Penalty | None = Field(
        None, description="β, weight of the loss on perturbed images. Preset: 1 - α."
    )
    gamma: Penalty | None = Field(
        None, description="γ, weight of the masks' L1 norm. Preset: 1e-8."
    )
    tau: Norm | None = Field(
        None,
        description="τ, limit of the perturbation's L1 norm. Preset: 1000, 100 for one sample per "
        "class; times C·H·W / 3072 for images smaller than 3x32x32, and 1.44 times that for images "
        "of fewer than 768 values.",
    )
    perturbation_lr: AscentRate | None = Field(
        None, description="Step size of the search for the perturbation. Preset: 1000."
    )
    mask_lr: DescentRate | None = Field(
        None, description="Learning rate of Adam on the masks. Preset: 0.01."
    )
    augmentations: Copies | None = Field(
        None,
        description="Randomly cropped copies added for each sample. Preset: 0; 9 for one sample "
        "per class and up to ten classes.",
    )
    flip: bool | None = Field(
        None,
        description="Mirror half of those copies; turn it off where left and right matter, as in "
        "digits and road signs. Preset: true where copies of colour images are made, else false.",
    )
    mask_linear: bool | None = Field(
        None, description="Mask linear layers too, not only convolutions. Preset: false."
    )
    shrink_epochs: ShrinkEpochs | None = Field(
        None,
        description="Epochs that only shrink the masks on clean images, before the others. "
        "Preset: 0.",
    )
    mask_lr_decay: Decay | None = Field(
        None,
        description="Factor on mask_lr after each epoch. Preset: 1; 0.985 for images of fewer than 768 "
        "values.",
    )
    precision: Precision | None = Field(
        None,
        description="What the network is computed in while it is purified; masks and weights are "
        "float32 all the same. auto is bfloat16 on a processor with units for it (AMX, AVX-512, most "
        "GPUs), else float32. Preset: auto; float32 for images of fewer than 768 values.",
    )


class NoneParameters(MethodParameters):
    """Hold nothing: this method takes no parameters."""


def tau_for(image_shape: ImageShape, *, is_one_shot: bool) -> float:
    """
    Return the limit of the perturbation's L1 norm for images of this shape.

    From 3x32x32 on it is the paper's, 1000 or 100: what erases a backdoor at 3x224x224 is no longer
    than that, and a longer one costs accuracy. Below, it shrinks with the number of values, so
    that the mean change per value stays the paper's, 0.33 or 0.033; images of fewer than 768 values
    get ``SMALL_TAU_FACTOR`` times as much.
    """
    at_paper_shape = ONE_SHOT_TAU if is_one_shot else TAU
    values = math.prod(image_shape)
    factor = SMALL_TAU_FACTOR if values < SMALL_IMAGE_VALUES else 1.0
    return factor * at_paper_shape * min(1.0, values / math.prod(PAPER_SHAPE))


def _resolve_awm(given: AwmParameters, samples: Samples) -> AwmParameters:
    few_classes_one_shot = samples.is_one_shot and samples.classes <= 10
    is_small = math.prod(samples.image_shape) < SMALL_IMAGE_VALUES
    preset_alpha = 0.99 if few_classes_one_shot else 0.8 if is_small else 0.9
    alpha = given.alpha if given.alpha is not None else preset_alpha
    augmentations = given.augmentations
    if augmentations is None:
        augmentations = 9 if few_classes_one_shot else 0
    images = samples.count * (1 + augmentations)
    largest_batch = 10 if is_small else 32 if samples.is_one_shot else 128
    preset: dict[str, object] = {
        "epochs": 200 if is_small else 20,
        "passes": 2 if is_small else 5,
        "batch_size": max(1, min(largest_batch, images)),
        "alpha": alpha,
        # Rounded, so that a report shows 0.1 and not 0.09999999999999998.
        "beta": round(1 - alpha, 12),
        "gamma": 1e-8,
        "tau": tau_for(samples.image_shape, is_one_shot=samples.is_one_shot),
        # The paper's 10 leaves the perturbation at 0 where the model is sure of every sample:
        # docs/decisions/0002-perturbation-step.md.
        "perturbation_lr": 1000.0,
        "mask_lr": 1e-2,
        "augmentations": augmentations,
        # Grey images are mostly digits, letters or scans, where mirroring changes the meaning.
        "flip": augmentations > 0 and samples.image_shape[0] == 3,
        "mask_linear": False,
        "shrink_epochs": 0,
        "mask_lr_decay": 0.985 if is_small else 1.0,
        # docs/decisions/0004-bfloat16.md
        "precision": "float32" if is_small else "auto",
    }
    resolved = preset | given.model_dump(exclude_none=True)
    resolved["batch_size"] = min(int(str(resolved["batch_size"])), images)
    return AwmParameters.model_validate(resolved)


_METHODS: tuple[Method[Any], ...] = (
    AUTO,
    Method(
        name="awm",
        description=(
            "Adversarial Weight Masking: learn a mask for every convolution weight that keeps the "
            "answers on the clean samples and loses those that one universal perturbation "
            "provokes, then fold the masks into the weights. Shuwen Chai and Jinghui Chen, "
            '"One-shot Neural Backdoor Erasing via Adversarial Weight Masking", NeurIPS 2022, '
            "https://arxiv.org/abs/2207.04497."
        ),
        parameters=AwmParameters,
        preset=_resolve_awm,
        needs_channels=lambda given: not given.mask_linear,
    ),
    *ALTERNATIVES,
    Method(
        name="none",
        description=(
            "Change nothing: load the model, measure it and save it again. A scan, and the "
            "yardstick for what the service itself costs."
        ),
        parameters=NoneParameters,
        preset=lambda given, _: given,
    ),
)
METHODS: Mapping[str, Method[Any]] = {method.name: method for method in _METHODS}
