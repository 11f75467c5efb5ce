"""
Decide whether a form becomes a job: check every field and every file, and write the specification.

All of it happens before anything is stored, so a refused request leaves nothing behind. ``seed`` is 0,
``method`` is ``awm`` and ``priority`` is 0 unless the form says otherwise.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from common.catalogue.architectures import ARCHITECTURES, LayoutMismatch, identify, nearest
from common.catalogue.methods import METHODS
from common.errors import (
    ArchitectureMismatch,
    ArchitectureNeeded,
    ClassCountMismatch,
    InvalidField,
    InvalidImages,
    InvalidParameter,
    UnknownArchitecture,
    UnknownMethod,
    UnknownParameter,
)
from common.formats.model import ModelFile, check_finite, inspect_model
from common.formats.samples import Purpose, SampleFile, check_labels, inspect_samples
from common.settings import Settings
from common.spec import JobSpec, ModelInput, SamplesInput
from service.uploads import Form, UploadedFile

DEFAULT_METHOD = "awm"
MAX_SEED = 2**63 - 1
MAX_PRIORITY = 100
MAX_CANCEL_AFTER_SECONDS = 30 * 86400
_MAX_JSON_DEPTH = 20
_MAX_KEYS_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """A form that became a specification, with what is not part of the work itself."""

    spec: JobSpec
    priority: int
    cancel_after_seconds: float | None
    client_metadata: dict[str, Any]


def admit(form: Form, settings: Settings) -> Admitted:
    """
    Check a form.

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
    given_params = _json_object(texts, "params")
    params = _validated(method.parameters, given_params, "params")

    model_file = form.files["model"]
    model = inspect_model(model_file.path)
    architecture, arguments = _architecture(texts, model)
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
        seed=_whole_number(texts, "seed", default=0, low=0, high=MAX_SEED),
        mean=_per_channel(texts, "mean", channels),
        std=_per_channel(texts, "std", channels),
        path=texts.get("path"),
    )
    if spec.std is not None and min(map(abs, spec.std)) < 1e-6:
        raise InvalidField("'std' holds a value that is (nearly) 0.")
    return Admitted(
        spec=spec,
        priority=_whole_number(texts, "priority", default=0, low=-MAX_PRIORITY, high=MAX_PRIORITY),
        cancel_after_seconds=_cancel_after(texts),
        client_metadata=_json_object(texts, "metadata"),
    )


def _architecture(texts: Mapping[str, str], model: ModelFile) -> tuple[str, Any]:
    given_args = _json_object(texts, "architecture_args")
    name = texts.get("architecture")
    if name is None:
        fitting = identify(model.shapes)
        if len(fitting) != 1:
            found = ", ".join(name for name, _ in fitting) or "none of the built-in ones"
            raise ArchitectureNeeded(f"The state dict fits {found}.")
        name = fitting[0][0]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        close = nearest(name) or sorted(ARCHITECTURES)
        raise UnknownArchitecture(
            f"There is no architecture {name[:80]!r}.",
            hint=f"Did you mean {' or '.join(close)}? GET /architectures lists all of them.",
        )
    try:
        return name, architecture.fit(model.shapes, given_args)
    except ValidationError as exc:
        raise InvalidField(f"architecture_args: {_first_error(exc)}") from exc
    except LayoutMismatch as exc:
        raise _mismatch(name, exc) from exc


def _mismatch(name: str, exc: LayoutMismatch) -> ArchitectureMismatch | ClassCountMismatch:
    """Say which keys do not fit, the first ones by name."""
    heads = [found for key, found, _ in exc.misshaped if key.endswith(("weight", "bias"))]
    parts = []
    if exc.missing:
        parts.append(f"missing: {_shown(exc.missing)}")
    if exc.unexpected:
        parts.append(f"unexpected: {_shown(exc.unexpected)}")
    if exc.misshaped:
        shapes = [f"{key} is {found}, not {meant}" for key, found, meant in exc.misshaped]
        parts.append(f"of another shape: {_shown(shapes)}")
    only_the_head = not exc.missing and not exc.unexpected and len(heads) == len(exc.misshaped)
    if only_the_head and all(
        key.split(".")[0] in {"linear", "classifier"} for key, *_ in exc.misshaped
    ):
        return ClassCountMismatch(f"The head does not fit: {'; '.join(parts)}.")
    return ArchitectureMismatch(f"The state dict does not fit {name}: {'; '.join(parts)}.")


