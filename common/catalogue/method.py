"""Say what a method of purification is, for the service: a name, bounded parameters, and a preset."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

ImageShape = tuple[int, int, int]  # (C, H, W)

# The bounds leave every published setting far behind; they keep a job from running for years.
Epochs = Annotated[int, Field(ge=1, le=1000)]
Passes = Annotated[int, Field(ge=1, le=1000)]
BatchSize = Annotated[int, Field(ge=1, le=4096)]
Weight = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Norm = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
AscentRate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
DescentRate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Deviations = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
Momentum = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Iterations = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Copies = Annotated[int, Field(ge=0, le=100)]
Precision = Literal["auto", "float32", "bfloat16"]
ShrinkEpochs = Annotated[int, Field(ge=0, le=1000)]
Decay = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class MethodParameters(BaseModel):
    """Hold a method's parameters; a field that is None is left to the preset."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


P = TypeVar("P", bound=MethodParameters)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Tell a preset what it depends on: how many clean samples, classes, and of what shape."""

    count: int
    classes: int
    image_shape: ImageShape

    @property
    def is_one_shot(self) -> bool:
        """Tell whether there is about one image per class: fewer than two of each on average."""
        return self.count < 2 * self.classes


@dataclass(frozen=True, kw_only=True)
class Method(Generic[P]):
    """
    Name a method of purification, tell where it comes from, and fill in its parameters.

    Attributes:
        needs_channels: Tell whether, with these parameters, it works on channels alone: on those of
            convolutions or batch norms.
    """

    name: str
    description: str
    parameters: type[P]
    preset: Callable[[P, Samples], P]
    needs_channels: Callable[[P], bool] = lambda _: False

    def resolve(self, given: P, *, count: int, classes: int, image_shape: ImageShape) -> P:
        """
        Return *given* with every field set: what was given stays, the preset decides the rest.

        Args:
            count: How many clean samples there are.
            classes: How many classes the model tells apart.
            image_shape: ``(C, H, W)`` of one sample.
        """
        return self.preset(given, Samples(count=count, classes=classes, image_shape=image_shape))
