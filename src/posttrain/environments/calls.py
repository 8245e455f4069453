"""How a policy writes calls of tools: from its text to names and arguments."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from posttrain.answer import fenced
from posttrain.component import Component
from posttrain.errors import RecipeError
from posttrain.text import Message

if TYPE_CHECKING:
    from posttrain.data.render import Template

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's name and its arguments; or, in `wrong`, why what stands there is no call."""

    name: str
    arguments: Mapping[str, Any]
    wrong: str | None = None


class Calls(Component):
    """How calls are written."""

    def prepare(self, template: "Template") -> None:
        """Called once, with the tokenizer of the policy."""

    def check_tools(self, tools: Sequence[Schema]) -> None:
        """Raises RecipeError where a tool cannot be called so."""

    def parse(self, text: str, tools: Sequence[Schema]) -> list[Call]:
        """The calls in a turn of the policy, in order; none where it only talks."""
        raise NotImplementedError


class JsonCalls(Calls, kind="json"):
    """`<tool_call>{"name": "calculator", "arguments": {"expression": "2 * 3"}}</tool_call>`, as Hermes and Qwen write them."""

    opening: str = "<tool_call>"
    """What stands before a call."""
    closing: str = "</tool_call>"
    """What stands behind it."""

    def parse(self, text: str, tools: Sequence[Schema]) -> list[Call]:
        found = []
        for piece in text.split(self.opening)[1:]:
            inside, closed, _ = piece.partition(self.closing)
            found.append(_from_json(inside) if closed else Call("", {}, f"a call is not closed with {self.closing}"))
        return found


class TagCalls(Calls, kind="tag"):
    """`<calculator>2 * 3</calculator>`: the tool's name as a tag, and in it the text that is its one argument.

    Few tokens, and learned from few examples. Only for tools with one argument that is text.
    """

    def check_tools(self, tools: Sequence[Schema]) -> None:
        one_argument(self.kind, tools)

    def parse(self, text: str, tools: Sequence[Schema]) -> list[Call]:
        arguments = {tool["function"]["name"]: list(tool["function"]["parameters"]["properties"]) for tool in tools}
        tag = re.compile(rf"<({'|'.join(map(re.escape, arguments))})>")
        found = []
        for name, piece in zip(*[iter(tag.split(text)[1:])] * 2, strict=True):
            inside, closed, _ = piece.partition(f"</{name}>")
            if closed:
                found.append(Call(name, {arguments[name][0]: inside}))
            else:
                found.append(Call(name, {}, f"a call is not closed with </{name}>"))
        return found


class FenceCalls(Calls, kind="fence"):
    """A fenced block whose language is the name of a tool, such as ```python; the block is its one argument."""

    def check_tools(self, tools: Sequence[Schema]) -> None:
        one_argument(self.kind, tools)

    def parse(self, text: str, tools: Sequence[Schema]) -> list[Call]:
        arguments = {tool["function"]["name"]: list(tool["function"]["parameters"]["properties"]) for tool in tools}
        known = [block for block in fenced(text) if block.closed and len(arguments.get(block.language, ())) == 1]
        return [Call(block.language, {arguments[block.language][0]: block.text}) for block in known]


def one_argument(kind: str, tools: Sequence[Schema]) -> None:
    for tool in tools:
        name, takes = tool["function"]["name"], len(tool["function"]["parameters"]["properties"])
        if takes != 1:
            raise RecipeError(f"environment.calls: {kind}: {name} takes {takes} arguments, and such a call holds one; take json")


class TemplateCalls(Calls, kind="template"):
    """As the model's tokenizer says (its `response_template`, in transformers 5): any form that its makers chose."""

    _template: Any = PrivateAttr(default=None)
    _prompt: str = PrivateAttr(default="")

    def prepare(self, template: "Template") -> None:
        if getattr(template.tokenizer, "response_template", None) is None:
            raise RecipeError(
                "environment.calls: template: the tokenizer has no `response_template` that says how its model writes calls; "
                "take another kind (json is that of Hermes and Qwen), or save one with the tokenizer"
            )
        self._template, self._prompt = template, template.decode(template.prompt([Message("user", "")]))

    def parse(self, text: str, tools: Sequence[Schema]) -> list[Call]:
        whole = text + self._template.decode([self._template.end_id])  # which closes the last part
        try:
            message = self._template.tokenizer.parse_response(whole, prefix=self._prompt, tools=[dict(tool) for tool in tools])
        except ValueError as error:
            return [Call("", {}, str(error))]
        called = [each.get("function", each) for each in message.get("tool_calls") or ()]
        return [_checked(each.get("name"), each.get("arguments")) for each in called]


def _from_json(text: str) -> Call:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"a call is no JSON: {error}")
    if not isinstance(found, dict):
        return Call("", {}, "a call is a JSON object with `name` and `arguments`")
    return _checked(found.get("name"), found.get("arguments", found.get("parameters", {})))


def _checked(name: Any, arguments: Any) -> Call:
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call(str(name), {}, "a call has a `name` (text) and `arguments` (an object)")
    return Call(name, arguments)
