"""
Decide whether a form becomes a job: check every field and every file, and write the specification.

All of it happens before anything is stored, so a refused request leaves nothing behind. ``seed`` is 0,
``method`` is ``auto`` and ``priority`` is 0 unless the form says otherwise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from common import roster
from common.catalogue.architectures import (
    ARCHITECTURES,
    MAX_WEIGHTS,
    Architecture,
    LayoutMismatch,
    foreign,
    identify,
    nearest,
)
from common.catalogue.methods import METHODS
from common.db import Database
from common.errors import (
    ArchitectureMismatch,
    ArchitectureNeeded,
    ClassCountMismatch,
    InvalidField,
    InvalidImages,
    NothingToMask,
    TooLarge,
    UnknownArchitecture,
    UnknownMethod,
)
from common.formats.model import ModelFile, check_finite, inspect_model
from common.formats.samples import Purpose, SampleFile, check_labels, inspect_samples
from common.settings import Settings
from common.spec import JobSpec, ModelInput, SamplesInput
from service.fields import (
    cancel_after,
    first_error,
    json_object,
    per_channel,
    repository_path,
    validated,
    whole_number,
)
from service.uploads import Form, UploadedFile

DEFAULT_METHOD = "auto"
MAX_SEED = 2**63 - 1
MAX_PRIORITY = 100
MIN_STD = 1e-6
MIN_SIDE = 4  # what the pooling of every built-in network leaves something of


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A form that became a specification, with what is not part of the work itself."""

    spec: JobSpec
    is_checked_by_worker: bool  # whether the model fits is not known before the job runs
    priority: int
    cancel_after_seconds: float | None
    client_metadata: dict[str, Any]


def admit(form: Form, settings: Settings, database: Database) -> Admitted:
    """
    Check a form; *database* is only asked for architectures that are not built in.

    Raises:
        Refused: Something in it cannot be carried out; the class says what, and how to mend it.
    """
    texts = form.texts
    method_name = texts.get("method", DEFAULT_METHOD)
    method = METHODS.get(method_name)
    if method is None:
        raise UnknownMethod(
            f"There is no method {method_name[:80]!r}; there are {', '.join(METHODS)}."
        )
    given_params = json_object(texts, "params")
    params = validated(method.parameters, given_params, "params")

    model_file = form.files["model"]
    model = inspect_model(model_file.path)
    architecture, arguments = _architecture(texts, model, database)
    if method.needs_channels(params) and not _may_have_channels(model):
        raise NothingToMask(f"{architecture} has neither convolutions nor batch norms.")
    classes = int(arguments.classes)
    check_finite(model_file.path, model)

    sample_files = {
        purpose: inspect_samples(
            form.files[purpose].path, purpose, max_bytes=settings.max_samples_bytes
        )
        for purpose in Purpose
        if purpose in form.files
    }
    for purpose, found in sample_files.items():
        check_labels(found, purpose, classes=classes)
        _check_shape(found, purpose, arguments)
    samples = sample_files[Purpose.SAMPLES]
    channels = samples.image_shape[0]

    spec = JobSpec(
        model=ModelInput(
            name=model_file.name,
            sha256=model_file.sha256,
            bytes=model_file.bytes,
            format=model.format,
        ),
        samples=_described(form.files["samples"], samples),
        evaluation=_described_if_given(form, sample_files, Purpose.EVALUATION),
        triggered=_described_if_given(form, sample_files, Purpose.TRIGGERED),
        architecture=architecture,
        architecture_args=arguments.model_dump(),
        classes=classes,
        method=method_name,
        params=method.resolve(
            params, count=samples.count, classes=classes, image_shape=samples.image_shape
        ).model_dump(),
        seed=whole_number(texts, "seed", default=0, low=0, high=MAX_SEED),
        mean=per_channel(texts, "mean", channels),
        std=per_channel(texts, "std", channels),
        path=repository_path(texts),
    )
    if spec.std is not None and min(spec.std) < MIN_STD:
        raise InvalidField(f"'std' holds a value below {MIN_STD:g}.")
    return Admitted(
        spec=spec,
        is_checked_by_worker=architecture not in ARCHITECTURES,
        priority=whole_number(texts, "priority", default=0, low=-MAX_PRIORITY, high=MAX_PRIORITY),
        cancel_after_seconds=cancel_after(texts),
        client_metadata=json_object(texts, "metadata"),
    )


def _may_have_channels(model: ModelFile) -> bool:
    """Return whether there is a convolution or a batch norm, by the shapes; the worker is certain."""
    return any(
        len(shape) > 2 or key.endswith(".running_var") for key, shape in model.shapes.items()
    )


