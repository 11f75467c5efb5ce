"""The gate against the loaders behind it: what it takes they load, to the same, running nothing."""

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import DamagedFile, Refused
from common.formats.model import ModelFile, check_finite, inspect_model
from common.formats.safetensors import MAX_RANK
from common.formats.samples import Purpose, inspect_samples
from tests.common.formats.test_torch_zip import DTYPES
from tests.hostile_files import entry, safetensors_file
from worker.samples import load_samples

FEW = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=9)
SHAPES = st.lists(st.integers(0, 4), max_size=5)

Edit = tuple[int, int, bytes]  # where, how many bytes go, what comes instead


@st.composite
def edits(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw *content* with a few bytes changed, cut, put in or swapped for bytes from elsewhere in it."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(changed) - 1))
        match draw(st.integers(0, 4)):
            case 0:
                changed[place] = draw(st.integers(0, 255))
            case 1:
                changed[place] ^= 1 << draw(st.integers(0, 7))
            case 2:
                del changed[place : place + draw(st.integers(1, 8))]
            case 3:
                changed[place:place] = draw(st.binary(min_size=1, max_size=6))
            case _:
                other = draw(st.integers(0, len(changed) - 1))
                length = draw(st.integers(1, 12))
                changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


def passed(path: Path) -> ModelFile | None:
    """Return what the gate says of a file that it takes."""
    try:
        model = inspect_model(path)
        check_finite(path, model)
    except Refused:
        return None
    return model


def assert_same(model: ModelFile, loaded: dict[str, torch.Tensor]) -> None:
    """Hold the gate's description against the tensors that a loader made."""
    assert set(model.tensors) == set(loaded)
    for key, tensor in loaded.items():
        found = model.tensors[key]
        assert found.shape == tuple(tensor.shape)
        assert found.dtype == str(tensor.dtype).removeprefix("torch.")


def written(content: bytes, path: Path) -> Path:
    """Write the bytes of an upload."""
    path.write_bytes(content)
    return path


# safetensors ---------------------------------------------------------------------------------------


@FEW
@given(
    state=st.dictionaries(
        NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=5
    ),
    note=st.dictionaries(NAMES, NAMES, max_size=2),
)
def test_what_the_library_writes_is_taken(
    tmp_path: Path, state: dict[str, Any], note: dict[str, str]
) -> None:
    """Every file of the library's own serialiser passes, and is described as it was written."""
    state = {
        key: torch.ones(shape, dtype=dtype)
        for key, (shape, dtype) in state.items()
        if key != "__metadata__"
    }
    if not state:
        return
    path = written(safetensors.torch.save(state, metadata=note or None), tmp_path / "m")
    model = passed(path)
    assert model is not None
    assert_same(model, {key.removeprefix(model.prefix): value for key, value in state.items()})


NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 12, 16, -1, -0.0, 1.0, True, None, 1 << 40, 1 << 64, "8"])
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F64", "BF16", "I8", "BOOL", "F8_E4M3", "f32", 4]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=MAX_RANK + 1), st.none()),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    },
    optional={"more": NUMBERS},
)
PLAUSIBLE = st.integers(1, 3).map(
    lambda n: {"dtype": "F32", "shape": [n], "data_offsets": [0, 4 * n]}
)


@FEW
@given(
    header=st.dictionaries(
        st.one_of(NAMES, st.just("__metadata__")), st.one_of(PLAUSIBLE, ENTRY), max_size=3
    ),
    size=st.sampled_from([0, 4, 8, 12, 16]),
)
def test_any_header_that_is_taken_is_loaded_by_the_library(
    tmp_path: Path, header: dict[str, Any], size: int
) -> None:
    """Whatever header passes the gate, the library reads the same names, types and shapes from it."""
    content = safetensors_file(header, bytes(size))
    model = passed(written(content, tmp_path / "m"))
    if model is not None:
        loaded = safetensors.torch.load(content)
        assert_same(model, {key.removeprefix(model.prefix): value for key, value in loaded.items()})


SAFE = safetensors.torch.save({"w": torch.ones(3, 2), "b": torch.zeros(2)}, metadata={"a": "b"})


@settings(FEW, max_examples=300)
@given(content=edits(SAFE))
def test_changed_safetensors_is_refused_or_loaded_alike(tmp_path: Path, content: bytes) -> None:
    """A changed file that passes the gate is one that the library loads to the same description."""
    model = passed(written(content, tmp_path / "m.safetensors"))
    if model is not None:
        loaded = safetensors.torch.load(content)
        assert_same(model, {key.removeprefix(model.prefix): value for key, value in loaded.items()})


# torch's zip -----------------------------------------------------------------------------------------


