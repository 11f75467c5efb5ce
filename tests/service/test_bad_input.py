"""Bad input gets a clear problem, and nothing else breaks."""

import asyncio
import io
import json
import math
import os
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from common.blobs import FileBlobStore
from common.catalogue.methods import METHODS
from common.settings import Settings
from service.fields import MAX_CANCEL_AFTER_SECONDS
from tests import hostile_files as hostile
from tests.service.conftest import Service, Start, problem_of, running
from tests.service.forms import (
    BOUNDARY,
    Change,
    Part,
    State,
    content_type,
    encoded,
    float_images,
    images,
    in_safetensors,
    labels,
    model_pt,
    model_safetensors,
    module,
    npz,
    parts,
    resnet_pt,
    samples_npz,
    saved,
    state_dict,
)

REEXPORT = 'torch.save(model.state_dict(), "model.pt")'
MAX_MODEL_BYTES, MAX_SAMPLES_BYTES, MAX_FIELD_BYTES = 2 << 20, 1 << 20, 4096


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run one service with small limits for all cases; at the end it must take a good job."""
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("var"),
        embedded_workers=0,
        max_model_bytes=MAX_MODEL_BYTES,
        max_samples_bytes=MAX_SAMPLES_BYTES,
        max_field_bytes=MAX_FIELD_BYTES,
    )
    with running(settings) as found:
        yield found
        found.job()
        assert len(found.left_behind()) >= 1 + 2 + 2 + 2  # job, its claims, its blobs, their files


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    """Return the service; whatever the test asks of it must leave nothing behind."""
    before = shared.left_behind()
    yield shared
    assert shared.left_behind() == before


@dataclass(frozen=True)
class Case:
    """
    A form that is refused, and with what.

    ``form`` makes the changes to an honest form; ``says`` and ``hints`` must occur in the problem.
    """

    name: str
    form: Callable[[], dict[str, Any]]
    code: str
    says: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    status: int = 422

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def field_case(name: str, value: str, code: str = "invalid-field", *says: str) -> Case:
    """Return a case in which one plain field is wrong."""
    shown = value if len(value) <= 24 else f"{value[:21]}..."
    return Case(f"{name}={shown!a}", lambda: {name: value}, code, says=says)


def changed(**changes: Change) -> Callable[[], dict[str, Any]]:
    """Return the form of a case in a row of cases, which is made at once."""
    return lambda: dict(changes)


def resaved(change: Callable[[State], Any]) -> bytes:
    """Return an honest model file after *change* was made to its state dict."""
    state = state_dict()
    change(state)
    return saved(state)


def samples(**arrays: Any) -> dict[str, Any]:
    """Return the change of the samples to honest ones with other *arrays*."""
    return {"samples": samples_npz(**arrays)}


def one_value(value: float) -> Any:
    """Return honest float images but for one value."""
    found = float_images()
    found[1, 0, 2, 3] = value
    return found


def many_keys() -> State:
    """Return a state dict with five keys too many."""
    return state_dict() | {f"extra{n}": torch.zeros(1) for n in range(5)}


RESNET = "resnet18_cifar"

# What is asked for ---------------------------------------------------------------------------------

ASKED = [
    Case("architecture misspelt", lambda: {"architecture": "resnet18_cifr"},
         "unknown-architecture", says=("resnet18_cifr",), hints=(RESNET, "GET /architectures")),
    Case("architecture in capitals", lambda: {"architecture": "Small_CNN"},
         "unknown-architecture", hints=("small_cnn",)),
    Case("architecture like nothing", lambda: {"architecture": "zzz"},
         "unknown-architecture", hints=(RESNET, "small_cnn", "small_vgg")),
    Case("architecture empty", lambda: {"architecture": ""}, "unknown-architecture"),
    Case("architecture very long", lambda: {"architecture": "a" * 4000}, "unknown-architecture"),
    Case("architecture left out and none fits",
         lambda: {"architecture": None, "model": saved({"w": torch.zeros(2, 2)})},
         "architecture-needed", hints=("-F architecture=",)),
    Case("method unknown", lambda: {"method": "magic"}, "unknown-method",
         says=("'magic'", *METHODS), hints=("GET /methods",)),
    Case("method empty", lambda: {"method": ""}, "unknown-method"),
    Case("method in capitals", lambda: {"method": "AWM"}, "unknown-method"),
    Case("method very long", lambda: {"method": "m" * 4000}, "unknown-method"),
    Case("parameter unknown", lambda: {"method": "awm", "params": '{"epoch": 3}'}, "unknown-parameter",
         says=("'epoch'", "epochs", "mask_lr"), hints=("GET /methods",)),
    Case("parameter of another method", lambda: {"method": "none", "params": '{"epochs": 3}'},
         "unknown-parameter", says=("'epochs'", "none")),
    *(
        Case(f"parameter {text}", changed(method="awm", params=text), "invalid-parameter",
             says=(text.split('"')[1],))
        for text in (
            '{"epochs": "3"}', '{"epochs": 3.5}', '{"epochs": true}', '{"epochs": [3]}',
            '{"epochs": {}}', '{"epochs": 0}', '{"epochs": -1}', '{"epochs": 1001}',
            '{"epochs": 1e30}', '{"batch_size": 4097}', '{"alpha": 1.1}', '{"alpha": -0.1}',
            '{"alpha": "0.5"}', '{"alpha": true}', '{"tau": 0}',
            '{"flip": "no"}', '{"flip": 1}', '{"mask_lr_decay": 0}',
            '{"epochs": ' + "9" * 3000 + "}",
        )
    ),
    *(
        Case(f"{method} with {text}", changed(method=method, params=text), "invalid-parameter",
             says=(text.split('"')[1],))
        for method, texts in {
            "auto": ('{"steps": 0}', '{"rounds": -1}', '{"restarts": 65}', '{"restart_steps": 0}',
                     '{"layers": 0}', '{"ridge": 0}', '{"strengths": []}', '{"strengths": [0]}',
                     '{"strengths": [1.5]}', '{"copies": 101}', '{"reach": -1}',
                     '{"force": 1}', '{"flip": "no"}', '{"precision": "float8"}'),
            "awm": ('{"tau": -1}', '{"alpha": -0.1}', '{"alpha": 1.01}', '{"beta": -1}', '{"passes": 0}',
                    '{"gamma": -1e-8}', '{"perturbation_lr": 0}', '{"augmentations": -1}',
                    '{"shrink_epochs": -1}', '{"mask_linear": 0}'),
            "anp": ('{"iterations": 0}', '{"iterations": 100001}', '{"eps": -0.4}', '{"alpha": 1.1}',
                    '{"alpha": -0.1}', '{"lr": 0}', '{"momentum": 1}', '{"perturbation_steps": 0}',
                    '{"threshold": -0.1}', '{"max_accuracy_drop": 1.5}', '{"batch_size": 0}',
                    '{"batch_statistics": "no"}'),
            "clp": ('{"u": -1}', '{"u": "3"}', '{"u": true}', '{"u": 1001}'),
            "fine_tuning": ('{"epochs": 0}', '{"lr": -0.01}', '{"lr": 2}', '{"momentum": 1.0}',
                            '{"weight_decay": -1}', '{"batch_size": 0}', '{"augmentations": 101}',
                            '{"cosine": 1}', '{"flip": "yes"}'),
            "ibau": ('{"rounds": 0}', '{"passes": 0}', '{"fixed_point_iterations": 0}',
                     '{"inner_lr": 0}', '{"perturbation_lr": -1}', '{"penalty": -1}', '{"radius": 0}',
                     '{"portion": 0}', '{"portion": 1.1}', '{"optimiser": "lbfgs"}', '{"lr": 0}'),
        }.items()
        for text in texts
    ),
    *(
        Case(f"{method} has no such parameter", changed(method=method, params='{"no_such": 1}'),
             "unknown-parameter", says=("'no_such'", *entry.parameters.model_fields),
             hints=("GET /methods",))
        for method, entry in METHODS.items()
    ),
    *(
        field_case("params", text, "invalid-field", "'params'")
        for text in (
            "", "{", "epochs=3", "{'epochs': 3}", "[]", '"epochs"', "3", "null", "true",
            '{"alpha": NaN}', '{"alpha": Infinity}', '{"alpha": -Infinity}',
            '{"alpha": 1e999}', '{"tau": -1e999}',
            '{"epochs": 3, "epochs": 4}', '{"epochs": 3} x', "[" * 4000, '{"a":' * 800,
            "[" * 1900 + "]" * 1900, '{"a":' * 30 + "1" + "}" * 30, "9" * 4090,
        )
    ),
]  # fmt: skip

# Plain fields --------------------------------------------------------------------------------------

FIELDS = [
    *(field_case("seed", text, "invalid-field", "'seed'")
      for text in ("", "x", "1.5", "-1", str(2**63), "9" * 4000, "1e3", "NaN")),
    *(field_case("priority", text, "invalid-field", "'priority'")
      for text in ("", "high", "101", "-101", "1.0", "9" * 4000)),
    *(field_case("cancel_after", text, "invalid-field", "'cancel_after'")
      for text in ("", "x", "0", "-1", "nan", "inf", "1e999", f"{MAX_CANCEL_AFTER_SECONDS + 1}")),
    *(field_case("mean", text, "invalid-field", "'mean'")
      for text in ("", "x", "0.5,", ",", "0.5,0.5", "0.5,0.5,0.5", "nan", "inf", "-inf", "0.5;0.5",
                   "-1e5")),
    *(field_case("std", text, "invalid-field", "'std'")
      for text in ("", "x", "0.5,0.5", "nan", "inf", "0", "0.0", "-0", "-0.25", "1e-300", "1e5")),
    *(field_case("metadata", text, "invalid-field", "'metadata'")
      for text in ("", "x", "[]", '"x"', "1", "null", '{"a": NaN}', '{"a": 1, "a": 2}',
                   '{"a":' * 30 + "1" + "}" * 30, '{"a": 1e999}', '{"a": [-1e999]}',
                   r'{"a": "\ud800"}', r'{"\udfff": 1}')),
    *(field_case("architecture_args", text, "invalid-field", "architecture_args")
      for text in ("", "x", "[]", "null", '{"depth": 3}', '{"width": "4"}', '{"width": 4.5}',
                   '{"width": 0}', '{"width": 1025}', '{"classes": 1}', '{"classes": true}',
                   '{"channels": NaN}')),
    Case("unknown field", lambda: {"sampels": "x"}, "unknown-field",
         says=("'sampels'", "samples"), hints=("/openapi.json",)),
    Case("unknown file", lambda: {"weights": b"x"}, "unknown-field", says=("'weights'",)),
    Case("field in capitals", lambda: {"Seed": "1"}, "unknown-field"),
    Case("no model", lambda: {"model": None}, "missing-field", says=("model",),
         hints=("-F model=@model.pt",)),
    Case("no samples field", lambda: {"samples": None}, "missing-field", says=("samples",)),
    Case("nothing required", lambda: {"model": None, "samples": None}, "missing-field",
         says=("model", "samples")),
    Case("file where text is expected",
         lambda: {"architecture": Part("architecture", model_pt()[:2000], "model.pt")},
         "invalid-field", says=("'architecture'", "UTF-8")),
    Case("text where a file is expected", lambda: {"model": "model.pt"}, "unsupported-format",
         hints=(REEXPORT,)),
    Case("text where samples are expected", lambda: {"samples": "clean.npz"}, "invalid-samples"),
    *(
        Case(f"{name} not UTF-8", changed(**{name: Part(name, b"\xff\xfe")}),
             "invalid-field", says=(f"'{name}'", "UTF-8"))
        for name in ("architecture", "method", "params", "seed", "mean", "metadata", "path")
    ),
    Case("field too large", lambda: {"metadata": '{"a": "' + "x" * MAX_FIELD_BYTES + '"}'},
         "too-large", says=("'metadata'", str(MAX_FIELD_BYTES)), status=413),
]  # fmt: skip

# The model file ------------------------------------------------------------------------------------

MISMATCH = "architecture-mismatch"


def transposed(state: State) -> None:
    """Turn a convolution around."""
    state["conv2.weight"] = state["conv2.weight"].transpose(0, 1).contiguous()


def not_finite(value: float, dtype: torch.dtype, form: str) -> bytes:
    """Return a model file of one float type with one weight that is no number."""
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_dict().items()}
    state["bn3.weight"][5] = value
    return saved(state) if form == "pt" else safetensors.torch.save(state)


MODELS = [
    Case("model of another architecture", lambda: {"model": resnet_pt()}, MISMATCH,
         says=("missing: conv2.weight, bn2.weight, bn2.bias and 7 more",
               "unexpected: layer1.0.conv1.weight,", "small_cnn"), hints=("architecture_args",)),
    Case("missing key", lambda: {"model": resaved(lambda s: s.pop("bn2.bias"))}, MISMATCH,
         says=("missing: bn2.bias.",)),
    Case("unexpected keys", lambda: {"model": saved(many_keys())}, MISMATCH,
         says=("unexpected: extra0, extra1, extra2 and 2 more.",)),
    Case("mis-shaped key", lambda: {"model": resaved(transposed)}, MISMATCH,
         says=("of another shape: conv2.weight is (4, 8, 3, 3), not (8, 4, 3, 3)",)),
    Case("long key", lambda: {"model": saved(state_dict() | {"k" * 500: torch.zeros(1)})},
         MISMATCH, says=("unexpected: kkk",)),
    Case("very long key", lambda: {"model": saved(state_dict() | {"k" * 3000: torch.zeros(1)})},
         "unsupported-format", says=("too long",)),
    Case("args against the shapes", lambda: {"architecture_args": '{"width": 8}'}, MISMATCH,
         says=("conv1.weight is (4, 1, 3, 3), not (8, 1, 3, 3)",)),
    Case("classes against the head", lambda: {"architecture_args": '{"classes": 5}'},
         "class-count-mismatch", says=("linear.weight is (4, 16), not (5, 16)",)),
    *(
        Case(f"{bad} in {dtype} {form}".replace("torch.", ""),
             changed(model=not_finite(bad, dtype, form)),
             "weights-not-finite", says=("'bn3.weight'",), hints=("diverged",))
        for bad in (math.nan, math.inf, -math.inf)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for form in ("pt", "safetensors")
    ),
    Case("NaN in a running mean",
         lambda: {"model": resaved(lambda s: s["bn1.running_mean"].__setitem__(0, math.nan))},
         "weights-not-finite", says=("'bn1.running_mean'",)),
    Case("pickled module", lambda: {"model": saved(module())}, "pickled-module",
         hints=(REEXPORT,)),
    Case("pickled module in a dict", lambda: {"model": saved({"model": module()})},
         "pickled-module", hints=(REEXPORT,)),
    Case("legacy format",
         lambda: {"model": saved(state_dict(), _use_new_zipfile_serialization=False)},
         "pickled-module", hints=(REEXPORT,)),
    Case("TorchScript",
         lambda: {"model": hostile.torch_zip(extra={"archive/constants.pkl": b"\x80\x02)."})},
         "unsupported-format", says=("TorchScript",), hints=(REEXPORT,)),
    *(
        Case(f"model cut to {part}", changed(model=model_pt()[:part]), "damaged-file", hints=("sha256",))
        for part in (5, 100, len(model_pt()) // 2, -100, -1)
    ),
    *(
        Case(f"safetensors cut to {part}", changed(model=model_safetensors()[:part]),
             "damaged-file")
        for part in (20, 500, len(model_safetensors()) // 2, -1)
    ),
    Case("model with a flipped bit", lambda: {"model": flipped(model_pt(), at=0.5)},
         "damaged-file"),
    Case("model compressed", lambda: {"model": hostile.torch_zip(compression=zipfile.ZIP_DEFLATED)},
         "unsupported-format"),
    Case("model empty", lambda: {"model": b""}, "empty-file", says=("model",)),
    Case("model is text", lambda: {"model": b"hello world\n"}, "unsupported-format",
         hints=(REEXPORT,)),
    Case("model is gzip", lambda: {"model": b"\x1f\x8b" + bytes(20)}, "unsupported-format",
         says=("gzip",)),
    Case("model is HDF5", lambda: {"model": b"\x89HDF\r\n" + bytes(20)}, "unsupported-format",
         says=("HDF5",)),
    Case("model is one zero byte", lambda: {"model": b"\0"}, "unsupported-format"),
    Case("model is the samples", lambda: {"model": samples_npz()}, "unsupported-format"),
    Case("model is another zip", lambda: {"model": hostile.npz({"a": b"x"})}, "unsupported-format"),
    Case("model is a tensor", lambda: {"model": saved(torch.zeros(3))}, "no-state-dict",
         hints=("model_state_dict",)),
    Case("model has no tensor", lambda: {"model": saved({"epoch": 3})}, "no-state-dict"),
    Case("model is an empty dict", lambda: {"model": saved({})}, "no-state-dict"),
    Case("model too large", lambda: {"model": bytes(MAX_MODEL_BYTES + 1)}, "too-large",
         says=("'model'", str(MAX_MODEL_BYTES)), status=413),
]  # fmt: skip


def flipped(content: bytes, *, at: float) -> bytes:
    """Return *content* with one bit flipped."""
    changed = bytearray(content)
    changed[int(len(content) * at)] ^= 1
    return bytes(changed)


# The sample files ----------------------------------------------------------------------------------


def bomb() -> bytes:
    """Return an .npz of zeros that unpacks beyond the limit."""
    header = hostile.npy(hostile.npy_header((40_000, 8, 8, 1)))
    return hostile.zip_of_zeros_deflated("images.npy", header, 2 * MAX_SAMPLES_BYTES)


SAMPLES = [
    Case("label beyond the head", lambda: samples(labels=np.array([0, 1, 2, 4])),
         "class-count-mismatch", says=("label 4", "4 classes")),
    Case("no image", lambda: samples(images=images(0), labels=labels(0)), "no-samples",
         hints=("one clean image per class",)),
    Case("no images array", lambda: samples(images=None), "invalid-samples", says=("'images'",)),
    Case("image below 0", lambda: samples(images=one_value(-0.01)), "images-out-of-range",
         hints=("before normalisation", "mean and std")),
    Case("image above 1", lambda: samples(images=one_value(1.01)), "images-out-of-range",
         says=("1.01",)),
    Case("image of 0 to 255 as floats", lambda: samples(images=float_images() * 255),
         "images-out-of-range"),
    Case("NaN image", lambda: samples(images=one_value(math.nan)), "images-out-of-range"),
    Case("infinite image", lambda: samples(images=one_value(math.inf)), "images-out-of-range"),
    Case("NaN image in float64",
         lambda: samples(images=one_value(math.nan).astype(np.float64)), "images-out-of-range"),
    Case("images of three dimensions", lambda: samples(images=images()[..., 0]), "invalid-images",
         says=("(4, 8, 8)",), hints=("(N, H, W, C)", "(N, C, H, W)")),
    Case("images of five dimensions", lambda: samples(images=images()[None]), "invalid-images"),
    Case("images of no width", lambda: samples(images=images()[:, :, :0]), "invalid-images"),
    Case("images smaller than any network pools", lambda: samples(images=images()[:, :3, :3]),
         "invalid-images", says=("3x3", "4x4")),
    Case("images wider than any", lambda: samples(images=np.zeros((1, 1, 4097, 1), np.uint8),
                                                  labels=labels(1)), "invalid-images"),
    Case("colour images for a grey model", lambda: samples(images=images(channels=3)),
         "invalid-images", says=("3 channels", "takes 1")),
    Case("uint8 images in float order", lambda: samples(images=images().transpose(0, 3, 1, 2)),
         "invalid-images", says=("8 channels",)),
    Case("images of the wrong size",
         lambda: {
             "architecture": "small_vgg",
             "model": saved(state_dict("small_vgg", classes=4, channels=1, width=2, input_size=16)),
         },
         "invalid-images", says=("8x8", "16x16")),
    *(
        Case(f"images of the type {dtype}",
             changed(samples=samples_npz(images=images().astype(dtype))), "invalid-images")
        for dtype in ("int64", "int8", "uint16", "bool", "complex64", "S1", "U1")
    ),
    Case("images that are dates", changed(samples=samples_npz(images=images().astype("M8[s]"))),
         "invalid-samples"),
    Case("images of objects", lambda: samples(images=np.array([[[[None]]]], dtype=object)),
         "invalid-samples", says=("objects",)),
    Case("labels of the wrong number", lambda: samples(labels=labels(3)), "invalid-labels",
         says=("(3,)", "(4,)")),
    Case("labels one-hot", lambda: samples(labels=np.eye(4, dtype=np.int64)), "invalid-labels"),
    Case("labels as floats", lambda: samples(labels=labels().astype(np.float32)), "invalid-labels"),
    Case("labels as text", lambda: samples(labels=np.array(["a", "b", "c", "d"])),
         "invalid-labels"),
    Case("labels below 0", lambda: samples(labels=np.array([0, 1, 2, -1])), "invalid-labels",
         says=("-1",)),
    Case("labels of objects", lambda: samples(labels=np.array([0, 1, 2, None])),
         "invalid-samples"),
    Case("evaluation without labels", lambda: {"evaluation": samples_npz(labels=None)},
         "invalid-labels", says=("evaluation", "'labels'")),
    Case("evaluation label beyond the head",
         lambda: {"evaluation": samples_npz(labels=labels() + 1)}, "class-count-mismatch",
         says=("evaluation", "label 4")),
    Case("evaluation of another size",
         lambda: {"evaluation": npz(images=images(side=16), labels=labels())}, "invalid-images",
         says=("evaluation", "(1, 16, 16)", "(1, 8, 8)")),
    Case("evaluation empty", lambda: {"evaluation": b""}, "empty-file", says=("evaluation",)),
    Case("triggered without a target", lambda: {"triggered": samples_npz()}, "invalid-labels",
         says=("triggered", "'target'")),
    Case("triggered without labels", lambda: {"triggered": samples_npz(labels=None, target=0)},
         "invalid-labels", says=("triggered", "'labels'")),
    Case("target beyond the head", lambda: {"triggered": samples_npz(target=np.int64(4))},
         "class-count-mismatch", says=("triggered", "target 4")),
    Case("target below 0", lambda: {"triggered": samples_npz(target=np.int64(-1))},
         "invalid-labels", says=("target",)),
    Case("target a fraction", lambda: {"triggered": samples_npz(target=0.5)}, "invalid-labels"),
    Case("targets of the wrong number",
         lambda: {"triggered": samples_npz(target=np.zeros(3, np.int64))}, "invalid-labels"),
    Case("triggered NaN", lambda: {"triggered": samples_npz(images=one_value(math.nan), target=0)},
         "images-out-of-range", says=("triggered",)),
    Case("samples empty", lambda: {"samples": b""}, "empty-file", says=("samples",)),
    Case("samples are text", lambda: {"samples": b"label,image\n"}, "invalid-samples",
         hints=("np.savez",)),
    Case("samples are a bare .npy", lambda: {"samples": bare_npy()}, "invalid-samples"),
    Case("samples are the model", lambda: {"samples": model_pt()}, "invalid-samples"),
    Case("samples are a model in safetensors", lambda: {"samples": model_safetensors()},
         "invalid-samples", hints=("save_file",)),
    Case("safetensors of bytes in float order",
         lambda: {"samples": in_safetensors(images=images().transpose(0, 3, 1, 2))},
         "invalid-images", says=("8 channels",), hints=("images / 255",)),
    Case("safetensors cut short", lambda: {"samples": in_safetensors(images=images())[:-1]},
         "damaged-file"),
    Case("triggered safetensors without a target",
         lambda: {"triggered": in_safetensors(images=images(), labels=labels())}, "invalid-labels",
         says=("triggered", "'target'"), hints=("save_file",)),
    Case("safetensors of labels beyond the head",
         lambda: {"evaluation": in_safetensors(images=images(), labels=labels() + 1)},
         "class-count-mismatch", says=("evaluation", "label 4")),
    *(
        Case(f"samples cut to {part}", changed(samples=samples_npz()[:part]), "damaged-file")
        for part in (10, 200, -30, -1)
    ),
    Case("samples with a flipped bit", lambda: {"samples": flipped(samples_npz(), at=0.2)},
         "damaged-file"),
    Case("samples unpack beyond the limit", lambda: {"samples": bomb()}, "too-large",
         says=("unpacks", str(MAX_SAMPLES_BYTES)), status=413),
    Case("samples too large", lambda: {"samples": bytes(MAX_SAMPLES_BYTES + 1)}, "too-large",
         says=("'samples'", str(MAX_SAMPLES_BYTES)), status=413),
]  # fmt: skip


def bare_npy() -> bytes:
    """Return one array as ``np.save`` writes it."""
    buffer = io.BytesIO()
    np.save(buffer, images())
    return buffer.getvalue()


@pytest.mark.parametrize("case", [*ASKED, *FIELDS, *MODELS, *SAMPLES], ids=str)
def test_is_refused(service: Service, case: Case) -> None:
    """A bad form gets a problem with a stable code and a fix, and leaves nothing behind."""
    problem = problem_of(service.post(**case.form()), case.status, case.code)
    assert all(text in problem["detail"] for text in case.says), problem["detail"]
    assert all(text in problem["hint"] for text in case.hints), problem["hint"]
    assert problem["hint"]


@pytest.mark.parametrize("case", [*ASKED, *MODELS, *SAMPLES][::8], ids=str)
def test_is_refused_by_a_dry_run(service: Service, case: Case) -> None:
    """A dry run refuses what a job is refused for."""
    problem_of(service.post("/jobs?dry_run=true", **case.form()), case.status, case.code)


@pytest.mark.parametrize("gadget", list(hostile.GADGETS))
def test_code_in_a_pickle_never_runs(service: Service, gadget: str, tmp_path: Path) -> None:
    """A pickle that names code is refused unread, whatever opcode it calls it by."""
    canary = tmp_path / "canary"
    description = hostile.pickled(hostile.GADGETS[gadget](canary))
    answer = service.post(model=hostile.torch_zip(description))
    problem = problem_of(answer, 422, answer.json()["code"])
    assert problem["code"] in {"unsafe-pickle", "damaged-file", "unsupported-format"}
    assert not canary.exists()


def test_code_in_a_sample_file_never_runs(service: Service, tmp_path: Path) -> None:
    """An array of objects would be unpickled by numpy; it is refused by its header."""
    canary = tmp_path / "canary"
    pickle = hostile.pickled(hostile.GADGETS["eval"](canary))
    array = hostile.npy(hostile.npy_header((1, 8, 8, 1), "|O"), pickle)
    problem_of(service.post(samples=hostile.npz({"images": array})), 422, "invalid-samples")
    assert not canary.exists()


# The form itself -----------------------------------------------------------------------------------


def post_raw(service: Service, body: bytes, headers: dict[str, str] | None = None) -> Any:
    """Post any body, by default announced as a form."""
    return service.client.post(
        "/jobs", content=body, headers=content_type() if headers is None else headers
    )


@pytest.mark.parametrize("name", ["model", "samples", "seed", "params"])
def test_same_field_twice_is_refused(service: Service, name: str) -> None:
    """Neither of two values is chosen."""
    form = parts(seed="1", params="{}")
    twice = [*form, next(part for part in form if part.name == name)]
    problem = problem_of(post_raw(service, encoded(twice)), 422, "invalid-field")
    assert f"'{name}'" in problem["detail"]


@pytest.mark.parametrize(
    "announced",
    [
        None,
        "application/json",
        "application/x-www-form-urlencoded",
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=x",
        "multipart/form-data; boundary*=",
        "multipart/form-data; boundary*",
        "multipart/form-data; boundary=\xff",
        "multipart/form-data; boundary*0=a; boundary*2=b",
        ";",
        "",
    ],
)
def test_what_is_no_form_is_refused(service: Service, announced: str | None) -> None:
    """A body that is not announced as a form with a boundary is not read as one."""
    raw: Any = [] if announced is None else [(b"Content-Type", announced.encode("latin1"))]
    problem = problem_of(post_raw(service, b'{"model": 1}', raw), 400, "not-multipart")
    assert "curl -F" in problem["hint"]


HONEST = encoded(parts())
DELIMITER = f"--{BOUNDARY}".encode()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"model=1&samples=2", id="no boundary in it"),
        pytest.param(encoded(parts(), boundary="another"), id="another boundary"),
        pytest.param(HONEST[:10], id="cut in the first delimiter"),
        pytest.param(HONEST[:60], id="cut in a part's header"),
        pytest.param(HONEST[:2000], id="cut in the model"),
        pytest.param(HONEST[: HONEST.index(b"clean.npz") + 200], id="cut in the samples"),
        pytest.param(HONEST[: -len(DELIMITER) - 10], id="cut in the last part"),
        pytest.param(HONEST[: -len(DELIMITER) + 2], id="cut in the last delimiter"),
        pytest.param(
            HONEST[: HONEST.rindex(DELIMITER) + len(DELIMITER)] + b"\r\n",
            id="cut behind a delimiter",
        ),
        pytest.param(
            DELIMITER + b"\r\nContent-Disposition: form-data\r\n\r\nx\r\n", id="part without a name"
        ),
        pytest.param(bytes(range(256)) * 20, id="binary noise"),
    ],
)
def test_broken_form_is_refused(service: Service, body: bytes) -> None:
    """A form that is damaged or ends early is no form, even when all it must hold has come."""
    problem_of(post_raw(service, body), 400, "not-multipart")


def test_lost_connection_leaves_nothing(service: Service) -> None:
    """A client that goes away in the middle of its upload leaves nothing behind."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": HONEST[:3000], "more_body": True},
        {"type": "http.disconnect"},
    ]
    status, _ = ask(service, messages, {"Content-Length": str(len(HONEST))})
    assert status == 400


