"""Read the plain fields of a form: text from anybody, turned into values or refused by name."""

import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from common.errors import InvalidField, InvalidParameter, UnknownParameter

MAX_CANCEL_AFTER_SECONDS = 30 * 86400
MAX_PATH_LENGTH = 1024
_MAX_JSON_DEPTH = 20
_MAX_NORMALISATION = 1e4


def json_object(texts: Mapping[str, str], field: str) -> dict[str, Any]:
    """
    Return the JSON object in *field*, empty when the field was not sent.

    Raises:
        InvalidField: It is no JSON object, or one that could not be sent back as JSON.
    """
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


def validated(kind: type[BaseModel], given: dict[str, Any], field: str) -> Any:
    """
    Return *given* as a *kind*.

    Raises:
        UnknownParameter: A key is not one of its fields.
        InvalidParameter: A value is of the wrong type or out of its bounds.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as exc:
        first = exc.errors()[0]
        if first["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields) or "none"
            raise UnknownParameter(
                f"{field}: there is no {str(first['loc'][0])[:80]!r}; there are: {known}."
            ) from exc
        raise InvalidParameter(f"{field}: {first_error(exc)}") from exc


def first_error(exc: ValidationError) -> str:
    """Return the first thing that pydantic found wrong, in one sentence."""
    first = exc.errors()[0]
    where = ".".join(map(str, first["loc"]))[:80]
    return f"{where}: {first['msg']}, not {str(first['input'])[:80]!r}."


def whole_number(texts: Mapping[str, str], field: str, *, default: int, low: int, high: int) -> int:
    """
    Return the whole number in *field*.

    Raises:
        InvalidField: It is none, or outside *low* to *high*.
    """
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


def number(text: str, field: str) -> float:
    """
    Return a finite number.

    Raises:
        InvalidField: *text* is none.
    """
    try:
        value = float(text)
    except ValueError as exc:
        raise InvalidField(f"{field!r} is not a number: {text[:40]!r}.") from exc
    if not math.isfinite(value):
        raise InvalidField(f"{field!r} is not a finite number.")
    return value


def cancel_after(texts: Mapping[str, str]) -> float | None:
    """
    Return the seconds after which the job is to be cancelled.

    Raises:
        InvalidField: They are no number, or too many.
    """
    text = texts.get("cancel_after")
    if text is None:
        return None
    value = number(text, "cancel_after")
    if not 0 < value <= MAX_CANCEL_AFTER_SECONDS:
        raise InvalidField(
            f"'cancel_after' goes from above 0 to {MAX_CANCEL_AFTER_SECONDS} seconds."
        )
    return value


def per_channel(texts: Mapping[str, str], field: str, channels: int) -> tuple[float, ...] | None:
    """
    Return the comma list in *field*: one number per channel, or one for all.

    Raises:
        InvalidField: It has another length, or a value that no normalisation has.
    """
    text = texts.get(field)
    if text is None:
        return None
    values = tuple(number(part, field) for part in text.split(","))
    if len(values) not in {1, channels}:
        raise InvalidField(
            f"{field!r} has {len(values)} values; the images have {channels} channels."
        )
    if max(map(abs, values)) > _MAX_NORMALISATION:
        raise InvalidField(f"{field!r} goes up to {_MAX_NORMALISATION:g}; images are in [0, 1].")
    return values


def repository_path(texts: Mapping[str, str]) -> str | None:
    """
    Return the model's path in its repository, which reports show to people and to other programs.

    Raises:
        InvalidField: It is too long, or holds a character that is not printable, or turns the line round.
    """
    text = texts.get("path")
    if text is not None and (len(text) > MAX_PATH_LENGTH or not text.isprintable()):
        raise InvalidField(f"'path' is one line of at most {MAX_PATH_LENGTH} printable characters.")
    return text
