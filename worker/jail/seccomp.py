"""
seccomp: which system calls a process may make, through libseccomp.

A list of what is refused, not of what is let through: torch, the C library and a GPU's driver call what
they like between two releases, and a job that fails because of a harmless new call helps nobody. What is
newer than this list is refused as if the kernel did not have it.
"""

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

LIBRARY = "libseccomp.so.2"

_ALLOW = 0x7FFF0000
_REFUSE = 0x00050000  # | errno
_NOT_EQUAL, _MASKED_EQUAL = 1, 7
_KILL = 0x80000000
_BAD_ARCHITECTURE, _OPTIMIZE = 2, 8  # attributes: what a foreign call gets; a tree for a filter
_CLONE_THREAD = 0x00010000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_NEWER = (452, *range(457, 512))
"""fchmodat2, and calls newer than many a libseccomp; from 424 on a number means the same everywhere."""

REFUSED: Sequence[str] = """
    socket socketpair connect bind listen accept accept4 socketcall
    execve execveat
    fork vfork
    ptrace process_vm_readv process_vm_writev process_madvise kcmp
    pidfd_open pidfd_getfd pidfd_send_signal tkill rt_sigqueueinfo rt_tgsigqueueinfo
    mount umount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick
    mount_setattr swapon swapoff quotactl quotactl_fd
    unshare setns
    bpf perf_event_open userfaultfd
    io_uring_setup io_uring_enter io_uring_register io_setup io_submit io_destroy
    keyctl add_key request_key
    kexec_load kexec_file_load init_module finit_module delete_module create_module reboot
    syslog acct lookup_dcookie nfsservctl iopl ioperm modify_ldt vm86 vm86old personality uselib
    settimeofday stime clock_settime clock_adjtime adjtimex sethostname setdomainname vhangup
    fanotify_init name_to_handle_at open_by_handle_at mknod mknodat
    shmget shmat shmctl semget semctl msgget msgctl mq_open memfd_secret
    chmod fchmod fchmodat chown lchown fchown fchownat
    setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr
    utime utimes utimensat futimesat
    setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset
    sched_setscheduler sched_setattr ioprio_set migrate_pages move_pages
""".split()  # noqa: SIM905 - a hundred names in quotes are not read
"""
Refused with EPERM. The lines from ``shmget`` on: memory that no cap counts; what Landlock does not see
and would let a job do to other jobs' files; and what is not a job's to set.
"""


class _Compare(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def missing() -> str | None:
    """Return why this platform has no such layer, or ``None`` if it has."""
    if not sys.platform.startswith("linux"):
        return "not Linux"
    if platform.machine() not in {"x86_64", "aarch64"}:
        return f"not written for {platform.machine()}"
    if _library() is None:
        return f"{LIBRARY} is not installed"
    return None


def call_number(name: str) -> int | None:
    """Return the number of a system call on this machine, or ``None`` if the library knows none."""
    library = _library()
    number = -1 if library is None else int(library.seccomp_syscall_resolve_name(name.encode()))
    return number if number >= 0 else None


def restrict(*, may_map_files: bool) -> None:
    """
    Refuse this thread, and those it starts, what is in the list, and every new process.

    Args:
        may_map_files: Let ``memfd_create`` through, which a GPU's driver uses.

    Raises:
        OSError: The library or the kernel refuses.
    """
    library = _library()
    assert library is not None
    context = library.seccomp_init(_ALLOW)
    if not context:
        raise OSError(errno.ENOMEM, "libseccomp gives no filter")
    try:
        refused = REFUSED if may_map_files else [*REFUSED, "memfd_create"]
        for name in refused:
            _refuse(context, call_number(name))
        _refuse_conditionally(context)
        # The flags of clone3 lie in memory, where no filter looks; glibc then falls back to clone.
        _refuse(context, call_number("clone3"), code=errno.ENOSYS)
        for number in _NEWER:
            _refuse(context, number, code=errno.ENOSYS)
        # 32-bit calls have numbers of their own, which no rule here means.
        _check(library.seccomp_attr_set(context, _BAD_ARCHITECTURE, _KILL), "foreign calls")
        library.seccomp_attr_set(context, _OPTIMIZE, 2)  # an old library has one way, and says so
        _check(library.seccomp_load(context), "loading the filter")
    finally:
        library.seccomp_release(context)


def _refuse_conditionally(context: int) -> None:
    """Refuse calls by their arguments: a new process, and whatever reaches another one."""
    own = os.getpid()
    clone = call_number("clone")
    _refuse(context, clone, _Compare(0, _MASKED_EQUAL, _CLONE_THREAD, 0))
    for name in ("kill", "tgkill"):
        _refuse(context, call_number(name), _Compare(0, _NOT_EQUAL, own, 0))
    _refuse(context, call_number("prlimit64"), _Compare(0, _NOT_EQUAL, 0, 0))
    for request in (_TIOCSTI, _TIOCLINUX):
        wanted = _Compare(1, _MASKED_EQUAL, 0xFFFFFFFF, request)
        _refuse(context, call_number("ioctl"), wanted)


def _refuse(
    context: int, number: int | None, *conditions: _Compare, code: int = errno.EPERM
) -> None:
    library = _library()
    assert library is not None
    if number is None:  # this machine has no such call
        return
    array = (_Compare * len(conditions))(*conditions)
    result = library.seccomp_rule_add_array(context, _REFUSE | code, number, len(conditions), array)
    _check(result, f"refusing the call {number}")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise OSError(-result, f"seccomp: {what}: {os.strerror(-result)}")


@cache
def _library() -> Any:
    """Return libseccomp, or ``None`` where it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_load.argtypes = [ctypes.c_void_p]
    library.seccomp_attr_set.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32]
    library.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.POINTER(_Compare),
    ]
    return library