# Too large -----------------------------------------------------------------------------------------


def ask(
    service: Service, messages: list[dict[str, Any]], headers: dict[str, str]
) -> tuple[int, bytes]:
    """Post to the application itself and return status and body; each message is read once."""
    sent: list[Any] = []

    async def receive() -> Any:
        assert messages, "the body was read further"
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    given = {"Host": "127.0.0.1", **content_type(), **headers}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/jobs",
        "raw_path": b"/jobs",
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in given.items()],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(service.app(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], body


@pytest.mark.parametrize("length", [6 << 20, 1 << 40, 10**30])
def test_announced_length_is_refused_before_the_body_is_read(service: Service, length: int) -> None:
    """A body that says it is too large is not read at all."""
    status, body = ask(service, [], {"Content-Length": str(length + 1)})
    assert status == 413
    assert json.loads(body)["code"] == "too-large"
    assert str(service.settings.max_body_bytes) in json.loads(body)["detail"]


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "", "²"])
def test_length_that_is_no_number_is_refused(service: Service, length: str) -> None:
    """A Content-Length that is no number is refused unread."""
    status, body = ask(service, [], {"Content-Length": length})
    assert status == 400
    assert json.loads(body)["code"] == "not-multipart"


def test_unannounced_body_is_cut_off_at_the_limit(service: Service) -> None:
    """A chunked body is read up to the limit and not further."""
    piece = bytes(1 << 20)
    limit = service.settings.max_body_bytes // len(piece)
    # The preamble before the first delimiter is nobody's part, so only the whole can be too large.
    messages = [{"type": "http.request", "body": piece, "more_body": True}] * (limit + 1)
    form = encoded(parts())
    head = form[: form.index(b"\r\n\r\n") + 4]
    messages[0] = {"type": "http.request", "body": head, "more_body": True}
    status, body = ask(service, list(messages), {"Transfer-Encoding": "chunked"})
    assert status == 413
    assert json.loads(body)["code"] == "too-large"


