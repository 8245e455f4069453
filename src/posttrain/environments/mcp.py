"""Tools of MCP servers (Model Context Protocol), by the protocol's own library."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from pydantic import Field, PositiveFloat, model_validator

from posttrain.environments.adapters import library
from posttrain.environments.tools import Function, Tool, Unavailable


class McpTool(Tool, kind="mcp"):
    """The tools of an MCP server: a command that is started and spoken to by its pipes, or an address.

    All episodes share one session, so a server that keeps state keeps it across them.
    """

    command: list[str] = Field(default_factory=list)
    """Starts the server: `[python, -m, my_server]`."""
    url: str | None = None
    """Of a server that is running (streamable HTTP)."""
    only: list[str] | None = None
    """The tools to offer; null: all."""
    seconds: PositiveFloat = 30.0
    """The longest that the server may take to answer."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "McpTool":
        if bool(self.command) == (self.url is not None):
            raise ValueError("give `command` (to start a server) or `url` (of one that runs)")
        return self

    def check(self) -> None:
        library("mcp", "tools: mcp")

    def functions(self) -> list[Function]:
        server = _Server(self)
        listed = server.ask(server.client.list_tools()).tools
        missing = set(self.only or ()) - {tool.name for tool in listed}
        if missing:
            has = ", ".join(tool.name for tool in listed)
            raise RuntimeError(f"the MCP server has no tool {', '.join(sorted(missing))}; it has {has}")
        return [self._function(server, tool) for tool in listed if self.only is None or tool.name in self.only]

    def _function(self, server: "_Server", tool: Any) -> Function:
        about = {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}

        def call(**arguments: Any) -> str:
            found = server.ask(server.client.call_tool(tool.name, arguments))
            said = "\n".join(part.text for part in found.content if getattr(part, "text", None) is not None)
            if found.is_error:
                raise ValueError(said)
            return said

        return Function({"type": "function", "function": about}, call)


class _Server:
    """A session that lives in a thread of its own, and is asked from any."""

    def __init__(self, settings: McpTool) -> None:
        self.settings = settings
        self.client: Any = None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, daemon=True, name="mcp").start()
        if not self._ready.wait(settings.seconds) or self._error is not None:
            what = self.settings.url or " ".join(self.settings.command)
            raise RuntimeError(f"the MCP server {what!r} cannot be reached: {self._error or 'no answer in time'}")

    def _run(self) -> None:
        self._loop.run_until_complete(self._live())

    async def _live(self) -> None:
        mcp = library("mcp", "tools: mcp")
        target: Any = self.settings.url
        if self.settings.command:
            target = mcp.StdioServerParameters(command=self.settings.command[0], args=self.settings.command[1:])
        try:
            async with mcp.Client(target, read_timeout_seconds=self.settings.seconds) as self.client:
                self._ready.set()
                await asyncio.Event().wait()  # until the process ends
        except Exception as error:
            self._error = error
            self._ready.set()

    def ask(self, question: Coroutine[Any, Any, Any]) -> Any:
        """Raises Unavailable where the server does not answer; ValueError for what it answers with an error."""
        if self._error is not None:
            question.close()
            raise Unavailable(f"the MCP server has ended: {self._error}")
        try:
            return asyncio.run_coroutine_threadsafe(question, self._loop).result(self.settings.seconds)
        except library("mcp", "tools: mcp").MCPError as error:
            from mcp import types

            if error.code in {types.CONNECTION_CLOSED, types.REQUEST_TIMEOUT}:
                raise Unavailable(f"the MCP server does not answer: {error}") from None
            raise ValueError(str(error)) from None
        except Exception as error:
            raise Unavailable(f"the MCP server does not answer: {type(error).__name__}: {error}") from None
