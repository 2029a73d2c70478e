"""Hostile programs, one wall each, under every method that this machine has.

Each is a program that passes if it gets through, unless said otherwise: a wall that is missing
turns its test red.
"""

import contextlib
import copy
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from optiq.configs import EvalConfig
from optiq.errors import EngineFailure, UsageError
from optiq.evals import sandbox
from optiq.evals.jail.methods import (
    Bubblewrap,
    Interpreter,
    Limits,
    Namespaces,
    OwnUser,
    Seatbelt,
    methods,
)
from optiq.evals.jail.seccomp import filter_program
from optiq.evals.sandbox import Sandbox

METHODS = {each.name: each for each in (Namespaces, Bubblewrap, OwnUser, Seatbelt)}
LINUX = ["namespaces", *["bwrap"] * bool(shutil.which("bwrap")), *["user"] * (os.geteuid() == 0)]


def system_python():
    """A Python that other users can run, as the method `user` needs it; else the running one."""
    found = Path("/usr/bin/python3").resolve()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run([found, "-P", "-c", "pass"], check=True, capture_output=True)
        return Interpreter(found, Path("/usr"))
    return Interpreter.this()


@pytest.fixture(scope="module", params=["seatbelt"] if sys.platform == "darwin" else LINUX)
def box(request):
    name = request.param
    interpreter = system_python() if name == "user" else Interpreter.this()
    try:
        return Sandbox(among=[METHODS[name](interpreter)])
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def usable():
    try:
        return Sandbox()
    except UsageError as error:
        pytest.skip(str(error))


def run(box, program, timeout_s=60):  # for a busy machine; tests whose time must run out say less
    return box.run(textwrap.dedent(program), timeout_s)


def goes_on(box):
    return box.run("assert 1 + 1 == 2", 5).status == "passed"


def processes_with(words):
    """Whether a process has these words as its arguments, in this order."""
    if sys.platform != "linux":
        command = ["ps", "-ww", "-eo", "args="]
        return words in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if words in path.read_text(errors="replace").replace("\0", " "):
                return True
    return False


def becomes(true, within_s=5.0):
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def can_unshare():
    """What util-linux says: whether this user may have namespaces."""
    if shutil.which("unshare") is None:
        return False
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *user, "--net", "--pid", "--ipc", "--uts", "--mount", "--fork", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def has_landlock():
    """What the kernel says: the version of Landlock, by its system call."""
    return ctypes.CDLL(None).syscall(444, ctypes.c_void_p(0), ctypes.c_size_t(0), 1) >= 1


# a wall that no longer holds must not show as a skipped test


def test_where_namespaces_can_be_made_they_hold():
    if not can_unshare():
        pytest.skip("unshare says that there are no namespaces for this user")
    assert Sandbox(among=[Namespaces(Interpreter.this())]).method == "namespaces"


def test_where_root_has_landlock_a_user_of_its_own_holds():
    if sys.platform != "linux" or os.geteuid() != 0 or not has_landlock():
        pytest.skip("needs root and Landlock")
    if system_python() == Interpreter.this():
        pytest.skip("needs a Python 3.11 in /usr/bin")
    assert Sandbox(among=[OwnUser(system_python())]).method == "user"


# what passes and what does not