def test_chunked_honest_form_is_taken(service: Service) -> None:
    """A body without an announced length is as good as any."""
    body = encoded(parts())

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    answer = service.client.post("/jobs?dry_run=true", content=pieces(), headers=content_type())
    assert answer.status_code == 200


# No space left -------------------------------------------------------------------------------------


def test_announced_length_beyond_the_free_space_is_refused(start: Start) -> None:
    """A body for which there is no room is refused before it is read."""
    with start(max_model_bytes=1 << 60, max_stored_bytes=0) as service:
        status, body = ask(service, [], {"Content-Length": str(1 << 59)})
        assert status == 507
        assert json.loads(body)["code"] == "no-space"
        assert service.left_behind() == []


def _fails(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or _fails(command):
        pytest.skip("this process may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_upload_folder_gets_507(start: Start, tiny_disk: Path, tmp_path: Path) -> None:
    """When the disk fills up during an upload, what was written of it goes."""
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "uploads").symlink_to(tiny_disk)
    form = {"model": saved(state_dict(classes=4, channels=1, width=32))}
    with start() as service:
        body = encoded(parts(**form))
        answer = service.client.post("/jobs", content=iter([body]), headers=content_type())
        problem = problem_of(answer, 507, "no-space")
        assert "operator" in problem["hint"]
        assert service.left_behind() == []
        service.job()


def test_full_store_gets_507(start: Start, tiny_disk: Path) -> None:
    """When the store fills up, neither file nor row nor half a job stays."""
    with start(blob_url=tiny_disk.as_uri()) as service:
        big = saved(state_dict(classes=4, channels=1, width=32))
        problem_of(service.post(model=big), 507, "no-space")
        assert service.left_behind() == []
        assert [path for path in tiny_disk.rglob("*") if path.is_file()] == []
        service.job()


class FullStore(FileBlobStore):
    """A store on a disk that is full when the second file comes."""

    def put(self, key: str, path: Path) -> None:
        """Store one file, then none."""
        if any(self.keys("uploads")):
            raise OSError(28, "No space left on device")
        super().put(key, path)


def test_half_stored_job_gets_507(start: Start) -> None:
    """When one of two files finds no room, the other one does not stay either."""
    with start() as service:
        with service.with_store(FullStore(service.settings.data_dir / "blobs")):
            problem_of(service.post(), 507, "no-space")
        assert service.left_behind() == []
        service.job()


# What is good --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"samples": samples_npz(images=images(1), labels=labels(1))},
        {"samples": samples_npz(labels=None)},
        {"samples": npz(x=images(), y=labels())},
        {"samples": samples_npz(images=float_images())},
        {
            name: in_safetensors(images=float_images(), labels=labels(), target=np.array(0))
            for name in ("samples", "evaluation", "triggered")
        },
        {"architecture": None},
        {"model": model_safetensors()},
        {"model": saved({"state_dict": state_dict(), "epoch": 3})},
        {"model": saved({f"module.{key}": value for key, value in state_dict().items()})},
        {"evaluation": samples_npz(), "triggered": samples_npz(target=np.int64(0))},
        {"evaluation": samples_npz()},
        {"mean": "0.5", "std": "0.25", "seed": str(2**63 - 1), "priority": "-100"},
        {
            "method": "awm",
            "params": '{"epochs": 1, "alpha": 0, "flip": false}',
            "cancel_after": "0.5",
        },
        {"metadata": '{"sha": "é", "list": [1, null, {"deep": 1.5}]}', "path": "models/é.pt"},
        {"method": "none", "params": "{}"},
        {"method": "anp", "params": '{"iterations": 1, "threshold": 0, "eps": 0.0}'},
        {"method": "auto", "params": '{"strengths": [1, 0.5], "force": true}'},
        {"method": "clp"},
        {"method": "clp", "params": '{"u": 0}'},
        {"method": "fine_tuning", "params": '{"epochs": 1000, "cosine": false}'},
        {"method": "ibau", "params": '{"optimiser": "sgd", "portion": 1}'},
    ],
    ids=lambda form: "+".join(form) or "plain",
)
def test_good_form_is_taken(start: Start, form: dict[str, Any]) -> None:
    """What is honest is accepted, fewer samples than classes included."""
    with start() as service:
        job = service.client.get(f"/jobs/{service.job(**form)}").json()
        assert job["state"] == "queued"
        assert service.client.get("/jobs").json()["data"] == [job]