def torch_file() -> bytes:
    """Return a checkpoint with something of everything that may lie in one."""
    layer = torch.nn.BatchNorm1d(2)
    buffer = io.BytesIO()
    value = {
        "net": layer.state_dict(),
        "epoch": 3,
        "names": ["a", None, 0.5, (1, 2)],
        "device": torch.device("cpu"),
        "size": torch.Size([2]),
    }
    torch.save(value, buffer)
    return buffer.getvalue()


TORCH = torch_file()
MEMBERS = {
    info.filename: zipfile.ZipFile(io.BytesIO(TORCH)).read(info)
    for info in zipfile.ZipFile(io.BytesIO(TORCH)).infolist()
}


def zip_around(description: bytes) -> bytes:
    """Return the honest zip with another description and right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, description if name.endswith("data.pkl") else content)
    return buffer.getvalue()


def check_against_torch(content: bytes, path: Path) -> None:
    """Load with ``weights_only`` what the gate takes, and compare."""
    model = passed(written(content, path))
    if model is None:
        return
    root = torch.load(path, map_location="cpu", weights_only=True)
    state = root if model.wrapper is None else root[model.wrapper]
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    assert_same(model, {key.removeprefix(model.prefix): value for key, value in tensors.items()})
    for key, tensor in tensors.items():
        assert model.tensors[key.removeprefix(model.prefix)].stride == tensor.stride()


@settings(FEW, max_examples=300)
@given(content=edits(TORCH))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changed_torch_zip_is_refused_or_loaded_alike(tmp_path: Path, content: bytes) -> None:
    """A changed file that passes the gate is one that ``weights_only`` loads to the same tensors."""
    check_against_torch(content, tmp_path / "m.pt")


@settings(FEW, max_examples=500)
@given(description=edits(MEMBERS["archive/data.pkl"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_changed_pickle_is_refused_or_loaded_alike(tmp_path: Path, description: bytes) -> None:
    """The same with checksums that match, so that every change reaches the pickle machines."""
    check_against_torch(zip_around(description), tmp_path / "m.pt")


# zip and numpy ---------------------------------------------------------------------------------------


@FEW
@given(
    members=st.dictionaries(
        st.text("abc", min_size=1, max_size=3), st.binary(max_size=40), min_size=1, max_size=5
    ),
    method=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    is_streamed=st.booleans(),
)
def test_what_zipfile_writes_is_opened(
    tmp_path: Path, members: dict[str, bytes], method: int, *, is_streamed: bool
) -> None:
    """Zips of ``zipfile``, also those that it could not seek in, open to the same members."""
    from common.errors import UnsafeZip
    from common.formats.zips import opened_zip

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return not is_streamed

        def seek(self, *_: Any) -> int:
            raise OSError

        def tell(self) -> int:
            raise OSError

    buffer: io.BytesIO = Stream() if is_streamed else io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    path = written(buffer.getvalue(), tmp_path / "z")
    limits = {"max_members": 9, "max_directory_bytes": 1 << 16}
    with opened_zip(path, **limits, refusal=UnsafeZip()) as opened:
        assert {name: opened.read(name) for name in opened.namelist()} == members


def arrays() -> st.SearchStrategy[Any]:
    """Draw uint8 images, or float ones in [0, 1]."""
    return st.one_of(
        hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 4)] * 4)),
        hnp.arrays(
            st.sampled_from([np.float32, np.float64, np.float16]),
            st.tuples(*[st.integers(1, 4)] * 4),
            elements=st.sampled_from([0.0, 0.25, 1.0]),
        ),
    )


@FEW
@given(images=arrays(), is_compressed=st.booleans(), is_fortran=st.booleans())
def test_what_numpy_writes_is_taken_and_loaded_alike(
    tmp_path: Path, images: Any, *, is_compressed: bool, is_fortran: bool
) -> None:
    """Any images that ``np.savez`` writes pass, and gate and worker agree on count and shape."""
    path = tmp_path / "s.npz"
    images = np.asfortranarray(images) if is_fortran else images
    (np.savez_compressed if is_compressed else np.savez)(path, images=images)
    found = inspect_samples(path, Purpose.SAMPLES, max_bytes=1 << 20)
    assert tuple(load_samples(path, Purpose.SAMPLES).images.shape) == (
        found.count,
        *found.image_shape,
    )


def npz_bytes() -> Iterator[bytes]:
    """Return small files, stored and deflated."""
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(
            buffer,
            images=np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
            labels=np.array([0, 1]),
        )
        yield buffer.getvalue()


NPZ = tuple(npz_bytes())
ARRAY = zipfile.ZipFile(io.BytesIO(NPZ[0])).read("images.npy")


def check_against_loader(content: bytes, path: Path) -> bool:
    """Load what the gate takes, if it does, and compare."""
    written(content, path)
    try:
        found = inspect_samples(path, Purpose.SAMPLES, max_bytes=1 << 20)
    except Refused:
        return False
    loaded = load_samples(path, Purpose.SAMPLES)
    assert tuple(loaded.images.shape) == (found.count, *found.image_shape)
    assert found.labels == (None if loaded.labels is None else tuple(loaded.labels.tolist()))
    return True


@settings(FEW, max_examples=300)
@given(content=st.sampled_from(NPZ).flatmap(edits))
def test_changed_npz_is_refused_or_loaded_alike(tmp_path: Path, content: bytes) -> None:
    """A changed file that passes the gate is one that numpy loads to the same shapes and labels."""
    check_against_loader(content, tmp_path / "s.npz")


@settings(FEW, max_examples=400)
@given(array=edits(ARRAY))
def test_changed_array_is_refused_or_loaded_alike(tmp_path: Path, array: bytes) -> None:
    """The same with checksums that match, so that every change reaches the header's readers."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("images.npy", array)
    check_against_loader(buffer.getvalue(), tmp_path / "s.npz")


