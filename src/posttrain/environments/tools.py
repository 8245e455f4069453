"""Tools: functions that a policy may call before it answers. A turn without a call is its answer."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt, PrivateAttr, field_validator

from posttrain.component import Component, did_you_mean, imported
from posttrain.environments.calls import Call, Calls, JsonCalls
from posttrain.environments.environment import Environment, Episode, Opening, Turn
from posttrain.errors import RecipeError
from posttrain.expressions import decimal, expression
from posttrain.sandbox import Bubblewrap, Sandbox, SandboxFailed, SandboxLost, slot
from posttrain.text import Message, Problem

if TYPE_CHECKING:
    from posttrain.data.render import Template


class Unavailable(Exception):
    """A tool cannot be asked, whatever it is asked: the episode has failed."""


@dataclass(frozen=True)
class Function:
    """A function with its schema, in OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""

    schema: Mapping[str, Any]
    call: Callable[..., Any]

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])

    @classmethod
    def of(cls, function: Callable[..., Any]) -> "Function":
        """With a schema made of its annotations and its docstring (Google style). Raises ValueError where they say too little."""
        from transformers.utils import get_json_schema

        try:
            return cls(get_json_schema(function), function)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"the tool {function.__name__} needs annotated arguments and a docstring with an `Args:` section that describes "
                f"each: {reason}"
            ) from None


class Tool(Component):
    """One function that can be called, or several."""

    def check(self) -> None:
        """What can be known to be wrong before any weight is loaded; raises an InputError."""

    def functions(self) -> list[Function]:
        """Asked for once, before the first episode."""
        raise NotImplementedError


def schema_of(name: str, about: str, argument: str, about_argument: str) -> dict[str, Any]:
    """Of a function that takes one text."""
    properties = {argument: {"type": "string", "description": about_argument}}
    takes = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": takes}}


class Calculator(Tool, kind="calculator"):
    """Exact arithmetic: + - * / and brackets. Nothing is evaluated by Python."""

    name: str = "calculator"
    """What the policy calls it."""

    def functions(self) -> list[Function]:
        about = schema_of(self.name, "Works out an arithmetic expression.", "expression", "For example 2 * (3 + 4)")
        return [Function(about, self._call)]

    def _call(self, expression: str) -> str:
        return calculate(expression)


def calculate(text: str) -> str:
    """The value of an arithmetic expression. Raises ValueError where it is none."""
    found = expression(text, signs=True)
    if found is None:
        raise ValueError("this is no arithmetic expression, or it divides by zero")
    return decimal(found[0])


class Python(Tool, kind="python"):
    """Runs a program in a sandbox, and gives back what it writes; what its last line is worth is written, too. Each call starts
    anew."""

    name: str = "python"
    """What the policy calls it."""
    sandbox: Sandbox = Field(default_factory=Bubblewrap)
    """Where programs run, and what they may take."""
    most: PositiveInt = 2000
    """Characters of what was written that the policy is shown: the last ones."""

    def check(self) -> None:
        self.sandbox.check()

    def functions(self) -> list[Function]:
        about = schema_of(self.name, "Runs a Python program and returns what it prints.", "code", "The program")
        return [Function(about, self._call)]

    def _call(self, code: str) -> str:
        with slot() as number:
            running = self.sandbox.start("guest", 2 * number)
            try:
                running.send({"code": f"_program = {code!r}\n{SHOWING}", "input": ""})
                written = running.everything().decode(errors="replace")
            except SandboxLost as error:
                written = f"the program was ended: {error}"
            finally:
                running.end()
        return written if len(written) <= self.most else f"...{written[-self.most :]}"


SHOWING = """
def _run(program):
    import ast, sys
    space = {"__name__": "__main__"}
    try:
        tree = ast.parse(program, "<code>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass
    except BaseException as error:
        line, trace = None, error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "<code>" else line
            trace = trace.tb_next
        print(f"{type(error).__name__}: {error}" + (f" (line {line})" if line else ""))
_run(_program)
"""


