"""
Tell what a model file holds: its format, its state dict's keys, shapes and types.

    inspect_model(path) -> ModelFile          the structure alone, nothing allocated by declared size
    check_finite(path, model) -> None         every weight, streamed

Only keys and numbers are read here; no tensor is built and no code in the file runs. Whatever a parser
throws at hostile bytes leaves this package as a ``common.errors.Refused`` with its cause.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from common.errors import EmptyFile, NoStateDict, PickledModule, UnsupportedFormat, WeightsNotFinite

WRAPPERS = ("state_dict", "net", "model", "model_state_dict")
"""The keys under which training scripts put a state dict, in the order in which they are tried."""

PREFIX = "module."
"""What ``nn.DataParallel`` puts before every key."""

MAX_NAME_LENGTH = 512
"""Characters of a tensor's name."""


class ModelFormat(StrEnum):
    """How a model file is packed."""

    TORCH = "pt"  # torch.save's zip
    SAFETENSORS = "safetensors"


ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""The element types that a state dict may hold, with their size."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """
    A tensor's description.

    ``storage`` names the bytes it lies in, ``offset`` and ``stride`` count elements.
    """

    shape: tuple[int, ...]
    dtype: str
    storage: str
    offset: int
    stride: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """The first element in the storage, and the one after the last."""
        if 0 in self.shape:
            return self.offset, self.offset
        last = sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return self.offset, self.offset + last + 1

    def covers(self, indices: npt.NDArray[np.int64]) -> bool:
        """Return whether one of the storage's *indices*, in rising order, belongs to this tensor."""
        first, end = np.searchsorted(indices, self.extent)
        rest = indices[first:end] - self.offset
        if not rest.size or self.stride == contiguous_stride(self.shape):
            return bool(rest.size)
        sides = sorted((step, n) for n, step in zip(self.shape, self.stride, strict=True) if n > 1)
        reach = 0
        for step, n in sides:
            if step <= reach:  # interleaved: no layout that torch makes, so no gap is looked for
                return True
            reach += (n - 1) * step
        # No side reaches into the next larger one, so an index has one way at most to be a sum.
        for step, n in reversed(sides):
            rest = rest - step * np.minimum(rest // step, n - 1)
        return bool((rest == 0).any())


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A model file's structure; ``wrapper`` and ``prefix`` say where the state dict lies in it."""

    format: ModelFormat
    wrapper: str | None
    prefix: str
    tensors: Mapping[str, TensorInfo]  # by the state dict's own keys, without the prefix

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {key: tensor.shape for key, tensor in self.tensors.items()}


def inspect_model(path: Path) -> ModelFile:
    """
    Read the structure of a model file.

    Raises:
        Refused: It is no state dict that this service takes; the class says why.
    """
    from common.formats import safetensors, torch_zip  # noqa: PLC0415 - they use this module's types

    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise EmptyFile("The model file is empty.")
    if head.startswith(b"PK\x03\x04"):
        return torch_zip.inspect(path)
    if safetensors.looks_like(head):
        return safetensors.inspect(path)
    raise _foreign(head)


def check_finite(path: Path, model: ModelFile) -> None:
    """
    Read every weight once.

    Raises:
        WeightsNotFinite: One is NaN or infinite.
        DamagedFile: The bytes do not match their checksum.
    """
    from common.formats import safetensors, torch_zip  # noqa: PLC0415 - they use this module's types

    match model.format:
        case ModelFormat.TORCH:
            storages = torch_zip.storages(path)
        case ModelFormat.SAFETENSORS:
            storages = safetensors.storages(path)
    lying_in: dict[str, dict[str, TensorInfo]] = {}
    for key, tensor in model.tensors.items():
        lying_in.setdefault(tensor.storage, {})[key] = tensor
    for name, chunks in storages:
        _check_storage(lying_in.get(name, {}), chunks)


def find_state_dict(root: object) -> tuple[str | None, str, dict[str, TensorInfo]]:
    """
    Return wrapper, prefix and tensors of the state dict in what a file holds at its top.

    Raises:
        NoStateDict: There is none.
    """
    if not isinstance(root, dict):
        raise NoStateDict("The file holds something other than a dict.")
    for wrapper in (*WRAPPERS, None):
        found = root if wrapper is None else root.get(wrapper)
        if not isinstance(found, dict):
            continue
        tensors = {key: value for key, value in found.items() if isinstance(value, TensorInfo)}
        if tensors and all(isinstance(key, str) for key in tensors):
            check_names(tensors)
            prefix = PREFIX if all(key.startswith(PREFIX) for key in tensors) else ""
            return wrapper, prefix, {key.removeprefix(prefix): t for key, t in tensors.items()}
    raise NoStateDict("The file holds no dict of named tensors.")


def check_names(names: Iterable[str]) -> None:
    """
    Check the names of tensors.

    Raises:
        UnsupportedFormat: One could not be shown, logged or stored as it is.
    """
    for name in names:
        if len(name) > MAX_NAME_LENGTH or not name.isprintable():
            raise UnsupportedFormat(
                f"A tensor is named {name[:80]!a}, which is not printable or too long.",
                hint="Rename it where the model was built, to letters, digits and dots, and save again.",
            )


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stride of a dense tensor in row order."""
    stride: list[int] = []
    step = 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


def _foreign(head: bytes) -> UnsupportedFormat | PickledModule:
    if head.startswith(b"\x80"):
        return PickledModule(
            "The file is a bare pickle, or of torch's legacy format from before 1.6."
        )
    if head.startswith(b"\x1f\x8b"):
        return UnsupportedFormat("The file is compressed with gzip.")
    if head.startswith(b"\x89HDF"):
        return UnsupportedFormat("The file is HDF5, as Keras writes it.")
    return UnsupportedFormat("The file is neither torch's zip format nor safetensors.")


def _check_storage(tensors: Mapping[str, TensorInfo], chunks: Iterable[tuple[int, bytes]]) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    for position, chunk in chunks:
        for dtype in dtypes:
            bad = _not_finite(chunk, dtype)
            if not bad.size:
                continue
            indices = bad + position // ITEM_BYTES[dtype]
            for key, tensor in tensors.items():
                if tensor.dtype == dtype and tensor.covers(indices):
                    raise WeightsNotFinite(f"{key!r} holds a value that is NaN or infinite.")


def _not_finite(chunk: bytes, dtype: str) -> npt.NDArray[np.int64]:
    """Return the elements of *chunk* that are NaN or infinite."""
    usable = chunk[: len(chunk) - len(chunk) % ITEM_BYTES[dtype]]
    if dtype == "bfloat16":  # numpy has no such type; all exponent bits set means not finite
        return np.flatnonzero((np.frombuffer(usable, "<u2") & 0x7F80) == 0x7F80)
    if not dtype.startswith("float"):
        return np.empty(0, np.int64)
    finite = np.isfinite(np.frombuffer(usable, np.dtype(dtype).newbyteorder("<")))
    return np.empty(0, np.int64) if finite.all() else np.flatnonzero(~finite)


def read_chunks(read: Iterator[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield each chunk of a stream behind the position of its first byte."""
    position = 0
    for chunk in read:
        yield position, chunk
        position += len(chunk)
