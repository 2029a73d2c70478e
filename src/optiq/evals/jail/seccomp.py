"""A seccomp filter: system calls that no solution of a benchmark needs, refused by the kernel.

Reference: seccomp(2), and the tables of system calls of Linux.
"""

from __future__ import annotations

import errno
import platform
import struct
from typing import NamedTuple

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X32_CALLS = 0x40000000
_NEW_NAMESPACES = 0x7E020000
_CLONE3 = 435


class _Machine(NamedTuple):
    """Numbers of an architecture.

    Attributes:
        audit: its AUDIT_ARCH constant.
        clone: number of `clone`.
        denied: numbers that are refused: sockets, namespaces, mounts, keys, tracing, bpf,
            shared memory that outlives its processes.
        sessions: `setsid` and `setpgid`.
    """

    audit: int
    clone: int
    denied: tuple[int, ...]
    sessions: tuple[int, ...]


# socket, unshare, setns, mount, ptrace, process_vm_readv and writev, bpf, perf_event_open,
# userfaultfd, add_key, request_key, keyctl, shmget, semget, msgget, io_uring_setup
_MACHINES = {
    "x86_64": _Machine(
        audit=0xC000003E,
        clone=56,
        denied=(
            *(41, 272, 308, 165, 101, 310, 311, 321, 298),
            *(323, 248, 249, 250, 29, 64, 68, 425),
        ),
        sessions=(112, 109),
    ),
    "aarch64": _Machine(
        audit=0xC00000B7,
        clone=220,
        denied=(
            *(198, 97, 268, 40, 117, 270, 271, 280, 241),
            *(282, 217, 218, 219, 194, 190, 186, 425),
        ),
        sessions=(157, 154),
    ),
}


def filter_program(*, sessions: bool, machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`.

    Args:
        sessions: let processes leave their process group.
        machine: architecture as in `platform.machine()`; default: this one.

    Returns:
        The program; empty where the numbers of the architecture are not known.
    """
    numbers = _MACHINES.get(machine or platform.machine())
    if numbers is None:
        return b""
    refused = _ERROR | errno.EPERM
    denied = numbers.denied if sessions else numbers.denied + numbers.sessions
    code = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, numbers.audit),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32_CALLS),
        (_RETURN, 0, 0, refused),
        # its flags are in memory, where a filter cannot look; libraries fall back to clone
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    for number in denied:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, refused)]
    code += [
        (_EQUAL, 0, 3, numbers.clone),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, refused),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(
        struct.pack("=HBBI", operation, yes, no, value) for operation, yes, no, value in code
    )