class FunctionTool(Tool, kind="function"):
    """A Python function of one's own, with annotated arguments and a docstring; what it raises, the policy is told."""

    path: str
    """`my_package.module:my_function`."""

    @field_validator("path")
    @classmethod
    def _can_be_called(cls, path: str) -> str:
        function = imported(path)
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise ValueError(f"{path!r} is no plain function")
        return path

    def check(self) -> None:
        try:
            self.functions()
        except ValueError as error:
            raise RecipeError(f"{self.path}: {error}") from None

    def functions(self) -> list[Function]:
        return [Function.of(imported(self.path))]


class ToolEnvironment(Environment, kind="tools"):
    """The policy may call tools; it is told what they give, and goes on. Its first turn without a call ends the episode, and is
    what the task's grader judges."""

    tools: list[Tool] = Field(min_length=1)
    """What may be called."""
    calls: Calls = JsonCalls()
    """How calls are written."""
    describe: Literal["template", "system", "none"] = "template"
    """How the policy learns of its tools: by its chat template; by their schemas in a system message; not at all, where it was
    taught them or the problem's text says it."""
    most_calls: PositiveInt = 8
    """The most calls in one turn; further ones are not made, and it is told so."""

    _functions: dict[str, Function] = PrivateAttr(default_factory=dict)

    @property
    def pays(self) -> bool:
        return False

    def check(self) -> None:
        for tool in self.tools:
            tool.check()

    def prepare(self, template: "Template") -> None:
        self.calls.prepare(template)
        if self._functions:  # a server is started once
            return
        found = [function for tool in self.tools for function in tool.functions()]
        names = [each.name for each in found]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RecipeError(f"environment.tools: two tools are called {twice!r}; rename one")
        self.calls.check_tools([each.schema for each in found])
        self._functions.update(zip(names, found, strict=True))

    def reset(self, problem: Problem, seed: int) -> Episode:
        return ToolEpisode(problem, self._functions, self)


class ToolEpisode(Episode):
    """functions: what may be called in this episode, by name."""

    def __init__(self, problem: Problem, functions: Mapping[str, Function], settings: ToolEnvironment) -> None:
        self.functions, self.settings = functions, settings
        self.schemas = [each.schema for each in functions.values()]
        messages = problem.prompt
        if settings.describe == "system":
            messages = with_system(messages, described(self.schemas))
        self.opening = Opening(messages, tuple(self.schemas) if settings.describe == "template" else ())

    def step(self, message: Message) -> Turn:
        calls = self.settings.calls.parse(message.content, self.schemas)
        if not calls:
            return Turn(done=True)
        said = [self._answered(call) for call in calls[: self.settings.most_calls]]
        said += [(f"error: more than {self.settings.most_calls} calls in one turn", False)] * (len(calls) > len(said))
        counts = {"tool_calls": float(len(calls)), "tool_errors": float(sum(not good for _, good in said))}
        return Turn(tuple(Message("tool", text) for text, _ in said), counts=counts)

    def _answered(self, call: Call) -> tuple[str, bool]:
        """What the policy is told, and whether all went well."""
        if call.wrong is not None:
            return f"error: {call.wrong}", False
        if call.name not in self.functions:
            return f"error: there is no tool {call.name!r}{did_you_mean(call.name, self.functions)}", False
        try:
            found = self.functions[call.name].call(**call.arguments)
            return (found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)), True
        except (SandboxFailed, Unavailable):  # nothing that the policy has done
            raise
        except Exception as error:  # a tool of a user's that fails: the policy is told, and may mend its call
            return f"error: {error}" if isinstance(error, ValueError) else f"error: {type(error).__name__}: {error}", False


def described(schemas: Sequence[Mapping[str, Any]]) -> str:
    """Tools in the words of a system message, as Hermes has them."""
    listed = "\n".join(json.dumps(dict(schema), ensure_ascii=False) for schema in schemas)
    return f"You may call these tools:\n<tools>\n{listed}\n</tools>"


def with_system(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """With a text in the system message: behind the one that is there, else in a new one."""
    if messages[0].role == "system":
        return (Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)