def test_a_program_that_comes_to_its_end_passes(box):
    outcome = run(box, "print('hello')")
    assert outcome == sandbox.Outcome("passed", "", "hello\n")


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("x = (", "SyntaxError"),
        ("'\\0'\0", "null bytes"),
        ("input()", "EOFError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("import os; os._exit(0)", "status 0"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("import os, sys; os.execv(sys.executable, [sys.executable, '-S', '-c', ''])", "status 0"),
        ("import ctypes; ctypes.string_at(0)", "status"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_a_program_that_does_not_come_to_its_end_fails(box, program, detail):
    outcome = box.run(program, 2)
    assert outcome.status == "failed"
    assert detail in outcome.detail


def test_an_exit_under_the_tests_does_not_pass(box):
    program = """
    import atexit, os, threading
    def solution():
        atexit.register(os._exit, 0)
        threading.Thread(target=lambda: os._exit(0)).start()
        raise SystemExit(0)
    assert solution() == 1
    """
    assert run(box, program).status == "failed"


def test_the_secret_is_nowhere_to_be_read(box, monkeypatch):
    """A program that gathers all bytes in reach and shows those as long as the secret."""
    secret = bytes(range(100, 132))
    monkeypatch.setattr(secrets, "token_bytes", lambda size: secret[:size])
    program = """
    import gc, os, sys
    found = set()

    def gather(value, depth=0):
        if isinstance(value, (bytes, bytearray)):
            found.add(bytes(value))
        elif isinstance(value, str):
            found.add(value.encode("utf-8", "replace"))
        elif isinstance(value, dict) and depth < 4:
            for each in list(value.values()):
                gather(each, depth + 1)
        elif isinstance(value, (list, tuple, set)) and depth < 4:
            for each in list(value):
                gather(each, depth + 1)

    frame = sys._getframe()
    while frame:
        gather(frame.f_locals), gather(frame.f_globals), gather(frame.f_code.co_consts)
        frame = frame.f_back
    gather(gc.get_objects())
    gather(dict(os.environ)), gather(sys.argv), gather(sys.orig_argv)
    for number in range(3, 64):
        try:
            os.set_blocking(number, False)
            found.add(os.read(number, 1 << 16))
        except OSError:
            pass
    print(len(found), *(each.hex() for each in found if len(each) == 32))
    sys.exit(0)
    """
    outcome = run(box, program, 5)
    assert outcome.status == "failed"
    assert int(outcome.output.split()[0]) > 100  # it did look
    assert secret.hex() not in outcome.output


def test_a_wrong_word_on_the_pipe_does_not_pass(box):
    program = """
    import os
    for number in range(3, 64):
        try:
            os.write(number, b"x" * 32)
        except OSError:
            pass
    """
    assert run(box, program).status == "failed"


def test_hashes_and_environment_are_the_same_in_every_run(box, monkeypatch):
    monkeypatch.setenv("OPTIQ_CANARY", "seen")
    program = "import os; print(hash('a'), sorted(set(os.environ) - {'HOME', 'TMPDIR', 'PWD'}))"
    first, second = run(box, program), run(box, program)
    assert first == second
    assert "CANARY" not in first.output


def test_a_guarded_main_is_not_run(box):
    assert run(box, "if __name__ == '__main__': raise ValueError").status == "passed"


# hostile programs


def test_a_fork_loop_is_stopped(box):
    program = """
    import os, time
    children = 0
    for _ in range(500):
        try:
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            children += 1
        except OSError:
            pass
    print(children)
    """
    outcome = run(box, program)
    assert outcome.status == "passed"
    assert int(outcome.output) < box.limits.processes
    assert goes_on(box)


def test_ten_gigabytes_are_not_given(box):
    outcome = run(box, "block = bytearray(10 * 2**30)")
    assert outcome.status == "failed"
    assert "Memory" in outcome.detail or "killed" in outcome.detail
    assert goes_on(box)


def test_a_busy_program_runs_out_of_time(box):
    assert run(box, "while True: pass", 1).status == "timeout"


def test_a_sleeping_program_runs_out_of_time(box):
    assert run(box, "import time; time.sleep(60)", 0.2).status == "timeout"


def test_a_program_that_ignores_the_signal_is_killed(box):
    program = "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    start = time.monotonic()
    assert run(box, program, 1).status != "passed"
    assert time.monotonic() - start < 10


def test_the_home_directory_is_not_read(box):
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary"
        canary.write_text("seen")
        program = f"""
        import os, pathlib
        def visible(attempt, *arguments):
            try:
                return attempt(*arguments)
            except OSError:
                return None
        assert visible(os.listdir, {str(Path.home())!r}) is None, "home"
        assert visible(os.listdir, {str(Path.cwd())!r}) is None, "working directory"
        assert visible(pathlib.Path({str(canary)!r}).read_text) is None, "canary"
        assert os.listdir(pathlib.Path.home()) == [], "its own home is empty"
        """
        outcome = run(box, program)
    assert outcome.status == "passed", outcome


def test_no_socket_leads_anywhere(box):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        program = f"""
        import socket
        def works(attempt):
            try:
                attempt()
            except OSError:
                return False
            return True
        here = ("127.0.0.1", {server.getsockname()[1]})
        assert not works(lambda: socket.create_connection(here, 1))
        assert not works(lambda: socket.create_connection(("192.0.2.1", 80), 1))
        assert not works(lambda: socket.socket(socket.AF_UNIX).bind("inside"))
        assert not works(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(
            b"x", ("127.0.0.1", 9)))
        """
        outcome = run(box, program)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert outcome.status == "passed", outcome


def test_its_parent_directory_is_not_deleted(box):
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary"
        canary.write_text("here")
        program = """
        import os, shutil
        here = os.getcwd()
        parent = os.path.dirname(here)
        shutil.rmtree(parent, ignore_errors=True)
        for attempt in (os.rmdir, os.unlink):
            for path in (here, parent):
                try:
                    attempt(path)
                except OSError:
                    continue
                raise AssertionError(path)
        try:
            os.rename(here, here + "2")
        except OSError:
            pass
        else:
            raise AssertionError("moved")
        assert os.path.isdir(here) and os.path.isdir(parent)
        """
        outcome = run(box, program)
        assert canary.read_text() == "here"
    assert outcome.status == "passed", outcome
    assert goes_on(box)


def test_endless_output_is_cut(box):
    outcome = run(box, "while True: print('x' * 999)", 1)
    assert outcome.status == "timeout"
    assert 0 < len(outcome.output) <= box.limits.output_bytes


def test_a_huge_file_is_not_written(box):
    program = """
    block = b"x" * 2**20
    with open("huge", "wb") as file:
        for _ in range(10_000):
            file.write(block)
    """
    outcome = run(box, program, 5)
    assert outcome.status == "failed"
    assert "OSError" in outcome.detail
    assert goes_on(box)


def test_a_daemon_does_not_stay(box):
    word = f"optiq-daemon-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
    import os, signal, sys, time
    read_end, write_end = os.pipe()
    try:
        child = os.fork()
    except OSError:
        child = None  # where no second process is let, there is no daemon
    if child == 0:
        try:
            os.setsid()
        except OSError:
            pass
        if os.fork():
            os._exit(0)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        os.write(write_end, b"!")
        os.closerange(0, 64)
        os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(60)",
                                  {word!r}])
    if child:
        assert os.read(read_end, 1) == b"!"
        time.sleep(1)
    """
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, box, program, 5)
        if box.method != "seatbelt":
            assert becomes(lambda: processes_with(word)), "it was there"
    assert running.result().status == "passed", running.result()
    assert becomes(lambda: not processes_with(word))


def test_nothing_outside_is_killed(box):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
        import os
        for pid in (os.getppid(), {os.getpid()}, {bystander.pid}):
            if pid > 2:  # 1 and 2 are its own
                try:
                    os.kill(pid, 9)
                except OSError:
                    pass
        """
        assert run(box, program).status == "passed"
        run(box, "import os; os.kill(-1, 9)")
        assert bystander.poll() is None
        assert goes_on(box)
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux")
def test_no_namespace_of_its_own_gives_rights(box):
    program = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x10000000) == -1, "user namespace"
    for attempt in (lambda: os.setuid(0), lambda: os.chroot("."), lambda: os.setgroups([])):
        try:
            attempt()
        except OSError:
            continue
        raise AssertionError
    """
    outcome = run(box, program)
    assert outcome.status == "passed", outcome


def test_nothing_is_left_behind_in_the_temporary_directory(box):
    before = set(os.listdir(tempfile.gettempdir()))
    run(box, "import os; os.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a', 0)")
    left = set(os.listdir(tempfile.gettempdir())) - before
    assert not [name for name in left if name.startswith("optiq-")]


def test_several_threads_have_a_box_each(box):
    def alone(number):
        program = f"""
        import os, time
        with open("mine", "w") as file:
            file.write("{number}")
        time.sleep(0.1)
        assert os.listdir(".") == ["mine"]
        assert open("mine").read() == "{number}"
        assert {number} % 2
        """
        return run(box, program, 5).status

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(alone, range(8)))
    assert found == ["failed", "passed"] * 4


def test_a_killed_harness_takes_its_programs_along(box, monkeypatch):
    if box.method == "seatbelt":
        pytest.skip("macOS has no signal for the death of a parent; the time limit ends it")
    python = box._method.interpreter
    word = f"optiq-orphan-{os.getpid()}-{time.monotonic_ns()}"
    script = f"""
