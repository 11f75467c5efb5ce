"""
Read the pickle inside a torch zip without running it.

``pickletools`` splits the bytes into opcodes; the machine below knows the few that a state dict needs and
a few callables by name, none of which it calls: each only makes a description. Everything else is
refused. What it takes is a part of what torch's ``weights_only`` loader takes, with the same result, so
that a file which passes here does not fail there. Source: the pickle opcodes as documented in
``pickletools``; the persistent ids and rebuild functions of ``torch.serialization`` and ``torch._utils``.
"""

import pickletools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import DamagedFile, PickledModule, Problem, UnsafePickle, UnsupportedFormat
from common.formats.model import ITEM_BYTES, TensorInfo, contiguous_stride
from common.formats.nesting import AttributedDict, check_nesting

MAX_OPCODES = 1_000_000
"""Opcodes in the description: about thirty per tensor."""

MAX_STACK = 200_000
"""Values that wait for their container; a pickler hands them over a thousand at a time."""

MAX_MEMO = 350_000
"""Values that are remembered to be used again: about ten per tensor."""

MAX_OBJECTS = 300_000
"""Containers and calls: about six per tensor, each of some hundred bytes here."""

MAX_TEXT = 1 << 20
"""Characters of one text; some scripts leave their configuration or their source in a checkpoint."""

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


_MARK = object()
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"})
_MAKERS = frozenset(
    {
        "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "GLOBAL",
        "BINPERSID", "REDUCE",
    }
)  # fmt: skip
"""What makes an object, whose size does not show in the file's."""

_NEWER = frozenset(
    {
        "FRAME", "MEMOIZE", "STACK_GLOBAL", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES",
        "BINBYTES", "BINBYTES8",
    }
)  # fmt: skip
"""What protocols 3 to 5 write, and torch's ``weights_only`` loader does not know."""

_PROTOCOL = 3
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:[0-9]{1,2})?")
_LOCATION = re.compile(r"[a-z]{1,16}(:[0-9]{1,3})?")


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
        self._objects = 0
        self._dtypes: dict[str, str] = {}  # of each storage

    def run(self, pickled: bytes) -> object:
        stack = self._stack
        for count, (opcode, argument, position) in enumerate(pickletools.genops(pickled)):
            if count > MAX_OPCODES:
                raise UnsupportedFormat("The description of the tensors is implausibly long.")
            name = opcode.name
            if name == "GLOBAL" and position is not None:
                _require_plain(pickled, position)
            if name == "STOP":
                (value,) = self._pop(1)
                if position is None or position + 1 != len(pickled) or stack:
                    raise ValueError("bytes after the end, or values left over")
                check_nesting(value)
                return value
            self._objects += name in _MAKERS
            if len(stack) > MAX_STACK or self._objects > MAX_OBJECTS:
                raise UnsupportedFormat("The description of the tensors is implausibly large.")
            if name in _LITERALS:
                if isinstance(argument, str) and len(argument) > MAX_TEXT:
                    raise UnsupportedFormat(f"A text has more than {MAX_TEXT} characters.")
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name])
            else:
                self._step(name, argument)
        raise ValueError("the pickle has no end")

    def _step(self, name: str, argument: Any) -> None:  # noqa: C901, PLR0912 - one case per opcode
        stack = self._stack
        match name:
            case "PROTO" if argument <= _PROTOCOL:
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
                if len(self._memo) > MAX_MEMO:
                    raise UnsupportedFormat("The description of the tensors remembers too much.")
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
            case "BINPERSID":
                (persistent_id,) = self._pop(1)
                stack.append(self._storage(persistent_id))
            case "REDUCE":
                stack.append(self._reduce(*self._pop(2)))
            case "BUILD":
                (attributes,) = self._pop(1)
                _set_attributes(self._top(), attributes)
            case _ if name in _NEWER or name == "PROTO":
                raise UnsupportedFormat(
                    "The description of the tensors is in a pickle protocol that torch's safe loader "
                    "does not read.",
                    hint="Save it again without pickle_protocol, where the model was built: "
                    'torch.save(model.state_dict(), "model.pt")',
                )
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
        if not isinstance(persistent_id, tuple):
            raise TypeError("not a storage")
        kind, storage_type, key, location, elements = persistent_id
        if not isinstance(storage_type, _Global) or any(
            type(text) is not str for text in (kind, key, location)
        ):
            raise ValueError("not a storage")
        dtype = _STORAGE_DTYPES[storage_type.name.removeprefix("torch ")]
        if kind != "storage" or not _LOCATION.fullmatch(location):
            raise ValueError("not a storage")
        if type(elements) is not int or self._storage_bytes[key] != elements * ITEM_BYTES[dtype]:
            raise DamagedFile(f"Storage {key!r} is not as long as it is said to be.")
        # torch keeps the type under which it met a storage first, whatever is said later.
        if self._dtypes.setdefault(key, dtype) != dtype:
            raise DamagedFile(f"Storage {key!r} is said to be of two types.")
        return _Storage(key, dtype, elements)


def _require_plain(pickled: bytes, position: int) -> None:
    """Refuse escapes in a name: ``pickletools`` undoes them, and no unpickler does."""
    end = pickled.index(b"\n", pickled.index(b"\n", position) + 1)
    if b"\\" in pickled[position:end]:
        raise UnsafePickle("The pickle names something with escapes.")


def _global(name: str) -> _Global | _Opaque:
    module, _, attribute = name.partition(" ")
    if name in _CALLS or (module == "torch" and attribute in _STORAGE_DTYPES):
        return _Global(name)
    if module == "torch" and attribute in ITEM_BYTES:  # a dtype, such as torch.float32
        return _Opaque(name)
    raise UnsafePickle(
        f"The pickle names {module[:200]}.{attribute[:200]}, which no state dict needs."
    )


def _set_attributes(target: Any, attributes: Any) -> None:
    """
    Give an ``OrderedDict`` the one attribute that torch gives it.

    Any other name would be looked up before the dict's own methods, by whoever calls them later.
    """
    if not isinstance(target, AttributedDict):
        raise UnsafePickle("The pickle sets attributes of an object.")
    if not isinstance(attributes, dict) or list(attributes) != ["_metadata"]:
        raise UnsafePickle("The pickle sets attributes of a dict that torch never sets.")
    target.metadata = attributes["_metadata"]


def _call(function: Any, arguments: Any) -> Any:  # noqa: PLR0911 - one case per callable
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise UnsafePickle("The pickle calls something that is not a known function.")
    match function.name, arguments:
        case "collections OrderedDict", ():
            return AttributedDict()
        case "collections Counter", (dict() as counts,):
            return counts
        case "torch._utils _rebuild_tensor_v2", (storage, offset, shape, stride, bool(), hooks):
            _require_none(hooks)
            return _tensor(storage, offset, shape, stride)
        case "torch._utils _rebuild_parameter", (TensorInfo() as tensor, bool(), hooks):
            _require_none(hooks)
            return tensor
        case "torch Size", (tuple() as sides,) if all(type(n) is int for n in sides):
            return _Opaque(function.name)
        case "torch device", (str() as device,) if _DEVICE.fullmatch(device):
            return _Opaque(function.name)
        case "torch device", (str() as device, int() as index) if (
            _DEVICE.fullmatch(device) and ":" not in device and 0 <= index < 100
        ):
            return _Opaque(function.name)
        case _:
            raise ValueError(f"wrong arguments for {function.name}")


def _require_none(hooks: Any) -> None:
    if not isinstance(hooks, AttributedDict) or hooks:
        raise UnsafePickle("The pickle hangs hooks on a tensor.")


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
