"""Name the service's own method, with its parameters and presets."""

import math
from typing import Annotated

from pydantic import Field

from common.catalogue.method import (
    Copies,
    Iterations,
    Method,
    MethodParameters,
    Precision,
    Samples,
    Share,
)

Strengths = Annotated[list[Share], Field(min_length=1, max_length=10)]
Reach = Annotated[int, Field(ge=0, le=64)]
Rounds = Annotated[int, Field(ge=0, le=20)]
Restarts = Annotated[int, Field(ge=1, le=64)]
Layers = Annotated[int, Field(ge=1, le=1000)]


# Values of an image, and the steps of a search on those that have fewer.
SMALL_IMAGES = ((768, 300), (3 * 32 * 32, 200))


class AutoParameters(MethodParameters):
    """Hold the parameters of the method that recovers triggers and rewrites the last layers."""

    steps: Iterations | None = Field(
        None,
        ge=3,
        description="Steps of the search for every class's smallest patch; classes that are soon out "
        "of question get fewer. Preset: 100, 200 for images below 3,072 values and 300 below 768.",
    )
    rounds: Rounds | None = Field(
        None,
        description="How often triggers are searched again on the rewritten model, and unlearned too. "
        "Preset: 1.",
    )
    restarts: Restarts | None = Field(
        None, description="Fresh searches for each suspect class each time. Preset: 4."
    )
    restart_steps: Iterations | None = Field(
        None, description="Steps of each. Preset: as many as steps."
    )
    layers: Layers | None = Field(
        None, description="How many of the last layers are rewritten. Preset: 3."
    )
    ridge: Share | None = Field(
        None,
        description="Weight of the change itself against the clean images; more changes less. "
        "Preset: 0.03.",
    )
    strengths: Strengths | None = Field(
        None,
        description="Weights of the stamped images against the clean ones. Each gives a candidate, and "
        "evidence chooses one; ten times the last is tried as well where only a piece of the trigger was "
        "found. Preset: 0.1, 0.3, 1.0.",
    )
    copies: Copies | None = Field(
        None,
        description="Randomly cropped copies of each sample to rewrite with; no more than make 1,600 "
        "images in all. Preset: 100.",
    )
    flip: bool | None = Field(
        None,
        description="Mirror half of those copies; turn it off where left and right matter, as in "
        "digits and road signs. Preset: true for colour images and up to ten classes, else false.",
    )
    reach: Reach | None = Field(
        None,
        description="Pixels by which a recovered trigger is widened at most. Preset: a sixteenth "
        "of the image's side, at least 1.",
    )
    force: bool | None = Field(
        None,
        description="Rewrite a model whatever the verdict is; otherwise only one that is found "
        "backdoored. Preset: false.",
    )
    precision: Precision | None = Field(
        None,
        description="What the network is computed in while triggers are searched. auto is bfloat16 on "
        "a processor with units for it, else float32. Preset: auto.",
    )


def _resolve(given: AutoParameters, samples: Samples) -> AutoParameters:
    # Small images are soon searched, and their triggers differ by a pixel.
    values = math.prod(samples.image_shape)
    steps = next((steps for below, steps in SMALL_IMAGES if values < below), 100)
    preset: dict[str, object] = {
        "steps": steps,
        "rounds": 1,
        "restarts": 4,
        # A search that is less thorough than the first one overlooks what is left.
        "restart_steps": steps,
        "layers": 3,
        "ridge": 0.03,
        "strengths": [0.1, 0.3, 1.0],
        "copies": 100,
        # Grey images and many classes are mostly digits, letters or signs.
        "flip": samples.image_shape[0] == 3 and samples.classes <= 10,
        "reach": max(1, round(min(samples.image_shape[1:]) / 16)),
        "force": False,
        "precision": "auto",
    }
    return AutoParameters.model_validate(preset | given.model_dump(exclude_none=True))


AUTO: Method[AutoParameters] = Method(
    name="auto",
    description=(
        "Recover triggers and rewrite the last layers: try small squares at every place, search the "
        "smallest patch and warp of every class (after Neural Cleanse, Wang et al., IEEE S&P 2019) "
        "and its largest margin (MM-BD, Wang et al., IEEE S&P 2024), give a verdict by the classes "
        "that stand out, and rewrite the last layers in closed form so that stamped images are "
        "answered as clean ones and clean ones as before; search again, and choose by fresh evidence. "
        "Only a model that is found backdoored is changed; where the verdict is inconclusive rewritten "
        "ones, made in less time, are further candidates."
    ),
    parameters=AutoParameters,
    preset=_resolve,
)
