"""
Describe the built-in architectures by the keys and shapes of their state dicts.

The service holds an upload's header against these patterns without torch; the worker's builders
stand under the same names and a test proves that each builds exactly what is written here. Batch
norm's ``num_batches_tracked`` is the one kind of key that may be absent: old checkpoints lack it.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Layout = dict[str, Shape]

# The bounds keep a hostile header from making the worker build a giant; they lie far above every
# published use of these networks.
Classes = Annotated[int, Field(ge=2, le=100_000, description="outputs of the last layer")]
Channels = Annotated[int, Field(ge=1, le=64, description="channels of an input image")]
Width = Annotated[int, Field(ge=1, le=1024, description="filters of the first convolution")]
InputSize = Annotated[int, Field(ge=8, le=1024, description="height and width of an image")]

OPTIONAL_SUFFIX = ".num_batches_tracked"


class LayoutMismatch(Exception):
    """The state dict does not fit the architecture; compare the keys and shapes listed here."""

    def __init__(
        self,
        name: str,
        *,
        missing: list[str],
        unexpected: list[str],
        misshaped: list[tuple[str, Shape, Shape]],
    ) -> None:
        """Keep what differs; *misshaped* holds ``(key, found shape, expected shape)``."""
        self.name = name
        self.missing = missing
        self.unexpected = unexpected
        self.misshaped = misshaped
        super().__init__(
            f"the state dict does not fit {name}: {len(missing)} keys missing, "
            f"{len(unexpected)} unexpected, {len(misshaped)} of another shape"
        )


class ArchitectureArguments(BaseModel):
    """Hold what a built-in architecture is built from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


A = TypeVar("A", bound=ArchitectureArguments)


@dataclass(frozen=True, kw_only=True)
class Architecture(Generic[A]):
    """
    Name a built-in architecture and tell what its state dict looks like.

    Attributes:
        layout: Give every key with its shape, in the order of the modules.
        read: Read arguments from the shapes; None where the telling key is absent or too short.
    """

    name: str
    description: str
    arguments: type[A]
    layout: Callable[[A], Layout]
    read: Callable[[Shapes], Mapping[str, int | None]]

    def infer(self, shapes: Shapes) -> A:
        """Return the arguments *shapes* speak of, with defaults where they tell nothing usable."""
        found = {field: value for field, value in self.read(shapes).items() if value is not None}
        try:
            return self.arguments.model_validate(found)
        except ValidationError as exc:
            # A value out of bounds is left out here; the layout then shows its key as misshaped.
            refused = {error["loc"][0] for error in exc.errors()}
            usable = {field: value for field, value in found.items() if field not in refused}
            return self.arguments.model_validate(usable)

    def fit(self, shapes: Shapes, given_args: Mapping[str, object] | None = None) -> A:
        """
        Return the arguments under which this architecture has exactly *shapes*.

        Args:
            given_args: What the user said; it wins over what the shapes say, and must fit them.

        Raises:
            LayoutMismatch: No such arguments, or the given ones disagree with the shapes.
            pydantic.ValidationError: A given argument is unknown, of a wrong type or out of bounds.
        """
        args = self.arguments.model_validate(
            {**self.infer(shapes).model_dump(), **(given_args or {})}
        )
        expected = self.layout(args)
        missing = [
            key for key in expected if key not in shapes and not key.endswith(OPTIONAL_SUFFIX)
        ]
        unexpected = [key for key in shapes if key not in expected]
        misshaped = [
            (key, tuple(shapes[key]), shape)
            for key, shape in expected.items()
            if key in shapes and tuple(shapes[key]) != shape
        ]
        if missing or unexpected or misshaped:
            raise LayoutMismatch(
                self.name, missing=missing, unexpected=unexpected, misshaped=misshaped
            )
        return args


def identify(shapes: Shapes) -> list[tuple[str, ArchitectureArguments]]:
    """Return every built-in architecture that has exactly *shapes*, with its arguments."""
    fitting: list[tuple[str, ArchitectureArguments]] = []
    for name, architecture in ARCHITECTURES.items():
        try:
            fitting.append((name, architecture.fit(shapes)))
        except LayoutMismatch:
            continue
    return fitting


def nearest(name: str) -> list[str]:
    """Return the built-in names that *name* may have meant, the closest first."""
    return difflib.get_close_matches(name.lower(), ARCHITECTURES, n=3, cutoff=0.5)


def _dimension(shapes: Shapes, key: str, axis: int) -> int | None:
    shape = shapes.get(key, ())
    return shape[axis] if axis < len(shape) else None


def _convolution(key: str, outputs: int, inputs: int, kernel: int, *, bias: bool) -> Layout:
    weight: Layout = {f"{key}.weight": (outputs, inputs, kernel, kernel)}
    return weight | ({f"{key}.bias": (outputs,)} if bias else {})


def _batch_norm(key: str, features: int) -> Layout:
    per_feature = ("weight", "bias", "running_mean", "running_var")
    return {f"{key}.{part}": (features,) for part in per_feature} | {f"{key}{OPTIONAL_SUFFIX}": ()}


def _linear(key: str, outputs: int, inputs: int) -> Layout:
    return {f"{key}.weight": (outputs, inputs), f"{key}.bias": (outputs,)}


