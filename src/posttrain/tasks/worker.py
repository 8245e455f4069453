"""A small process of our own that does what may hang, ended from outside when it does, and replaced.

It is started at the first question, asked one question after another, one line of JSON each, and works from any thread. A time
limit inside the process that hangs is none: code in C, or a signal that only a main thread hears, would outlast it.
"""

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WALL = 10  # seconds by the clock for each second of the processor: a busy machine must not change a grade
START_SECONDS = 120.0  # to import what it needs, on a busy machine

_PROCESS = Path(__file__).with_name("worker_process.py")


class WorkerLost(Exception):
    """The question was too much: the process hung, or came to its end over it. Another takes its place."""


class WorkerMissing(Exception):
    """There is no process, and the question has no part in that: it cannot be started, or was killed by somebody else."""


class Worker:
    """Runs a script, whose `begin()` gives what answers a question (worker_process.py)."""

    def __init__(self, script: Path) -> None:
        self.script = script
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked child must not talk through its parent's pipes
        self._ready = False
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, question: dict[str, Any], seconds: float) -> Any:
        """The answer. Raises WorkerLost where none has come after `seconds`, WorkerMissing where there is no process."""
        with self._lock:
            try:
                self._begin()
                return self._exchange(question, seconds)
            except (WorkerLost, WorkerMissing):
                self._end()
                raise

    def close(self) -> None:
        if self._owner == os.getpid():
            self._end()

    def _begin(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is not None:
            self._end()  # killed while nobody asked it anything
        if self._process is None or self._owner != os.getpid():
            self._spawn()
        if self._ready:
            return
        try:
            self._line(START_SECONDS)
        except WorkerLost as error:
            assert self._process is not None
            assert self._process.stderr is not None
            self._process.kill()
            said = self._process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkerMissing(f"{self.script.stem} did not start ({error}): {' '.join(said)}") from None
        self._ready = True

    def _spawn(self) -> None:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:  # -P: the folder of the script is not searched for modules
            self._process = subprocess.Popen([sys.executable, "-P", str(_PROCESS), str(self.script)], bufsize=0, **pipes)  # type: ignore[call-overload]
        except OSError as error:
            self._process = None
            raise WorkerMissing(f"{self.script.stem} cannot be started: {error}") from None
        self._owner, self._ready = os.getpid(), False

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()

    def _exchange(self, question: dict[str, Any], seconds: float) -> Any:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
        except OSError:
            raise self._ended() from None
        return json.loads(self._line(seconds))

    def _line(self, seconds: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, line, deadline = self._process.stdout, b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise WorkerLost(f"no answer in {seconds:g} s")
                piece = os.read(pipe.fileno(), 65536)
                if not piece:
                    raise self._ended()
                line += piece
        return line

    def _ended(self) -> WorkerLost | WorkerMissing:
        """Its own limits end it by other signals than SIGKILL, which is what the system sends where memory runs out."""
        assert self._process is not None
        if self._process.wait() == -signal.SIGKILL:
            return WorkerMissing(f"{self.script.stem} was killed from outside; is the machine out of memory?")
        return WorkerLost("it ended")
