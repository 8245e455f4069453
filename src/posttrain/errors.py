"""What can go wrong, in the user's words. Each error carries the exit status that the command line ends with."""

import sysconfig
import traceback
from pathlib import Path


class PosttrainError(Exception):
    """Base of every error that is meant for the user; its message stands alone, without a traceback."""

    exit_status = 3


class InputError(PosttrainError, ValueError):
    """Something the user gave is wrong. Exit status 2; nothing has been changed."""

    exit_status = 2


class RecipeError(InputError):
    """A recipe that cannot be run: `file:line: path: what is wrong; remedy`."""


class DataError(InputError):
    """A data file that cannot be read: `file:line: what is wrong; remedy`."""


class TemplateError(InputError):
    """A chat template from which no honest training mask can be made."""


class ModelError(InputError):
    """A model folder that cannot be used."""


class RunError(PosttrainError):
    """A run that failed after it had begun; the last good checkpoint is left as it was. Exit status 3."""


class CheckpointError(PosttrainError):
    """A checkpoint that is damaged, or belongs to something else. Exit status 4."""

    exit_status = 4


def told(error: BaseException) -> str:
    """What a user's own code has raised, and where in it: `KeyError: 'text' (rewards.py:8)`."""
    ours = [Path(__file__).resolve().parent, *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib"))]
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and not any(Path(frame.filename).resolve().is_relative_to(each) for each in ours)
    ]  # fmt: skip
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}".rstrip(": ") + where