# samples in safetensors ------------------------------------------------------------------------------

SAMPLES = safetensors.torch.save(
    {
        "images": torch.arange(24).reshape(2, 2, 2, 3).byte(),
        "labels": torch.tensor([0, 1]),
        "z": torch.ones(2).bfloat16(),
    },
    metadata={"a": "b"},
)
BYTES_OF = {
    "U8": 1,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "I8": 1,
    "U16": 2,
    "U64": 8,
    "F8_E5M2": 1,
}


@st.composite
def sample_files(draw: st.DrawFn) -> bytes:
    """Draw a file of zeros whose header has arrays of any types and shapes, one behind the other."""
    others = st.lists(st.sampled_from(["x", "labels", "y", "target", "z"]), unique=True, max_size=3)
    header, position = {}, 0
    for name in ("images", *draw(others)):
        dtype = draw(st.sampled_from(list(BYTES_OF)))
        shape = draw(
            st.sampled_from([[2, 1, 1, 2], [1, 1, 1, 1], [0, 1, 1, 1], [1 << 40, 1 << 40, 0, 1]])
            if name == "images"
            else st.sampled_from([[2], [1], [], [0, 1 << 40], [1 << 40, 1 << 40, 0]])
        )
        end = position + math.prod(shape) * BYTES_OF[dtype]
        header[name] = entry(dtype, shape, position, end)
        position = end
    return safetensors_file(header, bytes(position))


@FEW
@given(
    images=hnp.arrays(
        np.float32, st.tuples(*[st.integers(1, 4)] * 4), elements=st.floats(0, 1, width=32)
    ),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    whole=st.sampled_from([torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16]),
    purpose=st.sampled_from(Purpose),
)
def test_samples_that_torch_saves_are_taken_and_loaded_exactly(
    tmp_path: Path, images: Any, dtype: torch.dtype, whole: torch.dtype, purpose: Purpose
) -> None:
    """``load(save_file(images, labels, target))`` gives every value back, for every purpose."""
    tensors = {
        "images": torch.from_numpy(images).to(dtype),
        "labels": torch.arange(len(images)).to(whole),
        "target": torch.tensor(1).to(whole),
    }
    path = written(safetensors.torch.save(tensors), tmp_path / "s.safetensors")
    found = inspect_samples(path, purpose, max_bytes=1 << 20)
    loaded = load_samples(path, purpose)
    assert (found.count, *found.image_shape) == images.shape
    assert torch.equal(loaded.images, tensors["images"].float())
    assert loaded.labels is not None
    assert found.labels == tuple(loaded.labels.tolist()) == tuple(range(len(images)))
    targets = None if loaded.targets is None else tuple(loaded.targets.tolist())
    assert found.targets == targets == ((1,) * len(images) if purpose == "triggered" else None)


@settings(FEW, max_examples=300)
@given(content=sample_files())
def test_any_header_of_samples_that_is_taken_is_loaded_alike(
    tmp_path: Path, content: bytes
) -> None:
    """Whatever header passes the gate, the library finds the same images and labels behind it."""
    check_against_loader(content, tmp_path / "s.safetensors")


@settings(FEW, max_examples=400)
@given(content=edits(SAMPLES))
def test_changed_safetensors_of_samples_is_refused_or_loaded_alike(
    tmp_path: Path, content: bytes
) -> None:
    """A changed file that passes the gate is one that the library loads to the same samples."""
    check_against_loader(content, tmp_path / "s.safetensors")


def test_oracles_are_not_idle(tmp_path: Path) -> None:
    """The unchanged files pass, so the tests above compare something; a cut one does not."""
    assert passed(written(SAFE, tmp_path / "a")) is not None
    assert passed(written(zip_around(MEMBERS["archive/data.pkl"]), tmp_path / "b")) is not None
    check_against_torch(TORCH, tmp_path / "c")
    for content in (*NPZ, SAMPLES):
        assert check_against_loader(content, tmp_path / "d")
    with pytest.raises(DamagedFile):
        inspect_model(written(TORCH[:-3], tmp_path / "e"))
