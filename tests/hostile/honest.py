"""Good uploads of every kind that is taken; they fit each other and ``tests.service.forms``."""

import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from tests.hostile_files import Family, Field, HostileFile
from tests.service import forms


def with_optimiser() -> bytes:
    """Save a training checkpoint: optimiser, scheduler, history and device beside the weights."""
    module = forms.module()
    optimiser = torch.optim.Adam(module.parameters())
    module(torch.zeros(2, forms.CHANNELS, forms.SIDE, forms.SIDE)).sum().backward()
    optimiser.step()
    return forms.saved(
        {
            "epoch": 3,
            "state_dict": module.state_dict(),
            "optimizer": optimiser.state_dict(),
            "history": [0.5, None, True, ("a", 2)],
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "size": torch.Size([2, 3]),
        }
    )


def in_protocol_3() -> bytes:
    """Save as Python 3's own protocol has it."""
    buffer = io.BytesIO()
    torch.save(forms.state_dict(), buffer, pickle_protocol=3)
    return buffer.getvalue()


def picture(form: str, number: int, mode: str = "L") -> bytes:
    """Return a picture of the forms' size."""
    pixels = np.random.default_rng(number).integers(0, 256, (forms.SIDE, forms.SIDE), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form)
    return buffer.getvalue()


def folders(form: str, top: str = "", others: Mapping[str, bytes] | None = None) -> bytes:
    """Return a zip of class folders."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (others or {}).items():
            archive.writestr(top + name, content)
        for label in range(forms.CLASSES):
            archive.writestr(f"{top}class {label}/1.{form.lower()}", picture(form, label))
    return buffer.getvalue()


def compressed() -> bytes:
    """Return an .npz as ``np.savez_compressed`` writes it."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=forms.images(), labels=forms.labels())
    return buffer.getvalue()


def parallel() -> dict[str, torch.Tensor]:
    """Return the state dict as ``DataParallel`` names it."""
    return {f"module.{key}": value for key, value in forms.state_dict().items()}


CLASSES = b'{"class 0": 3, "class 1": 2, "class 2": 1, "class 3": 0}'
MODELS: Mapping[str, tuple[str, Callable[[], bytes]]] = {
    "a state dict": (".pt", forms.model_pt),
    "a state dict with its metadata": (".pt", lambda: forms.saved(forms.module().state_dict())),
    "a state dict in protocol 3": (".pth", in_protocol_3),
    "a training checkpoint": (".pth", with_optimiser),
    "weights of DataParallel": (".pt", lambda: forms.saved({"net": parallel()})),
    "parameters": (".pt", lambda: forms.saved(OrderedDict(
        (key, torch.nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value)
        for key, value in forms.state_dict().items()))),
    "safetensors": (".safetensors", forms.model_safetensors),
    "safetensors with metadata": (".safetensors", lambda: safetensors.torch.save(
        forms.state_dict(), metadata={"format": "pt", "note": "größe"})),
    "safetensors of DataParallel": (".safetensors", lambda: safetensors.torch.save(parallel())),
}  # fmt: skip
SAMPLES: Mapping[str, tuple[str, Callable[[], bytes]]] = {
    "bytes": (".npz", forms.samples_npz),
    "bytes compressed": (".npz", compressed),
    "floats": (".npz", lambda: forms.samples_npz(images=forms.float_images())),
    "floats in Fortran's order": (
        ".npz", lambda: forms.samples_npz(images=np.asfortranarray(forms.float_images()))),
    "labels of a byte": (".npz", lambda: forms.samples_npz(labels=forms.labels().astype(np.uint8))),
    "aliases": (".npz", lambda: forms.npz(x=forms.images(), y=forms.labels())),
    "another array beside": (".npz", lambda: forms.samples_npz(names=np.array(["a", "b"]))),
    "tensors": (".safetensors", lambda: safetensors.torch.save(
        {"images": torch.from_numpy(forms.float_images()), "labels": torch.from_numpy(forms.labels())})),
    "tensors in bfloat16": (".safetensors", lambda: safetensors.torch.save(
        {"x": torch.from_numpy(forms.float_images()).bfloat16(), "y": torch.arange(forms.CLASSES)},
        metadata={"format": "pt"})),
    "bytes in safetensors": (
        ".safetensors", lambda: forms.in_safetensors(images=forms.images(), labels=forms.labels())),
    "another tensor beside": (".safetensors", lambda: safetensors.torch.save(
        {"images": torch.from_numpy(forms.images()), "labels": torch.arange(forms.CLASSES).byte(),
         "embedding": torch.ones(3).to(torch.float8_e5m2)})),
    "folders of PNG": (".zip", lambda: folders("PNG")),
    "folders of JPEG": (".zip", lambda: folders("JPEG")),
    "folders in a folder": (".zip", lambda: folders("PNG", "clean/")),
    "folders with a list of classes": (
        ".zip", lambda: folders("PNG", others={"classes.json": CLASSES})),
}  # fmt: skip


def files() -> list[HostileFile]:
    """Return models, and samples by turns as samples and as evaluation."""
    return [
        HostileFile(
            name=name,
            family=Family.HONEST,
            build=lambda _, build=build: build(),  # type: ignore[misc]
            suffix=suffix,
            field=field,
            codes=frozenset(),
        )
        for fields, table in (
            ((Field.MODEL,), MODELS),
            ((Field.SAMPLES, Field.EVALUATION), SAMPLES),
        )
        for place, (name, (suffix, build)) in enumerate(table.items())
        for field in (fields[place % len(fields)],)
    ]
