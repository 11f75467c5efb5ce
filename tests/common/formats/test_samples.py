"""A sample file is checked value by value, in bounded memory, and nothing in it is unpickled."""

import io
import random
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import (
    ClassCountMismatch,
    DamagedFile,
    EmptyFile,
    ImagesOutOfRange,
    InvalidImages,
    InvalidLabels,
    InvalidSamples,
    NoSamples,
    Problem,
    Refused,
    TooLarge,
    UnsafeZip,
)
from common.formats.arrays import MAX_ARRAYS
from common.formats.samples import (
    MAX_SIDE,
    Purpose,
    SampleFile,
    check_labels,
    inspect_samples,
)
from tests.hostile_files import (
    npy,
    npy_header,
    npz,
    zip_of_zeros_deflated,
    zip_with_a_huge_directory,
)

MAX_BYTES = 64 << 20
BYTES = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
FLOATS = (BYTES / 255).astype(np.float32).transpose(0, 3, 1, 2)
LABELS = np.array([0, 1, 2, 1])


@pytest.fixture(params=["s.npz", "s.safetensors"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return where to save a sample file of either kind."""
    return tmp_path / str(request.param)


def saved(path: Path, *, compressed: bool = False, **arrays: Any) -> Path:
    """Write an .npz or, if *path* is called so, a .safetensors, as a client would."""
    if path.suffix == ".safetensors":
        rows = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        save_file(
            {name: row.astype(row.dtype.newbyteorder("<")) for name, row in rows.items()}, path
        )
    else:
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def written(content: bytes, tmp_path: Path) -> Path:
    """Write the bytes of an upload."""
    path = tmp_path / "clean.npz"
    path.write_bytes(content)
    return path


def inspect(path: Path, purpose: Purpose = Purpose.SAMPLES) -> SampleFile:
    """Inspect with the limit of these tests."""
    return inspect_samples(path, purpose, max_bytes=MAX_BYTES)


# Honest files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        BYTES,
        FLOATS,
        FLOATS.astype(np.float64),
        FLOATS.astype(np.float16),
        FLOATS.astype(">f4"),
        np.asfortranarray(BYTES),
        np.asfortranarray(FLOATS),
    ],
    ids=["bytes", "float32", "float64", "float16", "big-endian", "fortran bytes", "fortran floats"],
)
def test_images_of_both_layouts_pass(path: Path, images: np.ndarray[Any, Any]) -> None:
    """uint8 NHWC and float NCHW give the same facts."""
    for compressed in (False, True):
        saved(path, compressed=compressed, images=images, labels=LABELS)
        assert inspect(path) == SampleFile(
            count=4, image_shape=(3, 5, 6), labels=(0, 1, 2, 1), targets=None
        )
        assert inspect(path).classes == 3


def test_aliases_and_other_arrays(path: Path) -> None:
    """``x`` and ``y`` mean images and labels; an array nobody asked for is left alone."""
    other = BYTES > 9 if path.suffix == ".safetensors" else np.array(["a", "b"])
    file = inspect(saved(path, x=BYTES, y=LABELS, names=other))
    assert (file.count, file.labels) == (4, (0, 1, 2, 1))


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", "<i4", ">i8", "<u8"])
def test_labels_of_every_whole_type_pass(path: Path, dtype: str) -> None:
    """Labels are whole numbers of any width and byte order."""
    assert inspect(saved(path, images=BYTES, labels=LABELS.astype(dtype))).labels == (
        0, 1, 2, 1,
    )  # fmt: skip


def test_labels_may_be_missing_for_samples_only(path: Path) -> None:
    """Clean samples need no labels; what is measured on does."""
    saved(path, images=BYTES, target=np.array(1))
    file = inspect(path)
    assert (file.labels, file.classes) == (None, None)
    for purpose in (Purpose.EVALUATION, Purpose.TRIGGERED):
        with pytest.raises(InvalidLabels, match="labels"):
            inspect(path, purpose)


@pytest.mark.parametrize("target", [np.array(2), np.full(4, 2), np.int64(2)])
def test_target_is_one_number_or_one_per_image(path: Path, target: np.ndarray[Any, Any]) -> None:
    """A scalar target means all images."""
    saved(path, images=BYTES, labels=LABELS, target=target)
    assert inspect(path, Purpose.TRIGGERED).targets == (2, 2, 2, 2)
    assert inspect(path).targets is None


def test_triggered_without_a_target_is_refused(path: Path) -> None:
    """Without a target there is no attack success rate."""
    with pytest.raises(InvalidLabels, match="target"):
        inspect(saved(path, images=BYTES, labels=LABELS), Purpose.TRIGGERED)


def test_bounds_of_the_range_pass(path: Path) -> None:
    """0 and 1 themselves are in range, and so is a minus zero."""
    images = np.zeros((1, 1, 2, 2), np.float32)
    images[0, 0] = [[0.0, 1.0], [-0.0, 0.5]]
    assert inspect(saved(path, images=images)).count == 1


def test_labels_are_held_against_the_models_classes(path: Path) -> None:
    """The highest label and target must be below the number of classes."""
    saved(path, images=BYTES, labels=LABELS, target=np.array(5))
    file = inspect(path, Purpose.TRIGGERED)
    check_labels(file, Purpose.TRIGGERED, classes=6)
    with pytest.raises(ClassCountMismatch, match="target 5; the model has 5 classes, 0 to 4"):
        check_labels(file, Purpose.TRIGGERED, classes=5)
    with pytest.raises(ClassCountMismatch, match="label 2"):
        check_labels(inspect(path), Purpose.SAMPLES, classes=2)
    check_labels(inspect(saved(path, images=BYTES)), Purpose.SAMPLES, classes=1)


# Wrong content -------------------------------------------------------------------------------------


def _with(value: float) -> np.ndarray[Any, Any]:
    images = FLOATS.copy()
    images[-1, -1, -1, -1] = value
    return images


WRONG: dict[str, tuple[dict[str, Any], type[Problem]]] = {
    "no images": ({"labels": LABELS}, InvalidSamples),
    "images twice": ({"images": BYTES, "x": BYTES}, InvalidSamples),
    "labels twice": ({"images": BYTES, "labels": LABELS, "y": LABELS}, InvalidSamples),
    "too many arrays": ({"images": BYTES, **{f"a{n}": LABELS for n in range(MAX_ARRAYS)}},
                        InvalidSamples),
    "one image without a batch": ({"images": BYTES[0]}, InvalidImages),
    "five dimensions": ({"images": BYTES[None]}, InvalidImages),
    "flat images": ({"images": BYTES.reshape(4, -1)}, InvalidImages),
    "a scalar": ({"images": np.uint8(3)}, InvalidImages),
    "int images": ({"images": BYTES.astype(np.int64)}, InvalidImages),
    "signed bytes": ({"images": BYTES.astype(np.int8)}, InvalidImages),
    "bool images": ({"images": BYTES > 9}, InvalidImages),
    "no image": ({"images": BYTES[:0]}, NoSamples),
    "no float image": ({"images": FLOATS[:0], "labels": LABELS[:0]}, NoSamples),
    "images without height": ({"images": BYTES[:, :0]}, InvalidImages),
    "images without channels": ({"images": BYTES[..., :0]}, InvalidImages),
    "images too wide": ({"images": np.zeros((1, 1, MAX_SIDE + 1, 1), np.uint8)}, InvalidImages),
    "images in 0 to 255": ({"images": FLOATS * 255}, ImagesOutOfRange),
    "normalised images": ({"images": FLOATS - 0.5}, ImagesOutOfRange),
    "a value just above 1": ({"images": _with(np.nextafter(np.float32(1), np.float32(2)))},
                             ImagesOutOfRange),
    "a NaN": ({"images": _with(np.nan)}, ImagesOutOfRange),
    "an infinity": ({"images": _with(np.inf)}, ImagesOutOfRange),
    "float labels": ({"images": BYTES, "labels": LABELS.astype(float)}, InvalidLabels),
    "bool labels": ({"images": BYTES, "labels": LABELS > 0}, InvalidLabels),
    "one-hot labels": ({"images": BYTES, "labels": np.eye(4, dtype=int)}, InvalidLabels),
    "scalar labels": ({"images": BYTES, "labels": np.array(1)}, InvalidLabels),
    "negative labels": ({"images": BYTES, "labels": LABELS - 1}, InvalidLabels),
    "labels above every number of classes": (
        {"images": BYTES, "labels": np.full(4, 1 << 63, np.uint64)}, InvalidLabels),
    "too few labels": ({"images": BYTES, "labels": LABELS[:3]}, InvalidLabels),
    "too many labels": ({"images": BYTES, "labels": np.tile(LABELS, 2)}, InvalidLabels),
}  # fmt: skip


WRONG_IN_NPZ: dict[str, tuple[dict[str, Any], type[Problem]]] = {
    "complex images": ({"images": FLOATS.astype(np.complex64)}, InvalidImages),
    "strings": ({"images": BYTES.astype("S3")}, InvalidImages),
    "dates": ({"images": BYTES.astype("M8[s]")}, InvalidSamples),
    "object images": ({"images": BYTES.astype(object)}, InvalidSamples),
    "object labels": ({"images": BYTES, "labels": LABELS.astype(object)}, InvalidSamples),
    "structured images": ({"images": np.zeros((1, 2, 2, 3), [("r", "u1")])}, InvalidSamples),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_content_is_refused(path: Path, wrong: str) -> None:
    """Each mistake in a sample file is refused by its class, with a hint."""
    arrays, problem = WRONG[wrong]
    with pytest.raises(Problem) as caught:
        inspect(saved(path, **arrays))
    assert type(caught.value) is problem
    assert caught.value.hint


@pytest.mark.parametrize("wrong", WRONG_IN_NPZ)
def test_wrong_type_of_numpy_is_refused(tmp_path: Path, wrong: str) -> None:
    """So is each type that numpy alone can write."""
    arrays, problem = WRONG_IN_NPZ[wrong]
    with pytest.raises(Problem) as caught:
        inspect(saved(tmp_path / "s.npz", **arrays))
    assert type(caught.value) is problem
    assert caught.value.hint


@pytest.mark.parametrize(
    "target", [np.array(-1), np.array(1.5), np.array([1]), np.array([[1, 1, 1, 1]])]
)
def test_wrong_target_is_refused(path: Path, target: np.ndarray[Any, Any]) -> None:
    """A target is a class, or one per image."""
    saved(path, images=BYTES, labels=LABELS, target=target)
    with pytest.raises(InvalidLabels):
        inspect(path, Purpose.TRIGGERED)


# Hostile files -------------------------------------------------------------------------------------

PIXELS = npy(npy_header((4, 1, 1, 3)), bytes(12))


def _npz(images: bytes) -> bytes:
    return npz({"images": images})


HOSTILE: dict[str, tuple[bytes, type[Problem]]] = {
    "empty": (b"", EmptyFile),
    "no zip": (b"\x93NUMPY" + bytes(100), InvalidSamples),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(100), InvalidSamples),
    "a zip's first bytes": (b"PK\x03\x04", DamagedFile),
    "an empty zip": (npz({}), InvalidSamples),
    "one name twice": (npz({"imaged": PIXELS, "images": PIXELS}).replace(b"imaged", b"images"),
                       UnsafeZip),
    "no npy": (_npz(b"hello"), InvalidSamples),
    "an empty member": (_npz(b""), InvalidSamples),
    "a pickle for an array": (_npz(b"\x80\x04cos\nsystem\n."), InvalidSamples),
    "an object header": (_npz(npy(npy_header((4, 1, 1, 3), "|O"), b"\x80\x04.")), InvalidSamples),
    "an object hidden in a subarray": (_npz(npy(npy_header((4, 1, 1, 3), [("f", "|O")]))),
                                       InvalidSamples),
    "a subarray type": (_npz(npy(npy_header((4, 1, 1), ("|u1", (3,))), bytes(12))),
                        InvalidSamples),
    "an array shorter than its shape": (_npz(npy(npy_header((9, 1, 1, 3)), bytes(12))),
                                        DamagedFile),
    "an array longer than its shape": (_npz(npy(npy_header((4, 1, 1, 3)), bytes(13))),
                                       DamagedFile),
    "half a value": (_npz(npy(npy_header((4, 1, 1, 1), "<f4"), bytes(15))), DamagedFile),
    "a huge shape": (_npz(npy(npy_header((1 << 40, 1 << 40, 1 << 40, 1 << 40)), bytes(12))),
                     DamagedFile),
    "a product that wraps around": (_npz(npy(npy_header((1 << 32, 1 << 32, 1, 3)), bytes(12))),
                                    DamagedFile),
    "a negative shape": (_npz(npy(npy_header((-4, 1, 1, -3)), bytes(12))), InvalidSamples),
    "a bool shape": (_npz(npy(npy_header((True, 2, 2, 3)), bytes(12))), InvalidSamples),
    "a float shape": (_npz(npy(npy_header((4.0, 1, 1, 3)), bytes(12))), InvalidSamples),
    "a shape that is a number": (_npz(npy(npy_header(4), bytes(12))), InvalidSamples),
    "a shape of any length": (_npz(npy(npy_header((1,) * 4000), bytes(12))), InvalidSamples),
    "an unknown type": (_npz(npy(npy_header((4, 1, 1, 3), "|z9"), bytes(12))), InvalidSamples),
    "an empty type": (_npz(npy(npy_header((4, 1, 1, 3), ()), bytes(12))), InvalidSamples),
    "a type that is a number": (_npz(npy(npy_header((4, 1, 1, 3), 7), bytes(12))), InvalidSamples),
    "a type of size 0": (_npz(npy(npy_header((4, 1, 1, 3), "|V0"))), InvalidImages),
    "strings of length 0": (_npz(npy(npy_header((1 << 40, 1, 1, 3), "|S0"))), InvalidImages),
    "code in the header": (_npz(npy("__import__('os').system('true')\n")), InvalidSamples),
    "a space that is none to others": (
        _npz(npy(npy_header((4, 1, 1, 3)).replace("}\n", "}\xa0\n"), bytes(12))), InvalidSamples),
    "a number that starts with 0": (
        _npz(npy(npy_header((4, 1, 1, 3)).replace("3", "03"), bytes(12))), InvalidSamples),
    "half a header": (_npz(npy("{'descr': (")), InvalidSamples),
    "an open string in the header": (_npz(npy("{'descr': '''")), InvalidSamples),
    "a deep header": (_npz(npy("(" * 9000 + ")" * 900)), InvalidSamples),
    "a deep valid header": (_npz(npy("-" * 9000 + "1")), InvalidSamples),
    "a long header": (_npz(npy(npy_header((4, 1, 1, 3)) + " " * 20000, bytes(12))),
                      InvalidSamples),
    "a header past the end": (_npz(b"\x93NUMPY\x01\x00\xff\xff{}"), InvalidSamples),
    "an unknown version": (_npz(b"\x93NUMPY\x09\x09" + bytes(40)), InvalidSamples),
    "a missing key": (_npz(npy("{'descr': '|u1', 'shape': (1, 1, 1, 3)}\n", bytes(3))),
                      InvalidSamples),
    "bytes for keys": (_npz(npy("{b'descr': 1, 2: 3}\n")), InvalidSamples),
    "a NUL in the header": (_npz(npy("{'descr\0': 1}\n")), InvalidSamples),
    "compressed with bzip2": (npz({"images": PIXELS}, compression=zipfile.ZIP_BZIP2),
                              InvalidSamples),
    "compressed with lzma": (npz({"images": PIXELS}, compression=zipfile.ZIP_LZMA),
                             InvalidSamples),
    "a huge directory": (zip_with_a_huge_directory(60_000), UnsafeZip),
}  # fmt: skip


@pytest.mark.parametrize("trick", HOSTILE)
def test_hostile_file_is_refused(tmp_path: Path, trick: str) -> None:
    """Each trick is refused by its class, and nothing but a refusal comes out."""
    content, problem = HOSTILE[trick]
    with pytest.raises(Problem) as caught:
        inspect(written(content, tmp_path))
    assert type(caught.value) is problem


def test_truncated_file_is_damaged_wherever_it_ends(tmp_path: Path) -> None:
    """A file that is cut anywhere is damaged."""
    whole = saved(tmp_path / "s.npz", images=BYTES, labels=LABELS).read_bytes()
    for length in [2, 4, 30, *range(60, len(whole), 41), len(whole) - 1]:
        with pytest.raises(DamagedFile):
            inspect(written(whole[:length], tmp_path))


def test_bomb_is_refused_by_its_ratio_alone(tmp_path: Path) -> None:
    """A large file that unpacks to a thousand times its size is refused before it is unpacked."""
    header = npy(npy_header((60 << 10, 32, 32, 1)))
    with pytest.raises(TooLarge, match="times its size"):
        inspect(written(zip_of_zeros_deflated("images.npy", header, 60 << 20), tmp_path))


@pytest.mark.parametrize("name", ["images", "labels"])
def test_flipped_byte_is_damage(tmp_path: Path, name: str) -> None:
    """One flipped bit in an array is found by its checksum."""
    content = bytearray(saved(tmp_path / "s.npz", images=BYTES, labels=LABELS).read_bytes())
    array = {"images": BYTES, "labels": LABELS}[name]
    content[content.index(array.tobytes()) + 2] ^= 1
    with pytest.raises(DamagedFile):
        inspect(written(bytes(content), tmp_path))


def test_declared_size_above_the_limit_is_too_large(tmp_path: Path) -> None:
    """The size that the directory declares is held against the limit before anything is read."""
    path = saved(tmp_path / "s.npz", compressed=True, images=np.zeros((99, 64, 64, 3), np.uint8))
    with pytest.raises(TooLarge):
        inspect_samples(path, Purpose.SAMPLES, max_bytes=1 << 20)
    assert inspect(path).count == 99


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (npy(npy_header((63 << 10, 32, 32, 1))), DamagedFile),  # many images of zeros
        (npy(npy_header((48 << 20, 1, 1, 1))), TooLarge),  # a very great many tiny ones
        (b"\x93NUMPY\x02\x00\x00\x00\x00\x03", InvalidSamples),  # a header of fifty megabytes
    ],
    ids=["images", "tiny images", "header"],
)
def test_deflated_zeros_are_read_in_bounded_memory(
    tmp_path: Path, header: bytes, problem: type[Problem]
) -> None:
    """A file that unpacks to a thousand times its size is never held as a whole."""
    content = zip_of_zeros_deflated("images.npy", header, 60 << 20, noise=8 << 10)
    assert len(content) < 1 << 20
    path = written(content, tmp_path)
    tracemalloc.start()
    with pytest.raises(Problem) as caught:
        inspect(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert type(caught.value) is problem
    assert peak < 16 << 20


def test_noise_never_raises_anything_but_a_refusal(tmp_path: Path) -> None:
    """Flips, cuts and insertions at random end in a ``Refused`` or in an honest reading."""
    random_ = random.Random(22)
    buffers = []
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, images=BYTES[:2, :2, :2], labels=LABELS[:2])
        buffers.append(buffer.getvalue())
    for turn in range(1000):
        content = bytearray(buffers[turn % 2])
        for _ in range(random_.choice([1, 1, 2, 8])):
            place = random_.randrange(len(content))
            match random_.randrange(4):
                case 0 | 1:
                    content[place] = random_.randrange(256)
                case 2:
                    del content[place : place + random_.randrange(1, 20)]
                case 3:
                    content[place:place] = random_.randbytes(random_.randrange(1, 8))
        with suppress(Refused):
            inspect(written(bytes(content), tmp_path))


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:invalid:SyntaxWarning")
def test_noise_in_the_headers_never_raises_anything_but_a_refusal(tmp_path: Path) -> None:
    """The same, with checksums that match, so that the noise reaches numpy's header."""
    random_ = random.Random(23)
    for _ in range(800):
        content = bytearray(PIXELS)
        for _ in range(random_.choice([1, 2, 5])):
            content[random_.randrange(len(content) - 12)] = random_.choice(
                b"'\"(){}[]:,\\\n\0 09OuVSLfM<>|#"
            )
        with suppress(Refused):
            inspect(written(_npz(bytes(content)), tmp_path))
