"""What environments and tools are made of in tests; run with `mcp`, a server of tools."""

import contextlib
import json
import os
import sys
import threading

import gymnasium

PYTHON = sys.executable
LIVING = []
RELEASED = threading.Event()
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<call>", "close": "</call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|im_end\|>", "content": "text"},
    },
}  # fmt: skip


def weather(city: str, days: int = 1) -> dict:
    """Tells the weather.

    Args:
        city: Where
        days: For how many days
    """
    return {city: {"Bern": [20, 21, 19]}[city][:days]}


def unclear(city):
    return city


async def later(completions, **columns):
    return [1.0] * len(completions)


def never(completions, **columns):
    RELEASED.clear()
    RELEASED.wait(30)


class Corridor(gymnasium.Env):
    """Three places in a row; the last is the end."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Text(20)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 0
        return "place 0", {}

    def step(self, action):
        self.place = max(0, self.place + (1 if action == 1 else -1))
        return f"place {self.place}", (1.0 if self.place == 2 else -0.5), self.place == 2, False, {}


gymnasium.register("Corridor-v0", entry_point=Corridor, disable_env_checker=True)


def first_free(seen):
    """The first cell of the board that nobody has."""
    board = seen[seen.rindex("Current Board") :] if "Current Board" in seen else seen
    return next(f"[{cell}]" for cell in range(9) if f" {cell} " in board)


class Counter:
    """Counts to the answer; written as TRL wants it."""

    def reset(self, answer, **columns):
        self.goal, self.count = int(answer), 0
        return f" Count to {answer}."

    def add(self, amount: int) -> int:
        """Adds to the count.

        Args:
            amount: How much
        """
        self.count += amount
        return self.count

    def _secret(self):
        raise AssertionError

    def get_reward(self):
        return float(self.count == self.goal)


class Nothing:
    pass


class Free:
    """Pays nothing."""

    def reset(self, **columns):
        return None


class Late(Free):
    async def price(self, thing: str) -> str:
        """Its price.

        Args:
            thing: Of what
        """
        return thing


class Demanding(Free):
    def __init__(self, needed):
        self.needed = needed


class Unsaid(Free):
    def price(self, thing: str) -> str:
        return thing


ASKED = {}


def by_length(prompts, completions, level, answer, **columns):
    ASKED.update(prompts=prompts, completions=completions, **columns)
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    numbers = zip(texts, level, answer, strict=True)
    return [None if text == "none" else len(text) + step + int(gold) for text, step, gold in numbers]


def too_few(prompts, completions, **columns):
    return [1.0]


def bad(prompts, completions, **columns):
    return [1 / 0]


@contextlib.contextmanager
def openenv_server():
    """A server that speaks OpenEnv's protocol: it echoes, louder, and is done at `b`. Yields its address and what it was sent."""
    from websockets.sync.server import serve

    log = []

    def session(socket):
        level = 0
        for text in socket:
            message = json.loads(text)
            log.append(message)
            data = message["data"]
            if message["type"] == "reset":
                level = data["level"]
                answer = {"observation": {"echo": "hello"}, "reward": None, "done": False}
            elif data.get("text") == "crash":
                socket.send(json.dumps({"type": "error", "data": {"message": "it crashed", "code": "EXECUTION_ERROR"}}))
                continue
            else:
                over = data["text"] == "b"
                answer = {"observation": {"echo": f"{data['text'].upper()}{level}"}, "reward": float(over), "done": over}
            socket.send(json.dumps({"type": "observation", "data": answer}))

    with serve(session, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}", log
        server.shutdown()


def serve_tools():
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    server = MCPServer("tools")

    @server.tool()
    def double(number: int) -> int:
        """Twice a number."""
        return 2 * number

    @server.tool()
    def fail(number: int) -> int:
        """Does not work."""
        raise ToolError("not today")

    @server.tool()
    def leave(number: int) -> int:
        """Takes the server with it."""
        os._exit(number)

    server.run()


if __name__ == "__main__" and sys.argv[1:] == ["mcp"]:
    serve_tools()
