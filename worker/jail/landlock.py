"""
Landlock: which files a process may touch, by the kernel, with no right needed.

Three system calls and two structures, by ctypes: glibc wraps none of them (docs/decisions/0008-jail.md
says why no library does this). What a kernel's version of Landlock does not know is left out, so that
an older kernel holds less and never fails. It does not cover ``stat``, ``chmod`` and their like, which
seccomp does.
"""

import ctypes
import os
import stat
import sys
from collections.abc import Iterable
from enum import IntFlag
from pathlib import Path

# The same numbers on every architecture that Linux has been ported to since 2019, and on the older
# ones but alpha.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1  # landlock_create_ruleset's flag that asks for the ABI
_PATH_BENEATH = 1

SCOPED_SINCE = 6
NETWORK_SINCE = 4


class Access(IntFlag):
    """What may be done to a file or in a folder; the kernel's own bits."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Access.READ_FILE | Access.READ_DIR
WORK = (
    READ
    | Access.WRITE_FILE
    | Access.TRUNCATE
    | Access.MAKE_DIR
    | Access.MAKE_REG
    | Access.REMOVE_DIR
    | Access.REMOVE_FILE
    | Access.REFER
)
"""What a job needs in its own folder: plain files and folders, and neither links nor pipes."""
DEVICE = Access.READ_FILE | Access.WRITE_FILE | Access.IOCTL_DEV

_ONE_FILE = (
    Access.EXECUTE | Access.WRITE_FILE | Access.READ_FILE | Access.TRUNCATE | Access.IOCTL_DEV
)
_SINCE = ((1, 13), (2, 14), (3, 15), (5, 16))
"""From each ABI on, how many of the bits above the kernel knows."""


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def abi() -> int:
    """Return the kernel's version of Landlock, or 0 if it has none."""
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


def restrict(rules: Iterable[tuple[Path, Access]]) -> None:
    """
    Take from this thread, and from those it starts, everything but *rules*, TCP and signals included.

    A path that is not there is passed over. ``no_new_privs`` must be set.

    Raises:
        OSError: The kernel refuses.
    """
    version = abi()
    known = Access((1 << next(bits for since, bits in reversed(_SINCE) if version >= since)) - 1)
    attributes = _Ruleset(
        files=known,
        network=0b11 if version >= NETWORK_SINCE else 0,  # bind and connect
        scoped=0b11 if version >= SCOPED_SINCE else 0,  # abstract sockets and signals
    )
    size = 24 if version >= SCOPED_SINCE else 16 if version >= NETWORK_SINCE else 8
    ruleset = _call(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), 0)
    try:
        for path, access in rules:
            _allow(ruleset, path, access & known)
        _call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: Path, access: Access) -> None:
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(found).st_mode):
            access &= _ONE_FILE
        rule = _Beneath(allowed=access, folder=found)
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(found)


def _call(number: int, *arguments: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock: {os.strerror(code)}")
    return result