class SmallCnnArguments(ArchitectureArguments):
    """Hold what a small_cnn is built from; any input from 4x4 up will do."""

    classes: Classes = 10
    channels: Channels = 3
    width: Width = 16


def _small_cnn_layout(args: SmallCnnArguments) -> Layout:
    layout: Layout = {}
    inputs = args.channels
    for stage, outputs in enumerate((args.width, 2 * args.width, 4 * args.width), start=1):
        layout |= _convolution(f"conv{stage}", outputs, inputs, 3, bias=False)
        layout |= _batch_norm(f"bn{stage}", outputs)
        inputs = outputs
    return layout | _linear("linear", args.classes, inputs)


class SmallVggArguments(ArchitectureArguments):
    """Hold what a small_vgg is built from; its last layer fixes the size of the input."""

    classes: Classes = 10
    channels: Channels = 3
    width: Width = 32
    input_size: InputSize = 32


def _small_vgg_layout(args: SmallVggArguments) -> Layout:
    layout: Layout = {}
    index, inputs = 0, args.channels
    for outputs in (args.width, 2 * args.width, 4 * args.width):
        for _ in range(2):
            layout |= _convolution(f"features.{index}", outputs, inputs, 3, bias=True)
            layout |= _batch_norm(f"features.{index + 1}", outputs)
            index, inputs = index + 3, outputs  # convolution, batch norm, ELU
        index += 2  # pooling, dropout
    return layout | _linear("classifier", args.classes, inputs * (args.input_size // 8) ** 2)


def _read_small_vgg(shapes: Shapes) -> Mapping[str, int | None]:
    """Read the arguments; the size is the multiple of eight with the classifier's inputs."""
    width = _dimension(shapes, "features.0.weight", 0)
    flattened = _dimension(shapes, "classifier.weight", 1)
    cells = flattened // (4 * width) if width and flattened else None
    return {
        "classes": _dimension(shapes, "classifier.weight", 0),
        "channels": _dimension(shapes, "features.0.weight", 1),
        "width": width,
        "input_size": 8 * math.isqrt(cells) if cells and cells > 0 else None,
    }


class ResNetArguments(ArchitectureArguments):
    """Hold what a ResNet for small images is built from; it pools, so any input size will do."""

    classes: Classes = 10
    channels: Channels = 3
    width: Width = 64


def _resnet_layout(args: ResNetArguments, *, pre_activation: bool) -> Layout:
    layout = _convolution("conv1", args.width, args.channels, 3, bias=False)
    if not pre_activation:
        layout |= _batch_norm("bn1", args.width)
    inputs = args.width
    for stage in range(4):
        outputs = args.width * 2**stage
        for block in range(2):
            key = f"layer{stage + 1}.{block}"
            for part, part_inputs in ((1, inputs), (2, outputs)):
                convolution = _convolution(f"{key}.conv{part}", outputs, part_inputs, 3, bias=False)
                if pre_activation:
                    layout |= _batch_norm(f"{key}.bn{part}", part_inputs) | convolution
                else:
                    layout |= convolution | _batch_norm(f"{key}.bn{part}", outputs)
            if inputs != outputs:
                layout |= _convolution(f"{key}.shortcut.0", outputs, inputs, 1, bias=False)
                if not pre_activation:
                    layout |= _batch_norm(f"{key}.shortcut.1", outputs)
            inputs = outputs
    return layout | _linear("linear", args.classes, inputs)


def _read_stem_and_head(shapes: Shapes) -> Mapping[str, int | None]:
    """Read the arguments of a network that runs from ``conv1`` to ``linear``."""
    return {
        "classes": _dimension(shapes, "linear.weight", 0),
        "channels": _dimension(shapes, "conv1.weight", 1),
        "width": _dimension(shapes, "conv1.weight", 0),
    }


_BUILT_IN: tuple[Architecture[Any], ...] = (
    Architecture(
        name="small_cnn",
        description="Three 3x3 convolutions with batch norm and ReLU, for 8x8 to 32x32 images.",
        arguments=SmallCnnArguments,
        layout=_small_cnn_layout,
        read=_read_stem_and_head,
    ),
    Architecture(
        name="small_vgg",
        description="Six 3x3 convolutions with batch norm and ELU, as in the I-BAU checkpoints.",
        arguments=SmallVggArguments,
        layout=_small_vgg_layout,
        read=_read_small_vgg,
    ),
    Architecture(
        name="resnet18_cifar",
        description="ResNet-18 with a 3x3 stem, as it is common for 32x32 images.",
        arguments=ResNetArguments,
        layout=lambda args: _resnet_layout(args, pre_activation=False),
        read=_read_stem_and_head,
    ),
    Architecture(
        name="preact_resnet18_cifar",
        description="Pre-activation ResNet-18 with a 3x3 stem, as in BackdoorBench.",
        arguments=ResNetArguments,
        layout=lambda args: _resnet_layout(args, pre_activation=True),
        read=_read_stem_and_head,
    ),
)
ARCHITECTURES: Mapping[str, Architecture[Any]] = {entry.name: entry for entry in _BUILT_IN}