def _shown(names: list[str]) -> str:
    more = len(names) - _MAX_KEYS_SHOWN
    listed = ", ".join(name[:120] for name in names[:_MAX_KEYS_SHOWN])
    return f"{listed} and {more} more" if more > 0 else listed


def _check_shape(found: SampleFile, purpose: Purpose, arguments: Any) -> None:
    channels, height, width = found.image_shape
    meant = int(arguments.channels)
    if channels != meant:
        raise InvalidImages(
            f"The {purpose} images have {channels} channels (shape {found.image_shape} as "
            f"channels, height, width); the model takes {meant}."
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


# Fields --------------------------------------------------------------------------------------------


def _json_object(texts: Mapping[str, str], field: str) -> dict[str, Any]:
    text = texts.get(field)
    if text is None:
        return {}
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_unique,
        )
        depth = _depth(value)
        json.dumps(value, ensure_ascii=False).encode()  # an escaped half of a character fails here
    except (ValueError, RecursionError) as exc:
        raise InvalidField(f"{field!r} is not JSON: {str(exc)[:200]}.") from exc
    if not isinstance(value, dict):
        raise InvalidField(f"{field!r} is not a JSON object.")
    if depth > _MAX_JSON_DEPTH:
        raise InvalidField(f"{field!r} is nested more than {_MAX_JSON_DEPTH} deep.")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _validated(kind: type[BaseModel], given: dict[str, Any], field: str) -> Any:
    try:
        return kind.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "none"
            raise UnknownParameter(
                f"{field}: there is no {str(first['loc'][0])[:80]!r}; there are: {known}."
            ) from exc
        raise InvalidParameter(f"{field}: {_first_error(exc)}") from exc


def _first_error(exc: ValidationError) -> str:
    first = exc.errors()[0]
    where = ".".join(map(str, first["loc"]))[:80]
    return f"{where}: {first['msg']}, not {str(first['input'])[:80]!r}."


def _whole_number(
    texts: Mapping[str, str], field: str, *, default: int, low: int, high: int
) -> int:
    text = texts.get(field)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError as exc:
        raise InvalidField(f"{field!r} is not a whole number: {text[:40]!r}.") from exc
    if not low <= value <= high:
        raise InvalidField(f"{field!r} is {text[:40]}; it goes from {low} to {high}.")
    return value


def _number(text: str, field: str) -> float:
    try:
        value = float(text)
    except ValueError as exc:
        raise InvalidField(f"{field!r} is not a number: {text[:40]!r}.") from exc
    if not math.isfinite(value):
        raise InvalidField(f"{field!r} is not a finite number.")
    return value


def _cancel_after(texts: Mapping[str, str]) -> float | None:
    text = texts.get("cancel_after")
    if text is None:
        return None
    value = _number(text, "cancel_after")
    if not 0 < value <= MAX_CANCEL_AFTER_SECONDS:
        raise InvalidField(f"'cancel_after' goes up to {MAX_CANCEL_AFTER_SECONDS} seconds.")
    return value


def _per_channel(texts: Mapping[str, str], field: str, channels: int) -> tuple[float, ...] | None:
    text = texts.get(field)
    if text is None:
        return None
    values = tuple(_number(part, field) for part in text.split(","))
    if len(values) not in {1, channels}:
        raise InvalidField(
            f"{field!r} has {len(values)} values; the images have {channels} channels."
        )
    return values
