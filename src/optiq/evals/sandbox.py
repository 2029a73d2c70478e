"""Runs programs that a model wrote, where they can harm nothing.

A sandbox proves itself when it is made: a program tries everything that must not work. What a
program may do, and what each system gives, is in docs/sandbox.md.

A program passes when its last statement was reached: the runner then hands over a secret, which no
exit status can stand for. The program shares its interpreter with its own tests, so one that was
written to fool them can (an object that equals everything does); it cannot get out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Literal

from optiq.configs import EvalConfig
from optiq.errors import EngineFailure, UsageError
from optiq.evals.jail.methods import Interpreter, Job, Limits, Method, methods

Status = Literal["passed", "failed", "timeout"]

WALL_FACTOR = 3

_START_S = 30.0
_END_S = 5.0
_TICK_S = 0.1
_STARTED = b"+"
_PROBE = (Path(__file__).parent / "jail" / "probe.py").read_text(encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: `passed` if its last statement was reached; `timeout` if it used up its time.
        detail: the last line of its output, or what ended it.
        output: the end of stdout and stderr.
    """

    status: Status
    detail: str
    output: str


class Sandbox:
    """Runs programs, each in a process, a directory and limits of its own.

    May be used from several threads.

    Args:
        limits: what a program may use.
        interpreter: runs the programs; default: this one without its site packages.
        among: methods to choose from; default: those of this system and user, best first.

    Raises:
        UsageError: if no method holds a program; it names what was tried and what is missing.

    Cost: about two seconds, for the probe.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        interpreter: Interpreter | None = None,
        among: Sequence[Method] | None = None,
    ) -> None:
        self.limits = limits or Limits()
        found = methods(interpreter or Interpreter.this()) if among is None else among
        missing = {}
        for method in found:
            self._method = method
            missing[method.name] = self.probe()
            if not missing[method.name]:
                return
        raise UsageError(_refusal(missing))

    @property
    def method(self) -> str:
        """Name of the method in use."""
        return self._method.name

    def probe(self) -> list[str]:
        """What the method in use does not enforce, found by trying it; empty if all is well."""
        try:
            return self._open_walls() or self._open_ends()
        except (OSError, EngineFailure) as error:
            return [str(error)]

    def _open_walls(self) -> list[str]:
        with tempfile.TemporaryDirectory(prefix="optiq-probe-") as folder, _listener() as port:
            canary = Path(folder) / "canary"
            canary.write_text("seen", encoding="utf-8")
            values = {
                "canary": str(canary),
                "port": port,
                "places": [_identity(path) for path in _private_folders()],
                "writable": [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", ".."],
                **dataclasses.asdict(self.limits),
            }
            tried = self.run(f"{_PROBE}\nmain({values!r})\n", timeout_s=10)
        if tried.status != "passed":
            return [f"a run at all ({tried.detail})"]
        missing: list[str] = json.loads(tried.output)
        return missing

    def _open_ends(self) -> list[str]:
        self.run(f"{_PROBE}\nleave_daemon()\n", timeout_s=10)  # raises if it stays
        spun = self.run("while True: pass", timeout_s=1)
        return [] if spun.status == "timeout" else ["a limit of processor time"]

    def run(self, program: str, timeout_s: float) -> Outcome:
        """Runs one program to its end.

        Args:
            program: Python source; it has the standard library alone, an empty directory, no input.
            timeout_s: processor time of each of its processes, rounded up to whole seconds. The
                wall clock ends it after `WALL_FACTOR` times as much, so that a busy machine
                changes no result.

        Returns:
            How it ended. Nothing of it is left: no process, no file.

        Raises:
            EngineFailure: if it could not be started, or could not be ended.

        Cost: about 60 ms and one more process, beyond the program itself.
        """
        secret = secrets.token_bytes(32)
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(tempfile.TemporaryFile())
            source.write(program.encode("utf-8", "replace"))
            source.seek(0)
            secret_end = _filled_pipe(secret, stack)
            verdict = _Pipe(stack, keep_bytes=2 * len(_STARTED + secret))
            output = _Pipe(stack, self.limits.output_bytes)
            job = Job(source.fileno(), secret_end, verdict.inside, output.inside, timeout_s)
            process = stack.enter_context(self._method.launch(job, self.limits))
            watch = _Watch(process, verdict, output, self.limits)
            try:
                watch.until_the_end(len(_STARTED + secret), WALL_FACTOR * timeout_s)
            finally:
                watch.stop()
        return watch.outcome(_STARTED + secret)


class _Pipe:
    """A pipe from inside to outside.

    Attributes:
        inside: write end, which the process gets.
        outside: read end.
        content: the end of what was read, at most `keep_bytes`.
    """

    def __init__(self, stack: contextlib.ExitStack, keep_bytes: int) -> None:
        self._keep_bytes = keep_bytes
        self.outside, self.inside = os.pipe()
        self.content = b""
        self._inside = os.fdopen(self.inside, "wb")
        stack.callback(os.close, self.outside)
        stack.callback(self.close_inside)

    def read(self) -> bool:
        """Reads what is there, once; False at the end."""
        chunk = os.read(self.outside, 1 << 16)
        self.content = (self.content + chunk)[-self._keep_bytes :]
        return bool(chunk)

    def close_inside(self) -> None:
        """Leaves the write end to the process."""
        self._inside.close()


def _filled_pipe(content: bytes, stack: contextlib.ExitStack) -> int:
    """Read end of a pipe that holds a few bytes and no more can be written to."""
    read_end, write_end = os.pipe()
    stack.callback(os.close, read_end)
    os.write(write_end, content)
    os.close(write_end)
    return read_end


class _Watch:
    """A started process: reads its pipes, ends it, tells how it ended."""

    def __init__(
        self, process: subprocess.Popen[bytes], verdict: _Pipe, output: _Pipe, limits: Limits
    ) -> None:
        self._process = process
        self._verdict = verdict
        self._output = output
        self._limits = limits
        self._selector = selectors.DefaultSelector()
        self._late = False
        for pipe in (verdict, output):
            pipe.close_inside()
            self._selector.register(pipe.outside, selectors.EVENT_READ, pipe)

    def until_the_end(self, verdict_bytes: int, wall_s: float) -> None:
        """Reads until the verdict is complete, the process has ended or its time is over."""
        deadline = time.monotonic() + _START_S
        started = False
        while self._selector.get_map():
            self._read(_TICK_S)
            if self._verdict.content and not started:
                started = True
                deadline = time.monotonic() + wall_s
            if len(self._verdict.content) >= verdict_bytes or _has_ended(self._process.pid):
                return
            if time.monotonic() > deadline:
                self._late = True
                return
            if sys.platform == "darwin" and self._resident_bytes() > self._limits.memory_bytes:
                return

    def stop(self) -> None:
        """Ends all processes and reads what they have left in the pipes.

        Raises:
            EngineFailure: if one of them holds a pipe after that.
        """
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        deadline = time.monotonic() + _END_S
        while self._selector.get_map() and time.monotonic() < deadline:
            self._read(_TICK_S)
        left = bool(self._selector.get_map())
        self._selector.close()
        if left:
            raise EngineFailure(
                f"processes of the sandbox are alive {_END_S:.0f} s after they were killed; end "
                "them by hand and do not run code of models on this machine"
            )

    def outcome(self, wanted: bytes) -> Outcome:
        """How it ended, given what the verdict has to be.

        Raises:
            EngineFailure: if the program was never begun.
        """
        output = self._output.content.decode("utf-8", "replace")
        lines = output.strip().splitlines()
        last = lines[-1][:300] if lines else ""
        if not self._verdict.content.startswith(_STARTED):
            raise EngineFailure(last or f"the sandbox did not start within {_START_S:.0f} s")
        if self._verdict.content == wanted:
            return Outcome("passed", "", output)
        code = self._process.returncode
        number = -code if code < 0 else code - 128
        if self._late or number == signal.SIGXCPU:
            return Outcome("timeout", "it used up its time", output)
        if number == signal.SIGKILL:
            return Outcome("failed", "killed, by a limit or by itself", output)
        return Outcome("failed", last or f"it ended with status {code}", output)

    def _read(self, timeout_s: float) -> None:
        """Reads once from each pipe that has something; one that was closed is forgotten."""
        for key, _ in self._selector.select(timeout_s):
            pipe: _Pipe = key.data
            if not pipe.read():
                self._selector.unregister(pipe.outside)

    def _resident_bytes(self) -> int:
        """Memory of the process, where the kernel has no limit for it."""
        command = ["/bin/ps", "-o", "rss=", "-p", str(self._process.pid)]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return 1024 * int(text or 0)


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it stays to be waited for, so that its number stays its own."""
    if sys.platform == "darwin":
        return False  # a single process: its pipes say so
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextlib.contextmanager
def _listener() -> Generator[int]:
    """Port on the loopback that a program without a network must not reach."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def _private_folders() -> list[Path]:
    """Directories that a program must not list."""
    return [
        path
        for path in (Path(os.path.expanduser("~")), Path.cwd(), Path(tempfile.gettempdir()))
        if path.is_dir()
    ]


def _identity(path: Path) -> tuple[str, int, int]:
    """A directory, told from others that have its name inside."""
    found = path.stat()
    return str(path), found.st_dev, found.st_ino


def _refusal(missing: dict[str, list[str]]) -> str:
    tried = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in missing.items())
    advice = {
        "linux": "install bubblewrap (Debian: apt install bubblewrap), allow user namespaces "
        "(sysctl user.max_user_namespaces), or run as root",
        "darwin": "sandbox-exec must work and Python must lie outside of your home",
    }.get(sys.platform, "use Linux or macOS")
    return (
        "code of a model cannot be contained here, so it is not run. Not enforced by "
        f"{tried or 'anything on this system'}. What helps: {advice}; or leave humaneval out"
    )


def for_config(config: EvalConfig) -> Sandbox:
    """The sandbox of this process, made on first use.

    Raises:
        UsageError: without `--allow-code-execution`, or if nothing here holds a program.
    """
    if not config.allow_code_execution:
        raise UsageError(
            "this benchmark runs code that the model writes; allow it with "
            "--allow-code-execution (it runs in a sandbox), or leave the benchmark out"
        )
    return _shared()


@functools.cache
def _shared() -> Sandbox:
    return Sandbox()
