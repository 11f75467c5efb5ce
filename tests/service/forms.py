"""Forms as a client sends them: honest files made small, and multipart bodies that may be anything."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn

from common.catalogue.architectures import ARCHITECTURES
from worker.architectures.registry import build

BOUNDARY = "----weightwash-test"
CLASSES, CHANNELS, SIDE = 4, 1, 8

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """One part of a multipart form; a part with a file name is a file."""

    name: str
    content: bytes
    filename: str | None = None


# Honest files --------------------------------------------------------------------------------------


def module(name: str = "small_cnn", **arguments: int) -> nn.Module:
    """Return a small network with the same weights every time."""
    given = arguments or {"classes": CLASSES, "channels": CHANNELS, "width": 4}
    torch.manual_seed(0)
    return build(name, ARCHITECTURES[name].arguments(**given))


def state_dict(name: str = "small_cnn", **arguments: int) -> State:
    """Return its weights."""
    return dict(module(name, **arguments).state_dict())


def saved(value: object, **options: bool) -> bytes:
    """Return what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@cache
def model_pt() -> bytes:
    """Return an honest ``.pt``."""
    return saved(state_dict())


@cache
def model_safetensors() -> bytes:
    """Return an honest ``.safetensors``."""
    return safetensors.torch.save(state_dict())


@cache
def resnet_pt() -> bytes:
    """Return a narrow ResNet-18 for colour images of ten classes."""
    return saved(state_dict("resnet18_cifar", classes=10, channels=3, width=4))


def npz(**arrays: Any) -> bytes:
    """Return an .npz of *arrays*."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def images(count: int = CLASSES, *, side: int = SIDE, channels: int = CHANNELS) -> Any:
    """Return uint8 images (N, H, W, C)."""
    shape = (count, side, side, channels)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def float_images(count: int = CLASSES) -> Any:
    """Return float32 images (N, C, H, W) in [0, 1]."""
    return np.random.default_rng(0).random((count, CHANNELS, SIDE, SIDE), dtype=np.float32)


def labels(count: int = CLASSES) -> Any:
    """Return one label per image, class after class."""
    return np.arange(count) % CLASSES


def samples_npz(**changes: Any) -> bytes:
    """Return honest samples, one per class; a change of ``None`` leaves an array out."""
    arrays = {"images": images(), "labels": labels()} | changes
    return npz(**{name: array for name, array in arrays.items() if array is not None})


def in_safetensors(**arrays: Any) -> bytes:
    """Return a .safetensors of *arrays*."""
    rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(rows)


# Forms ---------------------------------------------------------------------------------------------

Change = bytes | str | Part | None


def parts(**changes: Change) -> list[Part]:
    """
    Return an honest form with *changes*.

    Bytes are the content of a file, a string is a plain field, ``None`` leaves a field out.
    """
    form: dict[str, Change] = {
        "model": Part("model", model_pt(), "model.pt"),
        "samples": Part("samples", samples_npz(), "clean.npz"),
        "architecture": "small_cnn",
    }
    return [_part(name, value) for name, value in (form | changes).items() if value is not None]


def _part(name: str, value: bytes | str | Part) -> Part:
    match value:
        case Part():
            return value
        case bytes():
            return Part(name, value, f"{name}.bin")
        case str():
            return Part(name, value.encode())


def encoded(form: Sequence[Part], *, boundary: str = BOUNDARY) -> bytes:
    """Return the multipart body."""
    body = bytearray()
    for part in form:
        name = "" if part.filename is None else f'; filename="{part.filename}"'
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{part.name}"{name}'.encode()
        body += b"" if part.filename is None else b"\r\nContent-Type: application/octet-stream"
        body += b"\r\n\r\n" + part.content + b"\r\n"
    return bytes(body) + f"--{boundary}--\r\n".encode()


def content_type(boundary: str = BOUNDARY) -> dict[str, str]:
    """Return the header that announces a form."""
    return {"Content-Type": f"multipart/form-data; boundary={boundary}"}