import os, sys
from pathlib import Path
from optiq.evals.jail.methods import *
from optiq.evals.sandbox import Sandbox
python = Interpreter(Path({str(python.executable)!r}), Path({str(python.prefix)!r}))
Sandbox(among=[{type(box._method).__name__}(python)]).run('''import os, sys
os.execv(sys.executable, [sys.executable, "-S", "-c", "import time; time.sleep(60)", {word!r}])
''', 60)
"""
    with tempfile.TemporaryDirectory() as folder:  # takes what a killed harness leaves
        os.chmod(folder, 0o755)
        monkeypatch.setenv("TMPDIR", folder)
        harness = subprocess.Popen([sys.executable, "-c", script])
        try:
            assert becomes(lambda: processes_with(f"time.sleep(60) {word}"), 20), "it was there"
        finally:
            harness.send_signal(signal.SIGKILL)
            harness.wait()
        assert becomes(lambda: not processes_with(f"time.sleep(60) {word}"))


# what cannot be enforced is refused


class Bare:
    """A method without any walls."""

    name = "bare"

    def __init__(self, limits=None):
        self.limits = limits
        self.interpreter = Interpreter.this()

    @contextlib.contextmanager
    def launch(self, job, limits):
        with tempfile.TemporaryDirectory() as folder:
            yield subprocess.Popen(
                [self.interpreter.executable, "-S", *job.arguments(self.limits or limits)],
                stdin=job.program,
                stdout=job.output,
                stderr=job.output,
                pass_fds=(job.secret, job.verdict),
                start_new_session=True,
                cwd=folder,
                env={},
            )


def test_missing_walls_are_refused_by_name():
    with pytest.raises(UsageError) as refused:
        Sandbox(among=[Bare()])
    for wall in ("bare:", "no network", f"{Path.home()} hidden", "files of others hidden"):
        assert wall in str(refused.value)
    assert "no writing in " + tempfile.gettempdir() in str(refused.value)
    assert ("bubblewrap" if sys.platform == "linux" else "sandbox-exec") in str(refused.value)


def test_missing_limits_are_refused_by_name():
    wide = Limits(
        memory_bytes=1 << 40, processes=2000, file_bytes=1 << 33, open_files=256, output_bytes=1
    )
    with pytest.raises(UsageError) as refused:
        Sandbox(Limits(memory_bytes=1 << 29, processes=8), among=[Bare(wide)])
    for wall in ("memory", "file size", "open files"):
        assert f"a limit of {wall}" in str(refused.value)


def test_processes_that_stay_are_an_error_of_the_harness(monkeypatch):
    monkeypatch.setattr(sandbox, "_END_S", 0.3)
    bare = Sandbox.__new__(Sandbox)  # without its probe, which refuses it
    bare._method, bare.limits = Bare(), Limits()
    program = """
    import os, time
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(write_end, b"!")
        time.sleep(2)
    os.read(read_end, 1)
    """
    with pytest.raises(EngineFailure, match="alive"):
        run(bare, program)


def test_where_there_is_no_method_code_is_refused():
    with pytest.raises(UsageError, match="cannot be contained"):
        Sandbox(among=[])


def test_the_next_method_is_taken_where_the_first_does_not_hold(usable):
    assert Sandbox(among=[Bare(), usable._method]).method == usable.method


def test_bubblewrap_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(UsageError, match="bwrap: bubblewrap is not installed"):
        Sandbox(among=[Bubblewrap(Interpreter.this())])


def test_an_interpreter_that_cannot_be_run_is_named(tmp_path):
    missing = Interpreter(tmp_path / "bin" / "python", tmp_path)
    for method in methods(missing):
        with pytest.raises(UsageError, match=method.name):
            Sandbox(among=[method])


def test_a_sandbox_that_breaks_later_is_no_failure_of_the_program(usable, tmp_path):
    broken = copy.copy(usable)
    broken._method = type(usable._method)(Interpreter(tmp_path / "python", tmp_path))
    with pytest.raises(EngineFailure):
        broken.run("pass", 1)


def test_code_is_not_run_unless_it_is_allowed():
    with pytest.raises(UsageError, match="--allow-code-execution"):
        sandbox.for_config(EvalConfig())


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_filter_refuses_more_where_groups_must_be_kept(machine):
    free, bound = (filter_program(sessions=value, machine=machine) for value in (True, False))
    assert len(free) % 8 == 0
    assert len(bound) == len(free) + 4 * 8


def test_an_unknown_machine_has_no_filter():
    assert filter_program(sessions=True, machine="pdp11") == b""
