"""Pickles that run code, hide code, or cost whoever reads them more than they are worth."""

import base64
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from common.formats.nesting import MAX_DEPTH
from tests.hostile_files import (
    GADGETS,
    Family,
    Field,
    HostileFile,
    call,
    mapping,
    named,
    number,
    pickle_of_doubling_lists,
    pickled,
    sequence,
    tensor,
    text,
    torch_zip,
)

SYSTEM = named("os", "system")
Body = Callable[[Path], bytes]


def touch(canary: Path) -> str:
    """Return the command that leaves a sign."""
    return f"touch {canary}"


def write(canary: Path) -> str:
    """Return the Python that leaves a sign."""
    return f"open({str(canary)!r}, 'w').close()"


def small_bytes(content: bytes) -> bytes:
    """Push bytes."""
    return b"B" + struct.pack("<I", len(content)) + content


# Bodies that leave a sign when a plain unpickler reads them ------------------------------------------


def nested_pickle(canary: Path) -> bytes:
    """Hide the call in a pickle inside the pickle."""
    inner = pickled(call(SYSTEM, text(touch(canary))))
    return call(named("pickle", "loads"), small_bytes(inner))


def twice_nested_pickle(canary: Path) -> bytes:
    """Hide it twice, the inner one in base64."""
    inner = base64.b64encode(pickled(nested_pickle(canary)))
    return call(named("pickle", "loads"), call(named("base64", "b64decode"), small_bytes(inner)))


def extension_code(opcode: bytes, code: int, width: str, name: str) -> Body:
    """Register an extension code for *name* in the pickle itself, then push it by that code."""

    def build(canary: Path) -> bytes:
        register = call(
            named("copyreg", "add_extension"), *map(text, name.split(".")), number(code)
        )
        pushed = opcode + struct.pack(width, code)
        return sequence(register, pushed + sequence(text(touch(canary))) + b"R")

    return build


def setstate_by_build(canary: Path) -> bytes:
    """Give an object ``__setstate__`` by one BUILD and have the next one call it."""
    made = named("argparse", "Namespace") + b")\x81"
    armed = made + mapping({"__setstate__": SYSTEM}) + b"b"
    return armed + text(touch(canary)) + b"b"


def bytes_of_a_map(canary: Path) -> bytes:
    """Run a map by making bytes of it, with NEWOBJ alone and no REDUCE."""
    mapped = named("builtins", "map") + sequence(SYSTEM, sequence(text(touch(canary)))) + b"\x81"
    return named("builtins", "bytes") + sequence(mapped) + b"\x81"


def bytes_of_a_map_by_newobj_ex(canary: Path) -> bytes:
    """Do the same with NEWOBJ_EX."""
    mapped = named("builtins", "map") + sequence(SYSTEM, sequence(text(touch(canary)))) + b"}\x92"
    return named("builtins", "bytes") + sequence(mapped) + b"}\x92"


def memo_swapped(canary: Path) -> bytes:
    """Put a harmless name into the memo, overwrite it, and call what lies there then."""
    harmless = named("collections", "OrderedDict") + b"q\x63"
    return harmless + b"0" + SYSTEM + b"q\x63" + b"0h\x63" + sequence(text(touch(canary))) + b"R"


def memo_far_away(canary: Path) -> bytes:
    """Use a place of the memo that nothing leads to."""
    place = struct.pack("<I", 1_000_000)
    return SYSTEM + b"r" + place + b"0j" + place + sequence(text(touch(canary))) + b"R"


def text_memo(canary: Path) -> bytes:
    """Use the memo by the opcodes of protocol 0."""
    return SYSTEM + b"p7\n0g7\n" + sequence(text(touch(canary))) + b"R"


def popped_result(canary: Path) -> bytes:
    """Call, and throw the result away, so that nothing of it is left in the value."""
    return call(SYSTEM, text(touch(canary))) + b"0N"


def popped_to_mark(canary: Path) -> bytes:
    """Do the same with POP_MARK."""
    return b"(" + call(SYSTEM, text(touch(canary))) + b"1N"


def duplicated(canary: Path) -> bytes:
    """Call what DUP has copied."""
    return SYSTEM + b"2" + sequence(text(touch(canary))) + b"R\x86"


def key_of_a_dict(canary: Path) -> bytes:
    """Call where a dict's key is expected."""
    return b"}" + call(SYSTEM, text(touch(canary))) + b"Ns"


def member_of_a_set(canary: Path) -> bytes:
    """Call inside a set."""
    return b"\x8f(" + call(SYSTEM, text(touch(canary))) + b"\x90"


def member_of_a_frozenset(canary: Path) -> bytes:
    """Call inside a frozenset."""
    return b"(" + call(SYSTEM, text(touch(canary))) + b"\x91"


def storage_type(canary: Path) -> bytes:
    """Call where a storage names its type."""
    parts = (text("storage"), call(SYSTEM, text(touch(canary))), text("0"), text("cpu"), number(4))
    return sequence(*parts) + b"Q"


