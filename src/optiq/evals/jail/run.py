"""Runs the program on standard input under limits and tells a pipe that it came to its end.

usage: run.py SECRET_FD VERDICT_FD LIMITS

`SECRET_FD` is a pipe with a secret, `VERDICT_FD` the pipe that is told, `LIMITS` a JSON object.
Written are `+` before the program is compiled and the secret after its last statement. The secret
is held on the evaluation stack while the program runs: in no variable of a frame, in no object
that the garbage collector tracks, and no longer in the pipe. A program that raises, or that ends
the process, unwinds it.

A script of the standard library alone; it runs inside the sandbox.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import traceback
import types


def set_limits(limits: dict[str, int]) -> None:
    """Limits of the process and of its children, from which nobody inside comes back."""
    wanted = {
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_CPU": (limits["cpu_s"], limits["cpu_s"] + 1),
        "RLIMIT_FSIZE": (limits["file_bytes"],) * 2,
        "RLIMIT_NOFILE": (limits["open_files"],) * 2,
    }
    if sys.platform == "linux":  # macOS does not enforce these two
        wanted["RLIMIT_AS"] = (limits["memory_bytes"],) * 2
        wanted["RLIMIT_NPROC"] = (limits["processes"],) * 2
    for name, (soft, hard) in wanted.items():
        number = getattr(resource, name)
        ceiling = resource.getrlimit(number)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(number, (soft, hard))


def take(fd: int) -> bytes:
    """All bytes of a pipe, which is closed."""
    with os.fdopen(fd, "rb") as pipe:
        return pipe.read()


def execute(text: bytes) -> bytes:
    """Nothing, after the last statement of a program.

    Its module is not `__main__`, so that a guarded main function does not run.
    """
    module = types.ModuleType("program")
    sys.modules.update(program=module)
    exec(compile(text, "program.py", "exec"), module.__dict__)  # what this is here for
    flush()
    return b""


def flush() -> None:
    """Lets go of what was printed, as far as the program has left its streams whole."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


def main() -> None:
    """Runs the program that the arguments name."""
    limits = json.loads(sys.argv.pop())
    verdict_fd, secret_fd = int(sys.argv.pop()), int(sys.argv.pop())
    text = sys.stdin.buffer.read()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    low, high = sorted((secret_fd, verdict_fd))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, max(high + 1, 1024))
    set_limits(limits)
    write, leave = os.write, os._exit  # as they are before the program
    write(verdict_fd, b"+")
    ending = ""
    try:
        # one expression: the left side is evaluated first and stays on the stack
        write(verdict_fd, take(secret_fd) + execute(text))
    except SystemExit as stop:
        ending = f"SystemExit: {stop.code}, before the tests ended\n"
    except BaseException:  # noqa: BLE001  the outermost door of this process
        ending = traceback.format_exc()
    finally:
        try:
            flush()
            write(2, ending.encode("utf-8", "replace"))
        finally:
            leave(1 if ending else 0)


if __name__ == "__main__":
    main()
