"""The ways to shut a program in: what is started, and with which arguments.

| method     | who              | walls |
|------------|------------------|-------|
| namespaces | root, or a user  | namespaces, a file system of its own, an unused user id |
| bwrap      | a user           | the same, set up by bubblewrap |
| user       | root             | an unused user id, Landlock, seccomp; for containers |
| seatbelt   | macOS            | a profile of `sandbox-exec`, no second process |
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from optiq.evals.jail.seccomp import filter_program

_FOLDER = Path(__file__).parent
_RUNNER = (_FOLDER / "run.py").read_text(encoding="utf-8")
_BOX = "/box"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_SYSTEM_FILES = ("/etc/ld.so.cache",)
_SYSTEM_FOLDERS = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store")
_MACOS_FOLDERS = ("/usr/lib", "/usr/share", "/System", "/Library/Frameworks", "/dev", "/opt")
_ISOLATED = ("-s", "-S", "-P", "-B")  # -I would ignore the seed of the hashes too
_UNUSED_UIDS = range(0x70000000, 0x7FF00000)
_UNUSED_SMALL_UIDS = range(60_500, 65_000)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        memory_bytes: address space of each process.
        processes: processes and threads.
        file_bytes: largest file.
        box_bytes: all files together, where the directory lies in memory.
        open_files: open files of each process.
        output_bytes: end of the output that is kept; what comes before is read and dropped.
    """

    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    box_bytes: int = 64 << 20
    open_files: int = 64
    output_bytes: int = 16 << 10


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python without site packages.

    Attributes:
        executable: the binary itself, no link to it.
        prefix: directory with its library.
    """

    executable: Path
    prefix: Path

    @classmethod
    def this(cls) -> Interpreter:
        """The one that runs, outside of its virtual environment."""
        return cls(Path(sys.executable).resolve(), Path(sys.base_prefix).resolve())


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, as a method needs it.

    Attributes:
        program: open file of the program's text.
        secret: read end of the pipe with the secret.
        verdict: write end of the pipe that is told.
        output: write end of the pipe of stdout and stderr.
        cpu_s: processor time of each process, in seconds.
    """

    program: int
    secret: int
    verdict: int
    output: int
    cpu_s: float

    def arguments(self, limits: Limits) -> list[str]:
        """Arguments of the runner."""
        values = dataclasses.asdict(limits) | {"cpu_s": math.ceil(self.cpu_s)}
        return ["-c", _RUNNER, str(self.secret), str(self.verdict), json.dumps(values)]


class Method(Protocol):
    """A way to shut a program in."""

    @property
    def name(self) -> str:
        """Name in messages."""

    def launch(self, job: Job, limits: Limits) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """Starts a program as leader of a process group; with the group, all of it ends.

        Raises:
            OSError: if the machine has not what the method needs.
        """


@dataclasses.dataclass(frozen=True)
class _View:
    """What a program sees of the file system.

    Attributes:
        shown: pairs of a path outside and its place inside.
        links: pairs of a target and the symbolic link to it.
        executable: the interpreter, inside.
        environment: all variables.
    """

    shown: list[tuple[str, str]]
    links: list[tuple[str, str]]
    executable: str
    environment: dict[str, str]


def _view(interpreter: Interpreter, home: str, *, moved: bool) -> _View:
    """The system's libraries and the interpreter.

    Args:
        interpreter: runs the programs.
        home: the empty directory, inside.
        moved: the interpreter may be shown at another place, so that no part of a home is named.
    """
    shown = [(path, path) for path in (*_DEVICES, *_SYSTEM_FILES) if os.path.exists(path)]
    links = []
    for path in _SYSTEM_FOLDERS:
        if os.path.islink(path):
            links.append((os.readlink(path), path))
        elif os.path.isdir(path):
            shown.append((path, path))
    prefix, executable = interpreter.prefix, interpreter.executable
    place = prefix
    if not any(prefix.is_relative_to(path) for path, _ in shown):
        place = Path("/python") if moved else prefix
        shown.append((str(prefix), str(place)))
    if executable.is_relative_to(prefix):
        executable = place / executable.relative_to(prefix)
    else:
        shown.append((str(executable), str(executable)))
    variables = {
        "HOME": home,
        "TMPDIR": home,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
    }
    if place != Path("/usr"):
        variables["LD_LIBRARY_PATH"] = str(place / "lib")
    return _View(shown, links, str(executable), variables)


def _started(
    command: list[str],
    job: Job,
    *,
    env: dict[str, str],
    more_fds: tuple[int, ...] = (),
    cwd: str = "/",
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=job.program,
        stdout=job.output,
        stderr=job.output,
        pass_fds=(job.secret, job.verdict, *more_fds),
        start_new_session=True,
        env=env,
        cwd=cwd,
    )


def _entering(plan: dict[str, Any], view: _View, limits: Limits, job: Job) -> list[str]:
    """The command that enters by a plan; the interpreter outside is the running one."""
    full = {
        "shown": view.shown,
        "links": view.links,
        "command": [view.executable, *_ISOLATED, *job.arguments(limits)],
        "env": view.environment,
        "box_bytes": limits.box_bytes,
        "parent": os.getpid(),
    }
    return [sys.executable, "-I", "-S", "-B", str(_FOLDER / "enter.py"), json.dumps(full | plan)]


