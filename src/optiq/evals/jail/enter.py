"""Shuts itself in and becomes another program.

usage: enter.py PLAN

`PLAN` is a JSON object: `method` is `namespaces` or `user`, the rest is made by `methods.py`.

- `namespaces`: mount, process, network, IPC and host name namespaces of its own, as root or inside
  a user namespace; a file system of the interpreter, five devices and one empty directory in
  memory. This process is outside; its child is process 1 inside, whose end ends all others; the
  child of that becomes the program, with an unused user id and no capabilities.
- `user`: an unused user id, Landlock for files and seccomp for the network and for process groups.
  The process group stays that of this process, for nobody can leave it.

A script of the standard library alone; it runs on the way into the sandbox.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

Plan = dict[str, Any]

LIBC = ctypes.CDLL(None, use_errno=True)

NEW_NS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
NO_SUID, NO_DEV, BIND, RECURSIVE, PRIVATE = 2, 4, 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_READ_ONLY_NO_SUID = 442, -100, 0x8000, 3
SET_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES, SET_SECCOMP, SECCOMP_FILTER = 1, 38, 22, 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ_RIGHTS = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, read a directory
FILE_RIGHTS = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14  # those that a file can be given
RIGHTS_BY_VERSION = (13, 14, 15, 15, 16)  # number of rights that Landlock 1, 2, ... knows


def checked(name: str, result: int) -> int:
    """The result of a call into libc.

    Raises:
        OSError: if it failed, with the name of the call.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Calls `mount(2)`."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    result = LIBC.mount(*texts, ctypes.c_ulong(flags), options.encode())
    checked(f"mount of {target}", result)


def control(name: str, option: int, value: int, more: Any = 0) -> None:  # noqa: ANN401  a number or a pointer
    """Calls `prctl(2)`."""
    arguments = (ctypes.c_ulong(value), more, ctypes.c_ulong(0), ctypes.c_ulong(0))
    checked(name, LIBC.prctl(option, *arguments))


def die_with(parent: int) -> None:
    """Ends this process when its parent ends, also where that happened already."""
    control("parent death signal", SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def become_sacrifice() -> None:
    """When memory is short, the kernel ends this process and its children first."""
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:
        pass  # a help, not a wall


def drop_privileges(uid: int | None) -> None:
    """Takes a user id without rights, for good."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    control("no new privileges", SET_NO_NEW_PRIVILEGES, 1)


def filter_calls(code: bytes) -> None:
    """Installs a seccomp filter, if there is one."""
    if not code:
        return

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code) // 8, code)
    control("seccomp", SET_SECCOMP, SECCOMP_FILTER, ctypes.byref(program))


def become_program(plan: Plan) -> NoReturn:
    """Installs the filter and turns into the program."""
    filter_calls(bytes.fromhex(plan["filter"]))
    try:
        os.execve(plan["command"][0], plan["command"], plan["env"])
    except PermissionError as error:
        raise PermissionError(
            error.errno,
            f"{plan['command'][0]} cannot be run by another user; use a Python from /usr",
        ) from error


# namespaces


def own_user_namespace(uid: int, gid: int) -> None:
    """Maps one user and one group of the new user namespace to those outside."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"65534 {uid} 1"),
        ("gid_map", f"65534 {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


def build_root(plan: Plan) -> None:
    """Makes a file system of what the plan shows, and enters it."""
    new = "/proc"  # a directory that is always there and that nothing shown lies under
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", new, "tmpfs", NO_SUID | NO_DEV, "mode=755,size=1m,nr_inodes=1k")
    for source, target in plan["shown"]:
        place = new + target
        if os.path.isdir(source):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT, 0o644))
        mount(source, place, None, BIND | RECURSIVE)
    for target, link in plan["links"]:
        os.symlink(target, new + link)
    box = new + plan["box"]
    os.mkdir(box)
    attributes = (ctypes.c_uint64 * 4)(ATTR_READ_ONLY_NO_SUID, 0, 0, 0)
    result = LIBC.syscall(
        MOUNT_SETATTR, AT_FDCWD, new.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
    )
    checked("mount_setattr (Linux 5.12 or newer)", result)
    owner = 65534 if plan["uid"] is None else plan["uid"]
    options = f"mode=700,size={plan['box_bytes']},nr_inodes=4k,uid={owner},gid={owner}"
    mount("tmpfs", box, "tmpfs", NO_SUID | NO_DEV, options)
    os.chdir(new)
    checked("pivot_root", LIBC.pivot_root(b".", b"."))
    checked("umount", LIBC.umount2(b".", DETACH))
    os.chdir(plan["box"])


