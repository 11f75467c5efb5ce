"""
Read the pickle inside a torch zip without running it.

``pickletools`` splits the bytes into opcodes; the machine below knows the few that a state dict needs and
a few callables by name, none of which it calls: each only makes a description. Everything else is
refused. Source: the pickle opcodes as documented in ``pickletools``; the persistent ids and rebuild
functions of ``torch.serialization`` and ``torch._utils``.
"""

import pickletools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import DamagedFile, PickledModule, Problem, UnsafePickle, UnsupportedFormat
from common.formats.model import ITEM_BYTES, TensorInfo, contiguous_stride

MAX_OPCODES = 2_000_000
"""Opcodes in the description: about thirty per tensor."""

MAX_PLAIN_KEYS = 10_000
"""Dict keys that are not text, such as the numbers of an optimiser's parameters: unlike text, numbers
can be chosen to collide in a dict, which then takes quadratic time."""

MAX_RANK = 8
"""Dimensions of a tensor; a convolution over volumes has five."""

MAX_ELEMENTS = 1 << 40
"""Elements of a tensor, so that products of shapes stay small numbers."""

_STORAGE_DTYPES: Mapping[str, str] = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_PLAIN_CALLS = frozenset({"torch Size", "torch device"})
_CALLS = _PLAIN_CALLS | {
    "collections Counter",  # the milestones of a learning rate schedule
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
}