def hooks_of_a_tensor(canary: Path) -> bytes:
    """Call inside a tensor's arguments, where its hooks belong."""
    honest = tensor((4,), (1,))
    hooks = call(named("collections", "OrderedDict"))
    return honest.replace(hooks, call(SYSTEM, text(touch(canary))))


def metadata_of_a_state_dict(canary: Path) -> bytes:
    """Call inside the attributes that a state dict may have."""
    attributes = mapping({"_metadata": call(SYSTEM, text(touch(canary)))})
    return call(named("collections", "OrderedDict")) + attributes + b"b"


def protocol_4(canary: Path) -> bytes:
    """Write as protocol 4 does: a frame, short texts, STACK_GLOBAL, MEMOIZE."""
    command = touch(canary).encode()
    short = b"\x8c\x02os\x94\x8c\x06system\x94\x93\x94"
    return short + b"X" + struct.pack("<I", len(command)) + command + b"\x94\x85\x94R\x94"


def text_opcodes(canary: Path) -> bytes:
    """Write as protocol 0 does, in text alone."""
    return b"cos\nsystem\n(S'" + touch(canary).encode() + b"'\ntR"


def short_binstring(canary: Path) -> bytes:
    """Write as Python 2 did."""
    command = touch(canary).encode()
    return SYSTEM + b"(T" + struct.pack("<i", len(command)) + command + b"tR"


def marshalled_function(canary: Path) -> bytes:
    """Make a function of marshalled code and call it."""
    source = call(named("builtins", "compile"), text(write(canary)), text("x"), text("exec"))
    function = call(named("types", "FunctionType"), source, b"}")
    return call(function)


LIVE: Mapping[str, Body] = {
    "a pickle in the pickle": nested_pickle,
    "a pickle in base64 in a pickle in the pickle": twice_nested_pickle,
    "an extension code it registers itself, EXT1": extension_code(b"\x82", 201, "<B", "os.system"),
    "an extension code it registers itself, EXT2": extension_code(
        b"\x83", 2001, "<H", "posix.system"
    ),
    "an extension code it registers itself, EXT4": extension_code(
        b"\x84", 200001, "<i", "subprocess.getoutput"
    ),
    "__setstate__ by two BUILDs": setstate_by_build,
    "bytes of a map, by NEWOBJ alone": bytes_of_a_map,
    "bytes of a map, by NEWOBJ_EX alone": bytes_of_a_map_by_newobj_ex,
    "a memo that is overwritten": memo_swapped,
    "a far place of the memo": memo_far_away,
    "the memo of protocol 0": text_memo,
    "a result that is popped": popped_result,
    "a result that is popped to a mark": popped_to_mark,
    "a duplicated name": duplicated,
    "a call for a key": key_of_a_dict,
    "a call in a set": member_of_a_set,
    "a call in a frozenset": member_of_a_frozenset,
    "a call for a storage's type": storage_type,
    "a call for a tensor's hooks": hooks_of_a_tensor,
    "a call in the metadata": metadata_of_a_state_dict,
    "opcodes of protocol 4": protocol_4,
    "opcodes of protocol 0": text_opcodes,
    "opcodes of Python 2": short_binstring,
    "a function of compiled code": marshalled_function,
    "exec": lambda c: call(named("builtins", "exec"), text(write(c))),
    "open": lambda c: call(named("io", "open"), text(str(c)), text("w")),
    "os.mkdir": lambda c: call(named("os", "mkdir"), text(str(c))),
    "subprocess.getoutput": lambda c: call(named("subprocess", "getoutput"), text(touch(c))),
    "subprocess.check_output": lambda c: call(
        named("subprocess", "check_output"), sequence(text("touch"), text(str(c)))
    ),
    "timeit": lambda c: call(named("timeit", "timeit"), text("pass"), text(write(c))),
    "cProfile.run": lambda c: call(named("cProfile", "run"), text(write(c))),
    "an interpreter's runsource": lambda c: call(
        call(
            named("builtins", "getattr"),
            call(named("code", "InteractiveInterpreter")),
            text("runsource"),
        ),
        text(write(c)),
    ),
    "a method by operator.methodcaller": lambda c: call(
        call(named("operator", "methodcaller"), text("system"), text(touch(c))),
        call(named("importlib", "import_module"), text("os")),
    ),
    "a map that a deque runs": lambda c: call(
        named("collections", "deque"),
        call(named("builtins", "map"), SYSTEM, sequence(text(touch(c)))),
    ),
    "torch.utils.collect_env": lambda c: call(
        named("torch.utils.collect_env", "run"), text(touch(c))
    ),
}
"""Bodies that a plain unpickler would run; a test proves that each one does."""

LIVE_GADGETS = (
    "os.system by GLOBAL and REDUCE", "posix.system", "os.system by STACK_GLOBAL",
    "os.system by INST", "os.system by OBJ", "eval",
)  # fmt: skip
"""Those of ``GADGETS`` that do; the others need a loader that gives in to them."""

