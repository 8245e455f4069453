"""What can go wrong, in the user's words. Each error carries the exit status that the command line ends with."""


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
