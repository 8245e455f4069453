"""Where programs that nobody has read are run: bubblewrap, or, asked for by name, nothing.

A sandbox starts a script of ours (guest.py or judge.py) and gives back the pipes to it. The script takes a line and answers with
one; the program that runs beside guest.py may forge any answer, so its answer is data and never a verdict.
"""

import contextlib
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from posttrain.component import Component
from posttrain.errors import RecipeError
from posttrain.sandbox import seccomp

SYSTEM = ("/lib/", "/usr/lib/")  # folders with a platform's shared libraries, and no programs
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
FIRST_UID = 200_000  # of the slots, where root runs them; a limit of processes counts for other users only
Script = Literal["guest", "judge"]


class SandboxLost(Exception):
    """The process has ended, said too much, or said nothing in time. The text says which."""


class SandboxFailed(Exception):
    """The sandbox itself could not be started. The program has no part in that."""


class Running:
    """A script that was started in a sandbox, the first of its session. folder: one that goes with it."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", deadline: float, most: int, folder: "tempfile.TemporaryDirectory[str] | None"
    ) -> None:
        self.process, self.deadline, self.most, self.folder = process, deadline, most, folder
        self._ready = False
        self.also_end: Callable[[], Any] = lambda: None  # what else ends it

    stays = True  # whether it can be asked about the next program, too

    def renew(self, seconds: float, output: int) -> None:
        """Time (seconds) and output (MB) begin anew."""
        self.deadline, self.most = time.monotonic() + seconds, output << 20

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises SandboxLost where nobody reads it in time, SandboxFailed where the script has not begun."""
        assert self.process.stdin is not None
        if not self._ready:  # only now will it die with us; what it had been sent before would outlive us
            self._wait_until_it_begins()
        pipe = self.process.stdin.fileno()
        os.set_blocking(pipe, False)
        rest = memoryview(json.dumps(message).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_WRITE)
            while rest:
                self._wait(selector)
                try:
                    rest = rest[os.write(pipe, rest) :]
                except OSError:
                    raise self._ended() from None

    def _wait_until_it_begins(self) -> None:
        try:
            self._ready = self.line() == b"ready\n"
        except SandboxLost as error:
            raise SandboxFailed(f"the script did not begin: {error}") from None

    def line(self) -> bytes:
        """The next line. Raises SandboxLost where none comes in time, or more than `most` bytes do."""
        found = b"".join(self._pieces(until=b"\n"))
        if not found.endswith(b"\n"):
            raise self._ended()
        return found

    def everything(self) -> bytes:
        """All that it writes until it ends."""
        return b"".join(self._pieces(until=None))

    def ended_with(self) -> int:
        """Its exit status, or the signal that ended it. Raises SandboxLost where it does not end in time."""
        if not self._over(max(0.0, self.deadline - time.monotonic())):
            raise SandboxLost("no answer in time")
        ended = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return 0 if ended is None else ended.si_status

    def end(self) -> None:
        """Whatever it does, from within outwards, so that each process is waited for by its parent: not every machine has an
        init that would do it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.also_end()
        children = _children(self.process.pid)
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        self._over(1.0 if children else 0.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()
        if self.folder is not None:
            self.folder.cleanup()

    @property
    def gone(self) -> bool:
        """Whether it has ended by itself; `end` is still to be called."""
        return self._over(0.0)

    def _over(self, seconds: float) -> bool:
        """Whether it ends within `seconds`. Its number stays taken, so that its group is still its own."""
        until = time.monotonic() + seconds
        while os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() >= until:
                return False
            time.sleep(0.001)
        return True

    def _pieces(self, until: bytes | None) -> Iterator[bytes]:
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while True:
                self._wait(selector)
                piece = os.read(pipe, 65536)
                self.most -= len(piece)
                if self.most < 0:
                    raise SandboxLost("it wrote more than it may")
                if not piece:
                    return
                yield piece
                if until is not None and piece.endswith(until):
                    return

    def _wait(self, selector: selectors.BaseSelector) -> None:
        if not selector.select(max(0.0, self.deadline - time.monotonic())):
            raise SandboxLost("no answer in time")

    def _ended(self) -> SandboxLost:
        return SandboxLost("it ended by itself")


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return []


class Sandbox(Component):
    """Limits of a program that nobody has read."""

    seconds: PositiveFloat = 10.0
    """The longest that a program may take, with all its tests, by the clock on the wall."""
    memory: PositiveInt = 512
    """MB of address space of each of its processes."""
    processes: PositiveInt = 16
    """Processes and threads at a time, those of the sandbox among them."""
    disk: PositiveInt = 16
    """MB of files."""
    output: PositiveInt = 4
    """MB that it may write."""

    def check(self) -> None:
        """Raises RecipeError where this machine cannot run programs so, with what is missing."""
        raise NotImplementedError

    def start(self, script: Script, slot: int) -> Running:
        """The script, begun; `slot` is a number that no other running script has. Raises SandboxFailed."""
        raise NotImplementedError

    def _running(
        self, command: Sequence[str], folder: "tempfile.TemporaryDirectory[str] | None" = None, **options: Any
    ) -> Running:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                start_new_session=True, **options,
            )  # fmt: skip
        except OSError as error:
            raise SandboxFailed(str(error)) from None
        return Running(process, time.monotonic() + self.seconds, self.output << 20, folder)

    def _limits(self) -> list[str]:
        return [str(each) for each in (self.memory << 20, self.processes, self.disk << 20, int(self.seconds) + 1)]


class Bubblewrap(Sandbox, kind="bubblewrap"):
    """Namespaces, a filter of system calls and limits, by `bwrap`; no network, and of the host a Python interpreter to read.

    Every run is new: its files are in memory and go with it. Where root runs it, each slot is a user of its own.
    """

    python: str | None = None
    """The interpreter inside, a path; by default that of posttrain, or the system's where the sandbox's user cannot read it."""

    def check(self) -> None:
        missing = _what_is_missing(self.python)
        if missing:
            raise RecipeError(
                f"sandbox: programs cannot be isolated here: {missing}. Debian and Ubuntu: `apt install bubblewrap`; in "
                "a container user namespaces must be allowed (docker run --security-opt seccomp=unconfined, or --privileged). To "
                "run programs without isolation, say so: sandbox: {kind: none, i_trust_this_code: true}"
            )

    def start(self, script: Script, slot: int) -> Running:
        try:
            interpreter = interpreter_of(self.python)
            readable_parts(interpreter)
        except (OSError, subprocess.SubprocessError) as error:
            raise SandboxFailed(str(error)) from None
        read, write = os.pipe()
        with os.fdopen(write, "wb") as pipe:
            pipe.write(seccomp.filter_of())
        user: dict[str, Any] = {"user": FIRST_UID + slot, "group": FIRST_UID + slot, "extra_groups": []}
        if os.geteuid() != 0:
            user = {}
        try:
            command = [*_command(interpreter, self.disk << 20, read), "-c", source_of(script), *self._limits()]
            return self._running(command, pass_fds=[read], cwd="/", env={"PATH": os.environ.get("PATH", "")}, **user)
        finally:
            os.close(read)


class NoSandbox(Sandbox, kind="none"):
    """Limits without isolation: the program can do what the user can, also on the network. Asked for by name only."""

    i_trust_this_code: bool = False
    """Must be true."""

    @model_validator(mode="after")
    def _is_meant(self) -> "NoSandbox":
        if not self.i_trust_this_code:
            raise ValueError("runs programs without isolation, as you; if that is meant, set i_trust_this_code: true")
        return self

    def check(self) -> None:
        """Nothing is needed."""

    def start(self, script: Script, slot: int) -> Running:
        limits = self._limits()
        limits[1] = str(resource.getrlimit(resource.RLIMIT_NPROC)[1])  # without a namespace, all of the user's processes count
        folder = tempfile.TemporaryDirectory(prefix="posttrain-", ignore_cleanup_errors=True)
        command = [sys.executable, "-I", "-S", "-c", source_of(script), *limits]
        return self._running(command, folder, cwd=folder.name, env={"LANG": "C.UTF-8"})


@cache
def source_of(script: Script) -> str:
    """The script with wire.py in the place of its import, as one program."""
    wire, own = (files("posttrain.sandbox").joinpath(f"{name}.py").read_text(encoding="utf-8") for name in ("wire", script))
    wire = wire.replace("from __future__ import annotations\n", "")  # which is for the beginning of a file
    return own.replace(next(line for line in own.splitlines() if ".wire import" in line), wire, 1)


def _command(interpreter: str, disk: int, filter_fd: int) -> list[str]:
    """bwrap up to the interpreter and its options."""
    shown, hidden = readable_parts(interpreter)
    return [
        "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox",
        "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv",
        "--setenv", "LANG", "C.UTF-8", "--seccomp", str(filter_fd),
        *(word for path in shown for word in ("--ro-bind", path, path)),
        *(word for path in hidden for word in ("--tmpfs", path, "--remount-ro", path)),
        *(word for name in DEVICES for word in ("--dev-bind", name, name)),
        "--size", str(disk), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--", interpreter, "-I", "-S",
    ]  # fmt: skip


@cache
def interpreter_of(python: str | None) -> str:
    """Raises FileNotFoundError where the sandbox's user can read none."""
    candidates = [python] if python else [os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"]
    for each in candidates:
        path = os.path.realpath(each)
        if os.path.exists(path) and (os.geteuid() != 0 or _others_read(Path(path))):
            return path
    raise FileNotFoundError(f"no Python interpreter that the sandbox's user can read (looked at {', '.join(candidates)})")


def _others_read(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o4) and all(each.stat().st_mode & 0o1 for each in path.parents)


@cache
def readable_parts(interpreter: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What an interpreter needs (itself, its library, the shared libraries of both), and what of that is packages of others."""
    asked = "import sysconfig, sys; print(sysconfig.get_path('stdlib')); print(sysconfig.get_config_var('DESTSHARED'))"
    said = subprocess.run([interpreter, "-I", "-S", "-c", asked], capture_output=True, text=True, check=True)
    library, extensions = said.stdout.splitlines()
    binaries = [interpreter, *map(str, Path(extensions).glob("*.so"))]
    listed = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    words = [word for line in listed.splitlines() for word in line.split()[:3] if word.startswith("/") and not word.endswith(":")]
    shared = [folder if (folder := os.path.dirname(word)).startswith(SYSTEM) else word for word in words]  # a bind costs 0.3 ms
    packages = [str(each) for name in ("site-packages", "dist-packages") if (each := Path(library, name)).is_dir()]
    return tuple(dict.fromkeys([interpreter, library, *shared])), tuple(packages)


PROBE = """
import ctypes, os, socket
def probe():
    libc, done = ctypes.CDLL(None, use_errno=True), []
    def attempt(name, fn):
        try:
            fn()
            done.append(name)
        except Exception:
            pass
    def call(fn, *arguments):
        if fn(*arguments) != 0:
            raise OSError
    attempt("opened a socket", socket.socket)
    attempt("made a namespace", lambda: call(libc.unshare, 0x10000000))
    attempt("wrote beside its own folder", lambda: open("/probe", "w"))
    attempt("listed the host's users", lambda: open("/etc/passwd"))
    return done
"""


@cache
def _what_is_missing(python: str | None) -> str | None:
    """Why programs cannot be isolated here; None where a program that tries to get out has been held."""
    if shutil.which("bwrap") is None:
        return "bubblewrap's bwrap is not installed"
    try:
        seccomp.filter_of()
    except KeyError as error:
        return f"there is no filter of system calls for the architecture {error}"
    try:
        interpreter = interpreter_of(python)
        readable_parts(interpreter)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    running = Bubblewrap(python=python).start("guest", slot=0)
    try:
        running.send({"code": PROBE})
        running.line()
        running.send({"do": "read", "name": "probe"})
        number = json.loads(running.line())["value"]["kept"]
        running.send({"do": "call", "kept": number, "arguments": [], "named": {"dict": []}})
        done = json.loads(running.line()).get("value", ["something unknown"])
    except (SandboxLost, SandboxFailed):
        return f"bwrap does not start: {_said(interpreter)}"
    finally:
        running.end()
    return f"a program in the sandbox {', '.join(done)}" if done else None


def _said(interpreter: str) -> str:
    """What bwrap says where it does not start."""
    words = ["bwrap", "--unshare-all", "--unshare-user", "--ro-bind", "/", "/", "--", interpreter, "-c", ""]
    user = {"user": FIRST_UID, "group": FIRST_UID, "extra_groups": []} if os.geteuid() == 0 else {}
    done = subprocess.run(words, capture_output=True, text=True, cwd="/", check=False, **user)  # type: ignore[call-overload]
    return " ".join(done.stderr.split())[:300] or "it ended without a word"


_lock = threading.Lock()
_taken: set[int] = set()


@contextlib.contextmanager
def slot() -> Iterator[int]:
    """A number that no other program that runs has."""
    with _lock:
        number = next(each for each in range(len(_taken) + 1) if each not in _taken)
        _taken.add(number)
    try:
        yield number
    finally:
        with _lock:
            _taken.remove(number)
