"""Environments that others have written: Gymnasium's, TextArena's, and classes for TRL's `environment_factory`."""

import inspect
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from pydantic import Field, PrivateAttr, field_validator, model_validator

from posttrain.component import imported
from posttrain.environments.calls import Calls, JsonCalls
from posttrain.environments.environment import Environment, Episode, Opening, Turn
from posttrain.environments.tools import Function, ToolEnvironment, ToolEpisode
from posttrain.errors import RecipeError, told
from posttrain.text import Message, Problem


def library(name: str, for_what: str) -> Any:
    """An optional library. Raises RecipeError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise RecipeError(f"environment {for_what}: {error}; install it: pip install {name}") from None


def added(problem: Problem, text: str) -> tuple[Message, ...]:
    """The problem's prompt, with a text below its last message."""
    *before, last = problem.prompt
    return (*before, Message(last.role, f"{last.content}\n\n{text}" if last.content.strip() else text))


class GymnasiumEnvironment(Environment, kind="gymnasium"):
    """An environment of Gymnasium: its observations are what the policy is told, a turn of the policy is an action.

    A text space takes the turn as it is; any other needs `actions`, of which the last one named in the turn counts.
    """

    id: str
    """Its registered id, such as `FrozenLake-v1`; `my_package.module:MyEnv-v0` imports the module first."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of `gymnasium.make`."""
    actions: dict[str, Any] | None = None
    """What the policy may say, and the action that it stands for: `{left: 0, right: 1}`."""

    def check(self) -> None:
        gymnasium = library("gymnasium", self.kind)
        try:
            gymnasium.make(self.id, **self.arguments).close()
        except Exception as error:
            raise RecipeError(f"environment.id: {self.id!r} cannot be made: {' '.join(str(error).split())}") from None

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Gym(self, problem, seed)


class _Gym(Episode):
    def __init__(self, settings: GymnasiumEnvironment, problem: Problem, seed: int) -> None:
        self.settings = settings
        self.env = library("gymnasium", "gymnasium").make(settings.id, **settings.arguments)
        observation, _ = self.env.reset(seed=seed % 2**31, options=dict(problem.facts) or None)
        self.opening = Opening(added(problem, self._shown(observation)))

    def step(self, message: Message) -> Turn:
        action: Any = message.content
        if self.settings.actions is not None:
            words = "|".join(sorted(map(re.escape, self.settings.actions), key=len, reverse=True))
            named = re.findall(rf"(?<!\w)(?:{words})(?!\w)", message.content)
            if not named:
                return Turn((Message("user", f"Say one of: {', '.join(self.settings.actions)}."),), counts={"invalid": 1.0})
            action = self.settings.actions[named[-1]]
        observation, reward, ended, cut, _ = self.env.step(action)
        return Turn((Message("user", self._shown(observation)),), float(reward), bool(ended or cut))

    def _shown(self, observation: Any) -> str:
        seen = self.env.render() if self.env.render_mode == "ansi" else observation
        return str(seen).strip()

    def close(self) -> None:
        self.env.close()


class TextArenaEnvironment(Environment, kind="textarena"):
    """A game of TextArena. Games of several players need an `opponent`, who takes the other seats."""

    id: str
    """Such as `GuessTheNumber-v0`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Of `textarena.make`."""
    players: int = Field(default=1, ge=1)
    """Seats, of which the policy has the first."""
    opponent: str | None = None
    """`my_package.module:my_function`, from an observation (text) to an action (text)."""

    @model_validator(mode="after")
    def _somebody_plays(self) -> "TextArenaEnvironment":
        if (self.players > 1) != (self.opponent is not None):
            raise ValueError("players: several players need an `opponent`, and one needs none")
        return self

    @field_validator("opponent")
    @classmethod
    def _is_a_function(cls, path: str | None) -> str | None:
        if path is not None and not callable(imported(path)):
            raise ValueError(f"{path!r} is no function")
        return path

    def check(self) -> None:
        textarena = library("textarena", self.kind)
        if self.id not in textarena.envs.registration.ENV_REGISTRY:
            raise RecipeError(f"environment.id: TextArena {textarena.__version__} has no game {self.id!r}")

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _Arena(self, problem, seed)


