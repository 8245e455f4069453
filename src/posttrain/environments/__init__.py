"""Environments: what answers a policy, turn by turn."""

from posttrain.environments.adapters import GymnasiumEnvironment, TextArenaEnvironment, TrlEnvironment
from posttrain.environments.environment import Environment, Episode, Opening, Turn
from posttrain.environments.games import GuessNumber, Rooms
from posttrain.environments.mcp import McpTool
from posttrain.environments.openenv import OpenEnvironment
from posttrain.environments.tools import Tool, ToolEnvironment

__all__ = [
    "Environment", "Episode", "GuessNumber", "GymnasiumEnvironment", "McpTool", "OpenEnvironment", "Opening", "Rooms",
    "TextArenaEnvironment", "Tool", "ToolEnvironment", "TrlEnvironment", "Turn",
]  # fmt: skip
