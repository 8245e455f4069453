"""Sandboxes that others run: a container engine, and a service that is asked over HTTP."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from posttrain.errors import RecipeError
from posttrain.sandbox.sandbox import Running, Sandbox, SandboxFailed, SandboxLost, Script, source_of


class Container(Sandbox, kind="container"):
    """A container for each program, by docker or podman: no network, a read-only root, no capabilities, and the limits.

    With `runtime: runsc` (gVisor) the program does not meet the host's kernel. A start takes a good part of a second, which
    `seconds` includes.
    """

    engine: Literal["docker", "podman"] = "docker"
    """The command."""
    runtime: str | None = "runsc"
    """Of the engine, such as gVisor's `runsc`; null: the engine's own, where a hole in the kernel is a way out."""
    image: str = "python:3.11-slim"
    """With `python3` in it; it has to be on the machine, nothing is fetched."""

    def check(self) -> None:
        if shutil.which(self.engine) is None:
            raise RecipeError(f"sandbox: {self.engine} is not installed; install it, or take sandbox: bubblewrap")
        running = self.start("guest", 0)
        try:
            running.send({"code": "ready = 1"})
            running.line()
        except (SandboxLost, SandboxFailed) as error:
            asked = subprocess.run([*self._command("probe"), "true"], capture_output=True, text=True, check=False)
            said = " ".join(asked.stderr.split())[-300:] or str(error)
            raise RecipeError(
                f"sandbox: {self.engine} cannot run {self.image} here: {said}; is the image on this machine, and the runtime "
                f"{self.runtime or 'of the engine'} set up?"
            ) from None
        finally:
            running.end()

    def start(self, script: Script, slot: int) -> Running:
        name = f"posttrain-{time.time_ns()}-{slot}"
        limit = ["timeout", "-s", "KILL", str(int(self.seconds) + 1)]  # also where nobody is left to end it
        command = [*self._command(name), *limit, "python3", "-I", "-S", "-c", source_of(script), *self._limits()]
        running = self._running(command, cwd="/")
        running.stays = False  # it has so many seconds to live
        running.also_end = lambda: subprocess.run([self.engine, "kill", name], capture_output=True, check=False)
        return running

    def _command(self, name: str) -> list[str]:
        runtime = [] if self.runtime is None else ["--runtime", self.runtime]
        return [
            self.engine, "run", "--rm", "--interactive", "--name", name, *runtime, "--network", "none", "--read-only", "--user",
            "65534:65534", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", str(self.processes),
            "--memory", f"{self.memory}m", "--memory-swap", f"{self.memory}m", "--ipc", "none", "--tmpfs",
            f"/tmp:size={self.disk}m,mode=1777", "--workdir", "/tmp", "--pull", "never", self.image,
        ]  # fmt: skip


class Service(Sandbox, kind="http"):
    """A service that runs programs, by SandboxFusion's `run_code`.

    It answers when a program has ended. What is asked of a program one question after another is therefore asked by running it
    again with all questions so far: programs that do something else each time cannot be judged by it.
    """

    url: str
    """Of the service, such as `http://localhost:8080`."""

    @field_validator("url")
    @classmethod
    def _is_of_the_web(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no address; write it like http://localhost:8080")
        return url.rstrip("/")

    def check(self) -> None:
        running = self.start("guest", 0)
        try:
            running.send({"code": "ready = 1"})
            running.line()
        except (SandboxLost, SandboxFailed) as error:
            raise RecipeError(f"sandbox: {self.url} runs no programs: {error}") from None

    def start(self, script: Script, slot: int) -> Running:
        return Asked(self, script)


_SAME_ORDER = """
import os, sys
if os.environ.get("PYTHONHASHSEED") != "0":
    os.environ["PYTHONHASHSEED"] = "0"
    os.execv(sys.executable, sys.orig_argv)
"""  # of what is in a set, each time a script is run again


class Asked(Running):
    """A script that is run again for each answer, with all that it has been sent."""

    stays = False

    def __init__(self, service: Service, script: Script) -> None:
        self.service, self.script = service, script
        self.deadline, self.most = time.monotonic() + service.seconds, service.output << 20
        self.sent: list[str] = []
        self.status = 0
        self.heard = 1  # lines, the first of which says that the script has begun

    def send(self, message: Mapping[str, Any]) -> None:
        self.sent.append(json.dumps(message))

    def line(self) -> bytes:
        lines = self._output().split(b"\n")
        if self.heard >= len(lines) - 1:
            raise self._ended()
        self.heard += 1
        return lines[self.heard - 1] + b"\n"

    def everything(self) -> bytes:
        return self._output().partition(b"\n")[2]

    def ended_with(self) -> int:
        return self.status

    def _output(self) -> bytes:
        limits = f"{_SAME_ORDER}import sys; sys.argv[1:] = {self.service._limits()!r}\n"
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise SandboxLost("no answer in time")
        code, stdin = f"{limits}exec({source_of(self.script)!r})", "".join(f"{each}\n" for each in self.sent)
        found = self._posted({"code": code, "language": "python", "stdin": stdin, "run_timeout": left}, left)
        result = found.get("run_result") or {}
        if found.get("status") == "SandboxError" or "stdout" not in result:
            raise SandboxFailed(f"the service says: {found.get('message') or found.get('status')}")
        self.status = int(result.get("return_code") or 0)
        if result.get("status") == "TimeLimitExceeded":
            raise SandboxLost("no answer in time")
        output = str(result["stdout"]).encode(errors="surrogateescape")
        if len(output) > self.most:
            raise SandboxLost("it wrote more than it may")
        return output

    def _posted(self, body: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.service.url}/run_code", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=seconds + 5) as answer:
                found = json.load(answer)
        except (OSError, ValueError) as error:
            raise SandboxFailed(f"{self.service.url}: {error}") from None
        return found if isinstance(found, dict) else {}

    def end(self) -> None:
        """Nothing runs."""