CODES = frozenset({"unsafe-pickle", "damaged-file", "unsupported-format"})


# Pickles that cost or lie ----------------------------------------------------------------------------


def beside(body: bytes) -> bytes:
    """Return a state dict with *body* before its tensor."""
    return pickled(mapping({"x": body, "weight": tensor((4,), (1,))}))


COSTLY: Mapping[str, tuple[Callable[[], bytes], frozenset[str]]] = {
    "a billion laughs": (lambda: beside(pickle_of_doubling_lists(200)[2:-1]), CODES),
    "a list that holds itself": (lambda: beside(b"]q\x00h\x00a"), CODES),
    "a dict that holds itself": (lambda: beside(b"}q\x00Nh\x00s"), CODES),
    "a list ten thousand deep": (lambda: beside(b"]" * 10_000 + b"a" * 9_999), CODES),
    "a list one too deep": (lambda: beside(b"]" * MAX_DEPTH + b"a" * (MAX_DEPTH - 1)), CODES),
    "half a million marks": (lambda: pickled(b"(" * 500_000), CODES),
    "half a million dicts": (lambda: beside(b"](" + b"}" * 500_000 + b"e"), CODES),
    "a memo of a third of a million": (
        lambda: beside(b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(360_000))),
        CODES,
    ),
    "keys that collide": (
        lambda: beside(
            b"}(" + b"".join(number(n * (2**61 - 1)) + b"N" for n in range(1, 11_000)) + b"u"
        ),
        CODES,
    ),
    "a text said to be of four gigabytes": (
        lambda: pickled(b"X\xff\xff\xff\xff" + b"x" * 10),
        frozenset({"damaged-file"}),
    ),
    "bytes said to be of exabytes": (
        lambda: pickled(b"\x8e" + b"\xff" * 7 + b"\x7f"),
        frozenset({"damaged-file"}),
    ),
    "a number of two thousand bits": (
        lambda: beside(b"\x8b" + struct.pack("<i", 2000) + bytes(2000)),
        CODES,
    ),
    "a number of a hundred thousand digits": (
        lambda: beside(b"L" + b"9" * 100_000 + b"L\n"),
        CODES,
    ),
    "a frame of exabytes": (
        lambda: b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f" + b"}.",
        frozenset({"unsupported-format"}),
    ),
    "a frame that ends too early": (
        lambda: b"\x80\x04\x95" + struct.pack("<Q", 1) + b"}(" + b"N" * 4 + b"u.",
        frozenset({"unsupported-format"}),
    ),
    "protocol 4": (lambda: pickle.dumps({"w": 1}, 4), frozenset({"unsupported-format"})),
    "protocol 5": (lambda: pickle.dumps({"w": 1}, 5), frozenset({"unsupported-format"})),
    "protocol 255": (lambda: b"\x80\xff}.", frozenset({"unsupported-format"})),
    "an attribute that shadows a method": (
        lambda: beside(
            call(named("collections", "OrderedDict")) + mapping({"items": text("x")}) + b"b"
        ),
        CODES,
    ),
    "a persistent id that is a text": (lambda: beside(text("storage") + b"Q"), CODES),
    "a persistent id that is a mark": (lambda: beside(b"(Q"), CODES),
    "a persistent id in text": (lambda: beside(b"Pstorage\n"), CODES),
    "a value after the end": (lambda: beside(b"N") + b"N.", frozenset({"damaged-file"})),
    "a second pickle after the first": (lambda: beside(b"N") * 2, frozenset({"damaged-file"})),
}


def files() -> list[HostileFile]:
    """Return the pickles, each in the zip that torch would write, and some without one."""
    bodies = {**{name: GADGETS[name] for name in GADGETS}, **LIVE}
    found = [
        HostileFile(
            name=name,
            family=Family.CODE,
            build=lambda canary, body=body: torch_zip(beside(body(canary))),  # type: ignore[misc]
            suffix=".pt",
            field=Field.MODEL,
            carries_code=name in LIVE or name in LIVE_GADGETS,
            codes=CODES,
        )
        for name, body in bodies.items()
    ]
    found += [
        HostileFile(
            name=f"{name}, without a zip",
            family=Family.CODE,
            build=lambda canary, head=head, body=body: head + body(canary) + b".",  # type: ignore[misc]
            suffix=".pth",
            field=Field.MODEL,
            carries_code=True,
            codes=frozenset({"pickled-module", "unsupported-format"}),
        )
        for name, head, body in (
            ("protocol 0", b"", text_opcodes),
            ("protocol 2", b"\x80\x02", LIVE["exec"]),
            ("protocol 4", b"\x80\x04", protocol_4),
        )
    ]
    found += [
        HostileFile(
            name=name,
            family=Family.PICKLE,
            build=lambda _, build=build: torch_zip(build()),  # type: ignore[misc]
            suffix=".pt",
            field=Field.MODEL,
            codes=codes,
        )
        for name, (build, codes) in COSTLY.items()
    ]
    return found
