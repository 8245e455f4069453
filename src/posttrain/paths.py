"""Where files named in a recipe lie: `posttrain:NAME` is an asset of the package, anything else a path."""

from pathlib import Path

PREFIX = "posttrain:"
ASSETS = Path(__file__).parent / "assets"


def resolve(name: str) -> Path:
    """The path that a recipe means by `name`; `~` is the home directory."""
    if name.startswith(PREFIX):
        return ASSETS / name.removeprefix(PREFIX)
    return Path(name).expanduser()


def named(path: Path) -> str:
    """How a message or a record names a file: assets by their prefix, so that no machine's path is written down."""
    return PREFIX + path.relative_to(ASSETS).as_posix() if path.is_relative_to(ASSETS) else str(path)