def _architecture(
    texts: Mapping[str, str], model: ModelFile, database: Database
) -> tuple[str, Any]:
    """Return the name, and the arguments under which it fits as far as that can be known here."""
    if sum(map(math.prod, model.shapes.values())) > MAX_WEIGHTS:
        raise TooLarge(f"The state dict holds more than {MAX_WEIGHTS} numbers.")
    given_args = json_object(texts, "architecture_args")
    name = texts.get("architecture")
    if name is None:
        name = _told_by(model)
    architecture = ARCHITECTURES.get(name)
    try:
        if architecture is not None:
            return name, _fitted(architecture, model, given_args)
        _require_announced(name, database)
        return name, _foreign_arguments(name, model, given_args)
    except ValidationError as exc:
        raise InvalidField(f"architecture_args: {first_error(exc)}") from exc


def _told_by(model: ModelFile) -> str:
    fitting = [name for name, _ in identify(model.shapes)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ArchitectureNeeded(
            f"The state dict fits {', '.join(fitting)} alike.",
            hint="Name the one it was trained in: "
            + " or ".join(f"-F architecture={each}" for each in fitting),
        )
    raise ArchitectureNeeded("The state dict fits none of the built-in ones.")


def _fitted(architecture: Architecture[Any], model: ModelFile, given_args: dict[str, Any]) -> Any:
    try:
        return architecture.fit(model.shapes, given_args)
    except LayoutMismatch as exc:
        if exc.is_of_classes_alone:
            raise ClassCountMismatch(
                f"The head does not fit: {exc.differences}.",
                hint="Leave 'classes' out of architecture_args: it is read from the head.",
            ) from exc
        raise ArchitectureMismatch(str(exc)) from exc


def _require_announced(name: str, database: Database) -> None:
    with database.read() as session:
        if foreign.NAME.fullmatch(name) and roster.is_known(session, name):
            return
        known = [*ARCHITECTURES, *(each.name for each in roster.listed(session))]
    library = name.partition("/")[0]
    if f"{library}/" in (foreign.TORCHVISION, foreign.TIMM) and not any(
        each.startswith(f"{library}/") for each in known
    ):
        raise UnknownArchitecture(
            f"There is no architecture {name[:80]!r}: no worker has {library}.",
            hint=f"Ask the operator to install weightwash[{library}] beside the workers.",
        )
    close = nearest(name, known) or sorted(ARCHITECTURES)
    raise UnknownArchitecture(
        f"There is no architecture {name[:80]!r}.",
        hint=f"Did you mean {' or '.join(close)}? GET /architectures lists all of them.",
    )


def _foreign_arguments(name: str, model: ModelFile, given_args: dict[str, Any]) -> Any:
    classes = foreign.read_classes(model.shapes)
    if classes is None and "classes" not in given_args:
        raise InvalidField(
            "architecture_args: the class count cannot be read from the state dict.",
            hint="Give it: -F architecture_args='{\"classes\": 10}'.",
        )
    return foreign.arguments_of(name).model_validate({"classes": classes, **given_args})


def _check_shape(found: SampleFile, purpose: Purpose, arguments: Any) -> None:
    channels, height, width = found.image_shape
    meant = int(arguments.channels)
    if channels != meant:
        raise InvalidImages(
            f"The {purpose} images have {channels} channels (shape {found.image_shape} as "
            f"channels, height, width); the model takes {meant}."
        )
    if min(height, width) < MIN_SIDE:
        raise InvalidImages(
            f"The {purpose} images are {height}x{width}; the smallest are {MIN_SIDE}x{MIN_SIDE}."
        )
    size = getattr(arguments, "input_size", None)
    if size is not None and (height, width) != (size, size):
        raise InvalidImages(
            f"The {purpose} images are {height}x{width}; the model takes {size}x{size}."
        )


def _described(file: UploadedFile, found: SampleFile) -> SamplesInput:
    return SamplesInput(
        sha256=file.sha256,
        bytes=file.bytes,
        count=found.count,
        classes=found.classes,
        image_shape=found.image_shape,
    )


def _described_if_given(
    form: Form, found: Mapping[Purpose, SampleFile], purpose: Purpose
) -> SamplesInput | None:
    if purpose not in found:
        return None
    if found[purpose].image_shape != found[Purpose.SAMPLES].image_shape:
        raise InvalidImages(
            f"The {purpose} images have the shape {found[purpose].image_shape}, "
            f"the samples {found[Purpose.SAMPLES].image_shape}."
        )
    return _described(form.files[purpose], found[purpose])