@dataclass(frozen=True)
class _Global:
    """A callable that the pickle names."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The bytes of a tensor."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class _Opaque:
    """A value that is allowed, and that nothing here looks into."""

    name: str


class _NamedDict(dict[Any, Any]):
    """An ``OrderedDict``, which may be given attributes such as ``_metadata``."""


_MARK = object()
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset(
    {
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
        "SHORT_BINBYTES", "BINBYTES",
    }
)  # fmt: skip
_LATER_OPCODES = frozenset(
    {"FRAME", "MEMOIZE", "STACK_GLOBAL", "SHORT_BINUNICODE", "SHORT_BINBYTES", "BINBYTES"}
)
"""What protocols 3 to 5 have and ``torch.load(weights_only=True)`` does not read. They are followed to
the end all the same, so that code is called code; only then is the file refused."""


def walk(pickled: bytes, *, storage_bytes: Mapping[str, int]) -> object:
    """
    Return what a ``data.pkl`` describes, with ``TensorInfo`` in place of tensors.

    Args:
        pickled: The member's bytes.
        storage_bytes: The size of each storage in the zip, by key.

    Raises:
        PickledModule: It describes a module, not a state dict.
        UnsafePickle: It names other code.
        UnsupportedFormat: It is in a protocol that torch's loader does not read, or too long.
        DamagedFile: It is no pickle, or does not match its storages.
    """
    try:
        return _Machine(storage_bytes).run(pickled)
    except UnsafePickle as exc:
        if _names_a_module(pickled):
            raise PickledModule from exc
        raise
    except Problem:
        raise
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DamagedFile("The description of the tensors (data.pkl) is damaged.") from exc


def _names_a_module(pickled: bytes) -> bool:
    """Return whether the pickle names a class of ``torch.nn``, as every pickled module does."""
    return b"torch.nn.modules" in pickled


class _Machine:
    """The pickle machine, for descriptions only."""

    def __init__(self, storage_bytes: Mapping[str, int]) -> None:
        self._storage_bytes = storage_bytes
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._plain_keys = 0

    def run(self, pickled: bytes) -> object:
        stack = self._stack
        later = None
        for count, (opcode, argument, position) in enumerate(pickletools.genops(pickled)):
            if count > MAX_OPCODES:
                raise UnsupportedFormat("The description of the tensors is implausibly long.")
            name = opcode.name
            if name in _LATER_OPCODES:
                later = name
            if name == "STOP":
                (value,) = self._pop(1)
                if position is None or position + 1 != len(pickled) or stack:
                    raise ValueError("bytes after the end, or values left over")
                if later is not None:
                    raise _later_protocol(later)
                return value
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            else:
                self._step(name, argument)
        raise ValueError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:  # noqa: C901, PLR0912 - one case per opcode
        stack = self._stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self._pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "APPEND":
                (value,) = self._pop(1)
                self._list().append(value)
            case "APPENDS":
                values = self._pop_to_mark()
                self._list().extend(values)
            case "SETITEM":
                self._set_items(self._pop(2))
            case "SETITEMS":
                self._set_items(self._pop_to_mark())
            case "GLOBAL":
                stack.append(_global(argument))
            case "STACK_GLOBAL":
                module, attribute = self._pop(2)
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise TypeError("not a name")  # nested lists could take for ever to print
                stack.append(_global(f"{module} {attribute}"))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                stack.append(self._reduce(*self._pop(2)))
            case "BUILD":
                self._pop(1)  # attributes such as _metadata, which say nothing of the tensors
                if not isinstance(stack[-1], _NamedDict):
                    raise UnsafePickle("The pickle sets attributes of an object.")
            case _:
                raise UnsafePickle(f"The pickle uses {name}, which no state dict needs.")

    def _reduce(self, function: Any, arguments: Any) -> Any:
        value = _call(function, arguments)
        if isinstance(value, dict):  # a copy, when it is loaded: many of a large one were a bomb
            for key in value:
                self._count_plain_key(key)
        return value

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise ValueError("a mark is no value")
        return self._stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("the stack is empty")
        values = self._stack[-count:]
        del self._stack[-count:]
        if any(value is _MARK for value in values):
            raise ValueError("a mark is no value")
        return values

    def _pop_to_mark(self) -> list[Any]:
        values: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _list(self) -> list[Any]:
        if not isinstance(self._stack[-1], list):
            raise TypeError("not a list")
        return self._stack[-1]

    def _set_items(self, flat: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(flat) % 2:
            raise TypeError("not a dict, or a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str):
                self._count_plain_key(key)
            target[key] = value

    def _count_plain_key(self, key: Any) -> None:
        if not isinstance(key, int | float | None):
            raise TypeError("not a plain key")
        self._plain_keys += 1
        if self._plain_keys > MAX_PLAIN_KEYS:
            raise UnsupportedFormat(f"More than {MAX_PLAIN_KEYS} dict keys are not text.")

    def _storage(self, persistent_id: Any) -> _Storage:
        kind, storage_type, key, _location, elements = persistent_id
        if kind != "storage" or not isinstance(storage_type, _Global) or not isinstance(key, str):
            raise ValueError("not a storage")
        dtype = _STORAGE_DTYPES[storage_type.name.removeprefix("torch ")]
        if type(elements) is not int or self._storage_bytes[key] != elements * ITEM_BYTES[dtype]:
            raise DamagedFile(f"Storage {key!r} is not as long as it is said to be.")
        return _Storage(key, dtype, elements)


def _later_protocol(opcode: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"The pickle uses {opcode}, of a protocol that torch's loader of weights does not read.",
        hint="Save it without pickle_protocol, which makes it 2: "
        'torch.save(model.state_dict(), "model.pt"), run where the model was built.',
    )


def _global(name: str) -> _Global | _Opaque:
    module, _, attribute = name.partition(" ")
    if name in _CALLS or (module == "torch" and attribute in _STORAGE_DTYPES):
        return _Global(name)
    if module == "torch" and attribute in ITEM_BYTES:  # a dtype, such as torch.float32
        return _Opaque(name)
    raise UnsafePickle(f"The pickle names {module}.{attribute}, which no state dict needs.")


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise UnsafePickle("The pickle calls something that is not a known function.")
    match function.name, arguments:
        case "collections OrderedDict", ():
            return _NamedDict()
        case "collections Counter", (dict() as counts,):
            return counts
        case "torch._utils _rebuild_tensor_v2", (storage, offset, shape, stride, *_):
            return _tensor(storage, offset, shape, stride)
        case "torch._utils _rebuild_parameter", (TensorInfo() as tensor, *_):
            return tensor
        case name, _ if name in _PLAIN_CALLS:
            return _Opaque(name)
        case _:
            raise ValueError(f"wrong arguments for {function.name}")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorInfo:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError("not a tensor")
    if len(shape) != len(stride) or len(shape) > MAX_RANK:
        raise UnsupportedFormat(f"A tensor has {len(shape)} dimensions; {MAX_RANK} are allowed.")
    if any(n > MAX_ELEMENTS for n in numbers):
        raise DamagedFile("A tensor is described by an impossible number.")
    elements = 1
    for n in shape:
        elements *= n
    tensor = TensorInfo(
        shape=tuple(shape),
        dtype=storage.dtype,
        storage=storage.key,
        offset=offset,
        stride=tuple(stride),
    )
    # A stride of 0 makes many elements of few bytes: an honest save never writes it, a bomb does.
    expanded = elements > storage.elements and tensor.stride != contiguous_stride(tensor.shape)
    if elements > MAX_ELEMENTS or expanded or tensor.extent[1] > storage.elements:
        raise DamagedFile("A tensor reaches outside its storage.")
    return tensor
