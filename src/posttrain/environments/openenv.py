"""Environments that run as a server and speak OpenEnv's protocol: one WebSocket a session, JSON messages `reset` and `step`."""

import json
from contextlib import ExitStack
from typing import Any

from pydantic import Field, field_validator

from posttrain.environments.adapters import added, library
from posttrain.environments.environment import Environment, Episode, Opening, Turn
from posttrain.text import Message, Problem


class OpenEnvironment(Environment, kind="openenv"):
    """An environment behind OpenEnv's WebSocket (`/ws`): nothing of its code runs here.

    `reset` is sent the seed and the further columns of the problem.
    """

    url: str
    """Of the server, such as `http://localhost:8000`."""
    action: str = "message"
    """The field of an action that a turn of the policy fills."""
    fixed: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every action."""
    observation: str | None = None
    """The field of an observation that the policy is told; null: the observation as JSON, or its only text."""

    @field_validator("url")
    @classmethod
    def _is_of_the_web(cls, url: str) -> str:
        if not url.startswith(("http://", "https://", "ws://", "wss://")):
            raise ValueError(f"{url!r} is no address; write it like http://localhost:8000")
        return url

    def check(self) -> None:
        library("websockets", self.kind)

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Session(self, problem, seed)


class _Session(Episode):
    def __init__(self, settings: OpenEnvironment, problem: Problem, seed: int) -> None:
        self.settings = settings
        address = settings.url.replace("http", "ws", 1).rstrip("/") + "/ws"
        connect = library("websockets.sync.client", "openenv").connect
        self.open = ExitStack()
        self.socket = self.open.enter_context(connect(address, open_timeout=settings.seconds, max_size=None))
        try:
            begun = self._asked("reset", {"seed": seed % 2**31, **problem.facts})
            self.opening = Opening(added(problem, self._shown(begun["observation"])))
        except BaseException:
            self.close()
            raise

    def step(self, message: Message) -> Turn:
        found = self._asked("step", {**self.settings.fixed, self.settings.action: message.content})
        shown = Message("user", self._shown(found["observation"]))
        return Turn((shown,), float(found.get("reward") or 0.0), bool(found.get("done")))

    def _asked(self, what: str, data: dict[str, Any]) -> dict[str, Any]:
        self.socket.send(json.dumps({"type": what, "data": data}))
        found = json.loads(self.socket.recv(timeout=self.settings.seconds))
        if found.get("type") == "error":
            raise RuntimeError(f"the server says: {found['data'].get('message', found['data'])}")
        answer = found["data"]
        return answer if isinstance(answer, dict) else {"observation": answer}

    def _shown(self, observation: Any) -> str:
        if self.settings.observation is not None:
            return str(observation[self.settings.observation])
        texts = [each for each in observation.values() if isinstance(each, str)] if isinstance(observation, dict) else []
        return texts[0] if len(texts) == 1 else json.dumps(observation, ensure_ascii=False)

    def close(self) -> None:
        self.open.close()