@dataclasses.dataclass(frozen=True)
class Namespaces:
    """Namespaces of its own: directly for who may take other user ids, else in a user namespace."""

    interpreter: Interpreter
    name: str = "namespaces"

    @contextmanager
    def launch(self, job: Job, limits: Limits) -> Generator[subprocess.Popen[bytes]]:
        """See `Method`."""
        plan = {
            "method": "namespaces",
            "uid": _unused_uid(),
            "box": _BOX,
            "filter": filter_program(sessions=True).hex(),
        }
        view = _view(self.interpreter, _BOX, moved=True)
        yield _started(_entering(plan, view, limits, job), job, env={})


@dataclasses.dataclass(frozen=True)
class Bubblewrap:
    """The same, set up by bubblewrap."""

    interpreter: Interpreter
    name: str = "bwrap"

    @contextmanager
    def launch(self, job: Job, limits: Limits) -> Generator[subprocess.Popen[bytes]]:
        """See `Method`."""
        program = shutil.which("bwrap")
        if program is None:
            raise FileNotFoundError("bubblewrap is not installed")
        view = _view(self.interpreter, _BOX, moved=True)
        command = [program, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
        command += ["--uid", "65534", "--gid", "65534"]
        for source, target in view.shown:
            command += ["--dev-bind" if source in _DEVICES else "--ro-bind", source, target]
        for target, link in view.links:
            command += ["--symlink", target, link]
        command += ["--perms", "0700", "--size", str(limits.box_bytes), "--tmpfs", _BOX]
        command += ["--remount-ro", "/", "--chdir", _BOX]
        with tempfile.TemporaryFile() as code:
            code.write(filter_program(sessions=True))
            code.seek(0)
            if code.seek(0, os.SEEK_END):
                command += ["--seccomp", str(code.fileno())]
            code.seek(0)
            command += [view.executable, *_ISOLATED, *job.arguments(limits)]
            yield _started(command, job, env=view.environment, more_fds=(code.fileno(),))


@dataclasses.dataclass(frozen=True)
class OwnUser:
    """An unused user id, Landlock and seccomp, for root in a container without namespaces."""

    interpreter: Interpreter
    name: str = "user"

    @contextmanager
    def launch(self, job: Job, limits: Limits) -> Generator[subprocess.Popen[bytes]]:
        """See `Method`."""
        code = filter_program(sessions=False)
        uid = _unused_uid()
        if uid is None or not code:
            raise PermissionError("needs root with other user ids, on x86_64 or aarch64")
        with tempfile.TemporaryDirectory(prefix="optiq-", ignore_cleanup_errors=True) as parent:
            box = Path(parent) / "box"
            box.mkdir(mode=0o700)
            os.chown(box, uid, uid)
            os.chmod(parent, 0o711)
            plan = {"method": "user", "uid": uid, "box": str(box), "filter": code.hex()}
            view = _view(self.interpreter, str(box), moved=False)
            yield _started(_entering(plan, view, limits, job), job, env={})


@dataclasses.dataclass(frozen=True)
class Seatbelt:
    """`sandbox-exec` of macOS: one process, no network, files of the system and the box alone."""

    interpreter: Interpreter
    name: str = "seatbelt"

    @contextmanager
    def launch(self, job: Job, limits: Limits) -> Generator[subprocess.Popen[bytes]]:
        """See `Method`."""
        with tempfile.TemporaryDirectory(prefix="optiq-", ignore_cleanup_errors=True) as parent:
            box = Path(parent).resolve() / "box"
            box.mkdir(mode=0o700)
            profile = _profile(box, self.interpreter)
            view = _view(self.interpreter, str(box), moved=False)
            command = ["/usr/bin/sandbox-exec", "-p", profile]
            command += [view.executable, *_ISOLATED, *job.arguments(limits)]
            yield _started(command, job, env=view.environment, cwd=str(box))


def _profile(box: Path, interpreter: Interpreter) -> str:
    """The seatbelt profile: what is not named is denied; forks and the network are not named."""
    readable = [*_MACOS_FOLDERS, str(interpreter.prefix), str(box)]
    folders = " ".join(f"(subpath {json.dumps(path)})" for path in readable)
    return "\n".join(
        [
            "(version 1)",
            "(deny default)",
            '(import "system.sb")',
            "(allow process-exec)",
            "(allow sysctl-read)",
            "(allow file-read-metadata)",
            f'(allow file-read* (literal "/") {folders})',
            f"(allow file-write* (subpath {json.dumps(str(box))}))",
            '(allow file-write-data (literal "/dev/null"))',
        ]
    )


def methods(interpreter: Interpreter) -> list[Method]:
    """The methods for this system and user, best first."""
    if sys.platform == "darwin":
        return [Seatbelt(interpreter)]
    if sys.platform != "linux":
        return []
    if os.geteuid() == 0:
        return [Namespaces(interpreter), OwnUser(interpreter)]
    return [Bubblewrap(interpreter), Namespaces(interpreter)]


def _unused_uid() -> int | None:
    """A random user id that nobody has, so that its processes are counted alone.

    Returns:
        The id; None for who is not root, or root of a namespace without such ids.
    """
    if os.geteuid() != 0:
        return None
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    for wanted in (_UNUSED_UIDS, _UNUSED_SMALL_UIDS):
        for first, _, count in ranges:
            if int(first) <= wanted.start and wanted.stop <= int(first) + int(count):
                return random.SystemRandom().choice(wanted)
    return None
