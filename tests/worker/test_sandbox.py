"""A job's process behind its walls: uploads that no gate has seen do no harm, and jobs still run."""

import io
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.support.inputs import CLASSES, SPEC, cnn_state, npz, samples, saved
from tests.support.jail import convert, converter, needs
from worker import sandbox
from worker.jail import landlock, paths, seccomp
from worker.sandbox import LAYERS, Jail, Layer, Stage


class Touch:
    """A pickle that makes a file when it is loaded by a loader that runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_jail_survives_its_command_line(tmp_path: Path) -> None:
    """Law: ``from_json(to_json(jail)) == jail``."""
    jail = Jail(home=tmp_path, stage=Stage.PURIFY, gpu=True, layers=LAYERS - {Layer.MEMORY})
    assert Jail.from_json(jail.to_json()) == jail


def test_honest_files_are_converted(tmp_path: Path) -> None:
    """Behind all walls an honest upload becomes tensors."""
    with converter(tmp_path) as child:
        answer = convert(child, {"model": saved(cnn_state()), "samples": samples()}, SPEC)
        assert answer is not None
        assert answer.problem is None
        child.take("weights", tmp_path / "weights", limit=1 << 20)
    assert (tmp_path / "weights").stat().st_size > 0


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_pictures_are_decoded_behind_all_walls(tmp_path: Path, form: str) -> None:
    """What decodes a picture is imported late, and is there all the same."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for label in range(CLASSES):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (label, 0, 0)).save(picture, form)
            archive.writestr(f"{label}/1.{form.lower()}", picture.getvalue())
    with converter(tmp_path) as child:
        files = {"model": saved(cnn_state()), "samples": file.getvalue()}
        answer = convert(child, files, SPEC)
        assert answer is not None
        assert answer.problem is None
        child.take("samples", tmp_path / "samples", limit=1 << 20)
    assert safetensors.torch.load_file(tmp_path / "samples")["images"].shape == (CLASSES, 3, 8, 8)


def test_code_in_a_model_is_not_run(tmp_path: Path) -> None:
    """Without any gate before it, the process refuses a pickle that names code, and no canary is made."""
    canary = tmp_path / "canary"
    with converter(tmp_path) as child:
        hostile = saved({"net": cnn_state(), "more": Touch(canary)})
        answer = convert(child, {"model": hostile, "samples": samples()}, SPEC)
    assert answer is not None
    assert answer.problem is not None
    assert answer.problem["code"] == "unsafe-pickle"
    assert not canary.exists()


def test_pickle_among_samples_is_not_loaded(tmp_path: Path) -> None:
    """An object array is refused by the loader itself."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images.npy", pickle.dumps(Touch(tmp_path / "canary")))
    with converter(tmp_path) as child:
        answer = convert(child, {"model": saved(cnn_state()), "samples": file.getvalue()}, SPEC)
    assert answer is not None
    assert (answer.problem or {})["code"] == "invalid-samples"
    assert not (tmp_path / "canary").exists()


@needs(Layer.MEMORY)
def test_bomb_meets_the_cap_on_memory(tmp_path: Path) -> None:
    """Images that unpack to more than the cap end the order, and neither the machine nor the worker."""
    file = io.BytesIO()
    side = 8 << 10  # 3 x 8192 x 8192 x 64 bytes as announced, and some kilobytes as sent
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (64, side, side, 3)}
    )
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(1 << 20))
        # The directory tells the same lie as the header: the loader compares the two.
        archive.infolist()[0].file_size = 64 * side * side * 3 + len(header.getvalue())
    with converter(tmp_path) as child:
        answer = convert(child, {"model": saved(cnn_state()), "samples": file.getvalue()}, SPEC)
    assert answer is not None
    assert (answer.problem or {})["code"] == "out-of-memory"


@needs(Layer.LANDLOCK)
def test_nothing_that_a_job_needs_holds_other_data(tmp_path: Path) -> None:
    """Neither the project's folder, nor a temporary one, nor other processes can be read."""
    allowed = {path.resolve() for path, _ in paths.rules(tmp_path, gpu=True)}
    project = Path(__file__).resolve().parents[2]
    for kept in (project, project / "var", Path("/"), Path("/tmp"), Path("/proc"), Path("/etc")):
        assert kept not in allowed
        assert not any(kept.is_relative_to(path) for path in allowed)


@needs(Layer.LANDLOCK)
def test_only_its_home_is_written_to(tmp_path: Path) -> None:
    """Beside devices and its own corner of /proc, a child may write in its home alone."""
    writable = [
        path
        for path, access in paths.rules(tmp_path, gpu=True)
        if access & (landlock.Access.WRITE_FILE | landlock.Access.MAKE_REG)
    ]
    assert writable[:2] == [tmp_path, Path("/proc/self")]
    assert all(path.is_relative_to("/dev") for path in writable[2:])


def test_platform_without_walls_is_not_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither Linux nor the library is there, the walls are missing, and say why."""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert set(sandbox.missing()) == {Layer.MEMORY, Layer.LANDLOCK, Layer.SECCOMP}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(seccomp, "LIBRARY", "libnothing.so.0")
    seccomp._library.cache_clear()
    try:
        assert "libnothing" in (seccomp.missing() or "")
    finally:
        monkeypatch.undo()
        seccomp._library.cache_clear()


@pytest.mark.gpu
def test_gpu_is_reached_from_the_jail(tmp_path: Path) -> None:
    """The second stage computes on a GPU behind the same walls."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    from common.catalogue.architectures import ARCHITECTURES
    from worker.pair import Pair

    state = cnn_state()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    model = saved(state)
    spec = SPEC.model_copy(
        update={
            "architecture_args": ARCHITECTURES["small_cnn"].fit(shapes).model_dump(),
            "model": SPEC.model.model_copy(update={"bytes": len(model)}),
        }
    )
    pair = Pair(tmp_path, gpu=True)
    try:
        (pair.converter.inbox / "model").write_bytes(model)
        (pair.converter.inbox / "samples").write_bytes(samples())
        pair.convert(spec, cpu_seconds=600, check=lambda: None)
        result = pair.purify(spec, device="cuda", threads=1, cpu_seconds=600, check=lambda: None)
    finally:
        pair.kill()
    assert result.report is not None
    assert "cuda" in str(result.report["environment"])


def test_images_are_those_of_the_specification(tmp_path: Path) -> None:
    """The process itself refuses what the specification does not say."""
    other = npz(images=np.zeros((4, 9, 9, 3), np.uint8), labels=np.arange(4))
    with converter(tmp_path) as child:
        answer = convert(child, {"model": saved(cnn_state()), "samples": other}, SPEC)
    assert answer is not None
    assert (answer.problem or {})["code"] == "invalid-images"
