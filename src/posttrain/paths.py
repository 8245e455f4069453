"""Where files named in a recipe lie: `posttrain:NAME` is an asset of the package, anything else a path."""

from pathlib import Path

from posttrain.errors import InputError

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


def free_place(out: Path) -> None:
    """Makes the folder that `out` is to lie in. Raises InputError where something is at `out` already, or that cannot be."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out}: is there already, and is not overwritten; name another place, or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: the folder for it cannot be made: {error.strerror}; name another place") from None
