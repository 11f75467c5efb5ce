"""The description in a torch zip is read by an allow-list, and never run."""

import pickle
from pathlib import Path

import pytest

from common.errors import DamagedFile, PickledModule, Problem, UnsafePickle, UnsupportedFormat
from common.formats.model import TensorInfo
from common.formats.pickle_walk import MAX_OPCODES, MAX_PLAIN_KEYS, MAX_RANK, walk
from tests import hostile_files as hostile
from tests.hostile_files import (
    GADGETS,
    call,
    mapping,
    named,
    number,
    numbers,
    pickled,
    sequence,
    storage,
    tensor,
    text,
)

SIZES = {"0": 16}


def refused(description: bytes) -> Problem:
    """Return the problem that *description* is refused with."""
    with pytest.raises(Problem) as caught:
        walk(description, storage_bytes=SIZES)
    return caught.value


# What a state dict needs ---------------------------------------------------------------------------


def test_honest_description_is_read() -> None:
    """The smallest state dict gives one tensor."""
    assert walk(hostile.HONEST, storage_bytes=SIZES) == {
        "weight": TensorInfo(shape=(4,), dtype="float32", storage="0", offset=0, stride=(1,))
    }


@pytest.mark.parametrize("protocol", [2, 3])
def test_plain_values_are_read(protocol: int) -> None:
    """Dicts, lists, tuples and plain values come out as they went in."""
    shared = [1, 2]
    value = {
        "none": None,
        "bool": [True, False],
        "int": [0, 255, 65535, -1, 2**31, 2**70, -(2**70)],
        "float": 0.5,
        "text": ["", "ü", "x" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "shared": [shared, shared],
        3: {1.5: "x", None: 1, True: 2},
    }
    assert walk(pickle.dumps(value, protocol), storage_bytes={}) == value


@pytest.mark.parametrize("protocol", [4, 5])
def test_later_protocol_is_refused_with_the_line_that_saves_again(protocol: int) -> None:
    """What torch's loader of weights does not read is refused at the gate, not in the job."""
    problem = refused(pickle.dumps({"x": 1}, protocol))
    assert type(problem) is UnsupportedFormat
    assert 'torch.save(model.state_dict(), "model.pt")' in problem.hint


def test_counter_is_a_dict() -> None:
    """The milestones of a schedule are numbers by numbers; a counter of anything else is damaged."""
    body = call(named("collections", "Counter"), b"}" + number(3) + number(1) + b"s")
    assert walk(pickled(mapping({"milestones": body})), storage_bytes={}) == {"milestones": {3: 1}}
    for argument in (text("text"), number(1 << 40), b")"):
        problem = refused(pickled(call(named("collections", "Counter"), argument)))
        assert type(problem) is DamagedFile


def test_counters_are_no_bomb() -> None:
    """One dict of a few kilobytes cannot be copied a thousand times by naming it."""
    counts = b"}(" + b"".join(number(n) + number(1) for n in range(100)) + b"uq\x00"
    again = call(named("collections", "Counter"), b"h\x00")
    body = b"](" + counts + again * (MAX_PLAIN_KEYS // 100) + b"e"
    assert type(refused(pickled(body))) is UnsupportedFormat


def test_colliding_keys_are_few_or_refused() -> None:
    """Numbers that all fall into one slot of a dict cannot make reading it take hours."""
    collide = [number(n * (2**61 - 1)) + b"N" for n in range(1, MAX_PLAIN_KEYS + 2)]
    few = pickled(b"}(" + b"".join(collide[:100]) + b"u")
    many = pickled(b"}(" + b"".join(collide) + b"u")
    assert len(walk(few, storage_bytes={})) == 100  # type: ignore[arg-type]
    assert isinstance(refused(many), UnsupportedFormat)


def test_metadata_of_a_state_dict_is_allowed() -> None:
    """An ``OrderedDict`` may be given attributes; nothing looks at them."""
    body = call(named("collections", "OrderedDict")) + b"(" + text("w") + tensor((4,), (1,)) + b"u"
    body += mapping({"_metadata": mapping({"version": number(1)})}) + b"b"
    assert list(walk(pickled(body), storage_bytes=SIZES)) == ["w"]  # type: ignore[call-overload]


@pytest.mark.parametrize("protocol", [4, 5])
def test_protocol_that_torch_does_not_load_is_refused(protocol: int) -> None:
    """What ``weights_only`` could not load later is refused at once, with the line that mends it."""
    problem = refused(pickle.dumps({"n": 1}, protocol))
    assert type(problem) is UnsupportedFormat
    assert "pickle_protocol" in problem.hint


# Code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("name", GADGETS)
def test_gadget_is_refused_and_nothing_runs(tmp_path: Path, name: str, *, beside: bool) -> None:
    """Whatever opcode or name leads to code is refused, alone or beside honest tensors."""
    canary = tmp_path / "canary"
    body = GADGETS[name](canary)
    description = pickled(mapping({"weight": tensor((4,), (1,)), "x": body}) if beside else body)
    problem = refused(description)
    assert type(problem) in {UnsafePickle, DamagedFile, UnsupportedFormat}
    assert problem.hint
    assert not canary.exists()


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("os", "system"),
        ("builtins", "getattr"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_rebuild_sparse_tensor"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch.jit", "load"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
        ("pickle", "loads"),
        ("torch", "__builtins__"),
        ("", ""),
    ],
)
def test_unknown_name_is_unsafe(module: str, attribute: str) -> None:
    """A name outside the list is refused even if it is never called."""
    problem = refused(pickled(named(module, attribute)))
    assert type(problem) is UnsafePickle
    assert f"{module}.{attribute}" in problem.detail


def test_module_of_torch_is_called_a_module() -> None:
    """A class of ``torch.nn`` is a pickled module, and its owner is told how to export."""
    problem = refused(pickled(named("torch.nn.modules.linear", "Linear") + b")\x81}b"))
    assert type(problem) is PickledModule
    assert "state_dict()" in problem.hint


# Tensors that lie ----------------------------------------------------------------------------------

LIES: dict[str, tuple[bytes, type[Problem]]] = {
    "one element too many": (tensor((5,), (1,)), DamagedFile),
    "an offset past the end": (tensor((4,), (1,), offset=1), DamagedFile),
    "a stride past the end": (tensor((4,), (2,)), DamagedFile),
    "a scalar past the end": (tensor((), (), offset=4), DamagedFile),
    "stride 0": (tensor((1 << 30,), (0,)), DamagedFile),
    "stride 0 in one of two": (tensor((1 << 20, 4), (0, 1)), DamagedFile),
    "overlapping windows": (tensor((3, 3), (0, 1)), DamagedFile),
    "a huge shape": (tensor((1 << 62,), (1,)), DamagedFile),
    "a huge product": (tensor((1 << 40,) * 8, (1,) * 8), DamagedFile),
    "a huge product of strides 0": (tensor((1 << 40,) * 8, (0,) * 8), DamagedFile),
    "a huge side of an empty tensor": (tensor((0, 1 << 70), (1, 1)), DamagedFile),
    "a negative shape": (tensor((-4,), (1,)), DamagedFile),
    "two negative sides": (tensor((-2, -2), (1, 1)), DamagedFile),
    "a negative stride": (tensor((4,), (-1,)), DamagedFile),
    "a negative offset": (tensor((4,), (1,), offset=-1), DamagedFile),
    "fewer strides than sides": (tensor((2, 2), (1,)), UnsupportedFormat),
    "too many sides": (tensor((1,) * (MAX_RANK + 1), (1,) * (MAX_RANK + 1)), UnsupportedFormat),
    "a storage said to be longer": (tensor((5,), (1,), of=storage(5)), DamagedFile),
    "a storage said to be shorter": (tensor((3,), (1,), of=storage(3)), DamagedFile),
    "a storage of negative length": (tensor((0,), (1,), of=storage(-4)), DamagedFile),
    "a storage of another type": (tensor((4,), (1,), of=storage(4, kind="DoubleStorage")),
                                  DamagedFile),
    "a storage of an unknown type": (tensor((4,), (1,), of=storage(4, kind="QInt8Storage")),
                                     UnsafePickle),
    "a storage that is not there": (tensor((4,), (1,), of=storage(4, key="7")), DamagedFile),
    "a storage by a path": (tensor((4,), (1,), of=storage(4, key="../data.pkl")), DamagedFile),
    "no storage": (tensor((4,), (1,), of=b"N"), DamagedFile),
    "a number for a storage": (tensor((4,), (1,), of=number(0)), DamagedFile),
    "a persistent id that is no tuple": (tensor((4,), (1,), of=text("storage") + b"Q"),
                                         DamagedFile),
    "a persistent id of another kind": (
        sequence(text("module"), named("torch", "FloatStorage"), text("0"), text("cpu"), number(4))
        + b"Q", DamagedFile),
    "a persistent id with a list for a key": (
        sequence(text("storage"), named("torch", "FloatStorage"), b"]", text("cpu"), number(4))
        + b"Q", DamagedFile),
    "a length that is a bool": (
        sequence(text("storage"), named("torch", "FloatStorage"), text("0"), text("cpu"), b"\x88")
        + b"Q", DamagedFile),
    "a shape that is a string": (call(named("torch._utils", "_rebuild_tensor_v2"), storage(4),
                                      number(0), text("44"), numbers((1, 1))), DamagedFile),
    "a shape with a float": (call(named("torch._utils", "_rebuild_tensor_v2"), storage(4),
                                  number(0), sequence(b"G" + bytes(8)), numbers((1,))),
                             DamagedFile),
    "too few arguments": (call(named("torch._utils", "_rebuild_tensor_v2"), storage(4)),
                          DamagedFile),
    "a parameter of no tensor": (call(named("torch._utils", "_rebuild_parameter"), number(1)),
                                 DamagedFile),
    "an ordered dict with arguments": (call(named("collections", "OrderedDict"), b"]"),
                                       DamagedFile),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_tensor_that_lies_is_refused(lie: str) -> None:
    """No tensor reaches outside its storage, and no number is taken on trust."""
    body, problem = LIES[lie]
    assert type(refused(pickled(mapping({"weight": body})))) is problem


# A machine that is misused -------------------------------------------------------------------------

MISUSE: dict[str, bytes] = {
    "nothing": b"",
    "only an end": b".",
    "two values at the end": b"\x80\x02}}.",
    "a mark at the end": b"\x80\x02(.",
    "no end": b"\x80\x02}",
    "an end in the middle": b"\x80\x02}.}.",
    "a tuple of nothing": pickled(b"\x86"),
    "a tuple without a mark": pickled(b"t"),
    "a mark in a tuple": pickled(b"(\x85"),
    "a mark in the memo": pickled(b"(q\x00}h\x00"),
    "a memo of nothing": pickled(b"q\x00"),
    "a memo that was never written": pickled(b"h\x07"),
    "a long memo that was never written": pickled(b"j\xff\xff\xff\xff"),
    "an item for a list": pickled(b"]" + text("k") + b"Ns"),
    "an element for a dict": pickled(b"}Na"),
    "elements for a tuple": pickled(b")(Ne"),
    "a key without a value": pickled(b"}(" + text("k") + b"u"),
    "a list as a key": pickled(b"}]Ns"),
    "a dict as a key": pickled(b"}}Ns"),
    "a tuple as a key": pickled(b"})Ns"),
    "a call of nothing": pickled(b"R"),
    "an id of nothing": pickled(b"Q"),
    "an id of a mark": pickled(b"(Q"),
    "attributes of nothing": pickled(b"Nb"),
    "a string that ends early": b"\x80\x02X\xff\x00\x00\x00abc",
    "a string that is not UTF-8": pickled(b"X\x01\x00\x00\x00\xff"),
    "a number that ends early": b"\x80\x02J\x01",
    "an unknown opcode": pickled(b"\xfe"),
    "a name that ends early": b"\x80\x02ctorch",
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misused_machine_refuses(misuse: str) -> None:
    """A pickle that no pickler writes is damaged, and nothing but a refusal comes out."""
    assert type(refused(MISUSE[misuse])) is DamagedFile


@pytest.mark.parametrize(
    "opcode", [b"0", b"1", b"2", b"I1\n", b"S'x'\n", b"\x8f", b"\x8b" + bytes(4)]
)
def test_opcode_that_no_state_dict_needs_is_refused(opcode: bytes) -> None:
    """The machine knows the few opcodes that torch writes, and no others."""
    assert type(refused(pickled(b"}N" + opcode))) is UnsafePickle


@pytest.mark.parametrize("depth", [24, 60, 200])
def test_billion_laughs_are_refused(depth: int) -> None:
    """A value that doubles with every level is never walked, printed or let through."""
    assert type(refused(hostile.pickle_of_doubling_lists(depth))) is UnsupportedFormat


@pytest.mark.parametrize("nest", [b"]", b"(", b"\x85"])
def test_deep_nesting_is_no_crash(nest: bytes) -> None:
    """Ten thousand levels end in a refusal, not in a crash of the interpreter."""
    body = b"N" + nest * 10_000 if nest == b"\x85" else nest * 10_000
    end = b"" if nest == b"\x85" else b"a" * 9_999
    with pytest.raises(Problem):
        walk(pickled(body + end), storage_bytes={})


def test_long_pickle_is_refused() -> None:
    """More opcodes than any description needs are refused, not obeyed."""
    assert type(refused(pickled(b"]" + b"Na" * (MAX_OPCODES // 2)))) is UnsupportedFormat


@pytest.mark.parametrize(
    "body",
    [
        b"}q\x00" + text("self") + b"h\x00s",
        b"]q\x00h\x00a",
        b"]q\x00(h\x00tq\x01a",
        call(named("collections", "OrderedDict")) + b"q\x00}" + text("_metadata") + b"h\x00sb",
    ],
    ids=["dict", "list", "list in a tuple", "metadata"],
)
def test_value_that_holds_itself_is_refused(body: bytes) -> None:
    """Whoever walks such a value later would never end."""
    assert type(refused(pickled(body))) is UnsupportedFormat


def test_what_is_shared_often_is_walked_once() -> None:
    """A wide list that is held a great many times is refused for its size, at the cost of one walk."""
    wide = b"(" + b"]" * 20_000 + b"tq\x00"
    often = b"](" + b"h\x00" * 20_000 + b"e"
    assert type(refused(pickled(wide + often + b"\x86"))) is UnsupportedFormat


def test_storage_of_two_types_is_refused() -> None:
    """Torch keeps the first type of a storage, so a second one would be read as another's numbers."""
    floats = tensor((4,), (1,))
    whole = tensor((4,), (1,), of=storage(4, kind="IntStorage"))
    assert type(refused(pickled(mapping({"a": floats, "b": whole})))) is DamagedFile


@pytest.mark.parametrize("name", ["items", "keys", "__class__", "_metadata2"])
def test_attribute_that_shadows_a_method_is_refused(name: str) -> None:
    """A state dict whose ``items`` is a text would break whoever calls it."""
    body = call(named("collections", "OrderedDict")) + mapping({name: text("x")}) + b"b"
    assert type(refused(pickled(body))) is UnsafePickle