class _Arena(Episode):
    def __init__(self, settings: TextArenaEnvironment, problem: Problem, seed: int) -> None:
        self.opponent: Callable[[str], str] | None = imported(settings.opponent) if settings.opponent else None
        self.env = library("textarena", "textarena").make(settings.id, **settings.arguments)
        self.env.reset(num_players=settings.players, seed=seed % 2**31)
        self.over = False
        self.opening = Opening(added(problem, self._until_our_turn() or ""))

    def step(self, message: Message) -> Turn:
        self.over, _ = self.env.step(action=message.content)
        seen = self._until_our_turn()
        if seen is not None:
            return Turn((Message("user", seen),))
        rewards, _ = self.env.close()
        return Turn(reward=float(rewards[0]), done=True)

    def _until_our_turn(self) -> str | None:
        """What we see when it is our turn; None where the game is over."""
        while not self.over:
            player, seen = self.env.get_observation()
            if player == 0 or self.opponent is None:
                return str(seen)
            self.over, _ = self.env.step(action=self.opponent(str(seen)))
        return None


class TrlEnvironment(ToolEnvironment, kind="trl"):
    """A class written for the `environment_factory` of TRL's GRPOTrainer: its public methods are tools, `reset` is given the
    columns of the problem, and `get_reward`, where it has one, is asked at the end."""

    factory: str
    """`my_package.module:MyEnvironment`, which is called without arguments."""
    calls: Calls = JsonCalls()
    """How calls are written."""
    tools: list[Any] = Field(default_factory=list, max_length=0)
    """None: the methods are the tools."""

    _made: Any = PrivateAttr(default=None)

    @field_validator("factory")
    @classmethod
    def _makes_environments(cls, path: str) -> str:
        factory = imported(path)
        if not callable(factory) or (inspect.isclass(factory) and not callable(getattr(factory, "reset", None))):
            raise ValueError(f"{path!r} is no class with a method `reset`")
        return path

    @property
    def pays(self) -> bool:
        factory = imported(self.factory)
        return not inspect.isclass(factory) or hasattr(factory, "get_reward")

    def check(self) -> None:
        try:
            tools_of(imported(self.factory)())
        except Exception as error:
            raise RecipeError(f"environment.factory: {self.factory} makes no environment: {told(error)}") from None

    def reset(self, problem: Problem, seed: int) -> Episode:
        return _OfTrl(imported(self.factory)(), problem, self)


class _OfTrl(ToolEpisode):
    def __init__(self, theirs: Any, problem: Problem, settings: TrlEnvironment) -> None:
        self.theirs = theirs
        columns = {**problem.facts, "prompt": [message.as_dict() for message in problem.prompt]}
        if problem.answer is not None:
            columns["answer"] = problem.answer
        told = theirs.reset(**taken(theirs.reset, columns))
        super().__init__(problem, {each.name: each for each in tools_of(theirs)}, settings)
        if told is not None:
            *before, last = self.opening.messages
            self.opening = Opening((*before, Message(last.role, last.content + str(told))), self.opening.tools)

    def finish(self) -> float:
        return float(self.theirs.get_reward()) if hasattr(self.theirs, "get_reward") else 0.0


def tools_of(theirs: Any) -> list[Function]:
    """The public methods of an object, but for those that are not the policy's to call."""
    methods = [name for name, _ in inspect.getmembers(type(theirs), inspect.isfunction) if not name.startswith("_")]
    for name in methods:
        if inspect.iscoroutinefunction(getattr(theirs, name)):
            raise TypeError(f"{name} is a coroutine; a tool is a plain method, which may call asyncio.run itself")
    return [Function.of(getattr(theirs, name)) for name in methods if name not in {"reset", "get_reward"}]


def taken(function: Callable[..., Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the columns that a function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(columns)
    return {each.name: columns[each.name] for each in parameters if each.name in columns}
