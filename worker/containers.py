"""
What a loaded model file may hold beside the weights, and how two of them are compared.

The loader builds more than a state dict needs: sparse and quantised tensors, tensors without memory or
with a single element for a million places, dicts whose methods are shadowed, lists that hold each other.
``check`` lets through what training scripts save: dicts, lists and tuples of plain values and of dense
tensors. It asks the classes (``dict.items``), never the objects, which may answer for themselves.
"""

from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UnsupportedFormat
from common.formats.model import ITEM_BYTES
from common.formats.nesting import MAX_DEPTH

MAX_REUSE = 16
"""How many bytes all tensors together may have for each byte that is stored: tied weights and an
average beside the weights share theirs."""

REUSE_ALLOWANCE_BYTES = 64 << 20
"""Bytes that are never too many, so that small files may share as they like."""

DTYPES = frozenset(getattr(torch, name) for name in ITEM_BYTES)
"""The element types that the gate lets through."""

_KEYS = frozenset({str, int, float, bool, type(None)})
_PLAIN = _KEYS | {torch.Size, torch.device, torch.dtype}
_MAPPINGS = frozenset({dict, OrderedDict, Counter})
_SEQUENCES = frozenset({list, tuple})
_TENSORS = frozenset({Tensor, nn.Parameter})
_NO_ATTRIBUTES: dict[str, Any] = {}


def check(root: Any) -> None:
    """
    Check that *root* is made of plain values and dense tensors.

    Raises:
        UnsupportedFormat: It is not; the detail says what there is instead.
    """
    walk = _Walk()
    walk.height(root, 0)
    stored = sum(walk.storages.values())
    if walk.tensor_bytes > MAX_REUSE * stored + REUSE_ALLOWANCE_BYTES:
        raise UnsupportedFormat(
            f"The tensors come to {walk.tensor_bytes} bytes, of which the file holds {stored}."
        )


def check_tensor(tensor: Tensor) -> None:
    """
    Check that *tensor* is a dense one of plain numbers, each in a place of its own.

    Raises:
        UnsupportedFormat: It is not.
    """
    if type(tensor) not in _TENSORS or vars(tensor) or tensor._backward_hooks:
        raise UnsupportedFormat("A tensor is of a class of its own, or has attributes.")
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        raise UnsupportedFormat("A tensor is sparse, nested or quantised.")
    if tensor.dtype not in DTYPES:
        raise UnsupportedFormat(f"A tensor is of the type {str(tensor.dtype)[:40]}.")
    if tensor.device.type != "cpu":
        raise UnsupportedFormat("A tensor has no values.")
    if tensor.is_neg() or tensor.is_conj():
        raise UnsupportedFormat("A tensor is the negative of what is stored.")
    if overlaps(tensor):
        raise UnsupportedFormat(
            "A tensor has several elements in one place.",
            hint="Call .contiguous() on every tensor before saving: "
            'torch.save(model.state_dict(), "model.pt")',
        )


def overlaps(tensor: Tensor) -> bool:
    """
    Return whether two elements may lie in one place, as they do in an expanded tensor.

    An interleaved layout, which no operation of torch makes, counts as overlapping.
    """
    if not tensor.numel():
        return False
    reach = 0
    for step, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n == 1:
            continue
        if step <= reach:
            return True
        reach += (n - 1) * step
    return False


def identical(one: Any, other: Any) -> bool:
    """Return whether two loaded containers hold the same keys, values, dtypes and bits."""
    return _Comparison().holds(one, other)


def bits(tensor: Tensor) -> Tensor:
    """Return the tensor's bytes in row order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


class _Walk:
    """
    A walk over everything in a container.

    What is reached on several ways is looked at once: a list of two lists of two lists … has more ways
    than anybody can walk.
    """

    def __init__(self) -> None:
        self.tensor_bytes = 0
        self.storages: dict[int, int] = {}
        self._heights: dict[int, int | None] = {}  # None while it is being looked at

    def height(self, value: Any, depth: int) -> int:
        """Check *value*, and return how many levels lie below it."""
        kind = type(value)
        if isinstance(value, Tensor):
            self._count(value)
            return 0
        if kind in _PLAIN:
            return 0
        if kind not in _MAPPINGS and kind not in _SEQUENCES:
            raise UnsupportedFormat(f"The file holds a value of the type {kind.__qualname__[:80]}.")
        known = self._heights.get(id(value), -1)
        if known is None:
            raise UnsupportedFormat("The file holds a value that holds itself.")
        if known < 0:
            if depth >= MAX_DEPTH:
                raise UnsupportedFormat(f"The file's values are nested over {MAX_DEPTH} deep.")
            self._heights[id(value)] = None
            parts = self._parts(value)
            known = 1 + max((self.height(part, depth + 1) for part in parts), default=0)
            self._heights[id(value)] = known
        if depth + known > MAX_DEPTH:
            raise UnsupportedFormat(f"The file's values are nested over {MAX_DEPTH} deep.")
        return known

    def _parts(self, value: Any) -> list[Any]:
        if type(value) in _SEQUENCES:
            return list(value)
        if not _KEYS.issuperset(map(type, dict.keys(value))):
            raise UnsupportedFormat("The file holds a dict with a key that is no plain value.")
        attributes = {} if type(value) is dict else vars(value)
        if not attributes.keys() <= {"_metadata"}:
            raise UnsupportedFormat("The file holds a dict with attributes.")
        return [*dict.values(value), *attributes.values()]

    def _count(self, tensor: Tensor) -> None:
        check_tensor(tensor)
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        self.tensor_bytes += tensor.numel() * tensor.element_size()


class _Comparison:
    """A comparison that looks at each pair of containers once; the first difference ends it."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def holds(self, one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            same_form = one.dtype == other.dtype and one.shape == other.shape
            return same_form and torch.equal(bits(one), bits(other))
        if type(one) is not type(other):
            return False
        if isinstance(one, dict | list | tuple):
            # Only what the two roots keep alive is noted: the id of a passing object comes back.
            pair = id(one), id(other)
            if pair in self._seen:
                return True
            self._seen.add(pair)
            return self._parts_hold(one, other)
        # Floats by their bits: a NaN is itself, and 0.0 is not -0.0.
        return one.hex() == other.hex() if isinstance(one, float) else bool(one == other)

    def _parts_hold(self, one: Any, other: Any) -> bool:
        if len(one) != len(other) or not all(map(self.holds, one, other)):  # of dicts, the keys
            return False
        if not isinstance(one, dict):
            return True
        attributes = (getattr(value, "__dict__", _NO_ATTRIBUTES) for value in (one, other))
        return all(map(self.holds, one.values(), other.values())) and self.holds(*attributes)
