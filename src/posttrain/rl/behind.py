"""Rollouts from a process of their own, which samples while the trainer learns, from weights that are so many rollouts old.

While the trainer learns from rollout k, the process draws k + 1 to k + behind. Each is drawn with the weights that the trainer
had when it asked, just before it began to learn from an earlier one: so it is known beforehand, and the same in every run, which
weights a rollout is drawn with, and none is ever older than that.
"""

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from posttrain.errors import RunError
from posttrain.rl.drawing import Drawn

if TYPE_CHECKING:
    from torch import nn

RESTARTS = 3  # in a row, without a rollout between them


class Behind:
    """Asks a process for rollouts, and starts it anew where it has ended.

    module: what the process runs; it is given the number of a pipe, and reads `task` and the state of its problems there
    before it calls `serve`. parameters: what the trainer moves, by name.
    """

    def __init__(
        self, module: str, task: dict[str, Any], parameters: "Mapping[str, nn.Parameter]", behind: int,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.module, self.task, self.parameters, self.behind, self.say = module, task, parameters, behind, say
        self.taken: dict[str, Any] | None = None  # the state after the last rollout that was taken
        self.asked: deque[int] = deque()  # rollouts on their way
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: Connection | None = None
        self.lost = 0

    def take(self, rollout: int, version: int) -> Drawn:
        while True:
            try:
                if self.process is None:
                    self._start()
                for number in range(rollout, rollout + max(1, self.behind)):
                    if number not in self.asked:
                        self._ask(number, version)
                found = self._received()
                break
            except (EOFError, OSError):
                self._restart()
        self.asked.popleft()
        self.lost = 0
        with contextlib.suppress(OSError):  # a process that has just ended is missed at the next rollout
            self._ask(rollout + self.behind, version)
        return found

    def _start(self) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-m", self.module, str(theirs.fileno())]
            same = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # it finds graders where we found them
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=same)
        self.asked.clear()
        self.connection.send((self.task, self.taken))

    def _restart(self) -> None:
        self.lost += 1
        status = self._ended()
        if self.lost > RESTARTS:
            raise RunError(f"the sampler's process has ended {self.lost} times in a row (exit status {status}); see what it says")
        self.say(f"the sampler's process has ended (exit status {status}); it is started anew, and no rollout is lost")

    def _ask(self, rollout: int, version: int) -> None:
        import safetensors.torch

        assert self.connection is not None
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}
        self.connection.send((rollout, version))
        self.connection.send_bytes(safetensors.torch.save(tensors))
        self.asked.append(rollout)

    def _received(self) -> Drawn:
        assert self.connection is not None
        found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        drawn, self.taken = found
        assert isinstance(drawn, Drawn)
        return drawn

    def _ended(self) -> int | None:
        """The exit status of the process; it is ended where it has not."""
        if self.connection is not None:
            self.connection.close()
        if self.process is None:
            return None
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process = self.connection = None
        return status

    def state(self) -> dict[str, Any]:
        """What is on its way is not in it: it is drawn again."""
        assert self.taken is not None, "no rollout has been taken yet"
        return self.taken

    def load(self, state: dict[str, Any]) -> None:
        self.close()
        self.taken = state

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self._ended()


def serve(
    connection: Connection, drawer: Any, parameters: "Mapping[str, nn.Parameter]", alone: Callable[[], None] = lambda: None
) -> None:
    """Draws what it is asked for until nobody asks any more. alone: called at once when who asks has gone, whatever is drawn."""
    import safetensors.torch
    import torch

    asked: queue.Queue[tuple[int, int, bytes] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, asked, alone), daemon=True).start()
    while (question := asked.get()) is not None:
        rollout, version, weights = question
        known = safetensors.torch.load(weights)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(known[name])
        try:
            answer: Any = (drawer.take(rollout, version), drawer.state())
        except Exception as error:  # the trainer's to say
            answer = error if isinstance(error, RunError) else RunError(f"{type(error).__name__}: {error}")
        try:
            connection.send(answer)
        except OSError:  # nobody is there
            return


def _listen(connection: Connection, asked: "queue.Queue[tuple[int, int, bytes] | None]", alone: Callable[[], None]) -> None:
    """Takes questions while others are being answered, so that who asks never waits."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            rollout, version = connection.recv()
            asked.put((rollout, version, connection.recv_bytes()))
    asked.put(None)
    alone()