def wait_for(child: int) -> NoReturn:
    """Reaps until a child ends, and ends like it."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def guarded(work: Callable[[Plan], NoReturn], plan: Plan) -> NoReturn:
    """Does the work of a forked process; an error is told, and ends the process."""
    try:
        work(plan)
    except OSError as error:
        fail(error)


def process_one(plan: Plan) -> NoReturn:
    """The first process inside: builds the root, starts the program and reaps."""
    control("parent death signal", SET_DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    build_root(plan)
    child = os.fork()
    if child == 0:
        guarded(program_inside, plan)
    wait_for(child)


def program_inside(plan: Plan) -> NoReturn:
    """The second process inside becomes the program."""
    drop_privileges(plan["uid"])
    become_program(plan)


def enter_namespaces(plan: Plan) -> NoReturn:
    """The outer process: waits for the inner ones, which end with it."""
    uid, gid = os.getuid(), os.getgid()
    flags = NEW_NS | NEW_UTS | NEW_IPC | NEW_PID | NEW_NET
    flags |= NEW_USER if plan["uid"] is None else 0
    checked("unshare", LIBC.unshare(flags))
    if plan["uid"] is None:
        own_user_namespace(uid, gid)
    child = os.fork()
    if child == 0:
        guarded(process_one, plan)
    wait_for(child)


# a user id of its own


class PathRule(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("rights", ctypes.c_uint64), ("directory", ctypes.c_int32)]


def restrict_files(plan: Plan) -> None:
    """Reading what the plan shows and anything in the box: no other use of files."""
    none = ctypes.c_void_p(0)
    version = LIBC.syscall(CREATE_RULESET, none, ctypes.c_size_t(0), 1)
    checked("Landlock (Linux 5.13 or newer)", version)
    rights = (1 << RIGHTS_BY_VERSION[min(version, len(RIGHTS_BY_VERSION)) - 1]) - 1
    ruleset = ctypes.c_uint64(rights)
    rules = LIBC.syscall(CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(8), 0)
    checked("Landlock ruleset", rules)
    allowed = [(source, READ_RIGHTS) for source, _ in plan["shown"]]
    allowed += [(plan["box"], rights), ("/dev/null", FILE_RIGHTS)]
    for path, wanted in allowed:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        wanted &= rights if os.path.isdir(path) else FILE_RIGHTS & rights
        rule = PathRule(wanted, place)
        result = LIBC.syscall(ADD_RULE, rules, 1, ctypes.byref(rule), 0)
        checked(f"Landlock rule for {path}", result)
        os.close(place)
    control("no new privileges", SET_NO_NEW_PRIVILEGES, 1)
    checked("Landlock", LIBC.syscall(RESTRICT_SELF, rules, 0))
    os.close(rules)


def enter_user(plan: Plan) -> NoReturn:
    """Becomes the program under a user id of its own."""
    os.chdir(plan["box"])
    restrict_files(plan)
    drop_privileges(plan["uid"])
    die_with(plan["parent"])  # the change of user id has cleared it
    become_program(plan)


def fail(error: OSError) -> NoReturn:
    """Tells why the sandbox could not be entered, and ends."""
    sys.stderr.write(f"the sandbox cannot be entered: {error.strerror or error}\n")
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """Enters by the plan in the arguments."""
    plan = json.loads(sys.argv[1])
    try:
        die_with(plan["parent"])
        become_sacrifice()
        (enter_namespaces if plan["method"] == "namespaces" else enter_user)(plan)
    except OSError as error:
        fail(error)


if __name__ == "__main__":
    main()
