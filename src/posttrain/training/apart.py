"""The process that samples for a trainer: `python -m posttrain.training.apart PIPE`, started by `posttrain.rl.behind`.

It makes the same model as the trainer, from the same settings, and is sent what the trainer has learned since.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def main(pipe: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to hear
    connection: Connection = Connection(pipe)
    task, state = connection.recv()
    drawer, parameters = begun(task)
    if state is not None:
        drawer.load(state)
    from posttrain.rl.behind import serve

    serve(connection, drawer, parameters, alone=lambda: os._exit(0))  # also out of a grader that hangs


def begun(task: dict[str, Any]) -> tuple[Any, Any]:
    """What draws, and the parameters that it draws with."""
    import torch

    from posttrain.models.roles import Roles
    from posttrain.training.settings import TrainSettings
    from posttrain.training.starting import drawer_of, starting_policy
    from posttrain.tuners import tuned

    torch.set_num_threads(task["threads"])
    settings = TrainSettings.model_validate(task["settings"])
    assert settings.task is not None
    loaded, template = starting_policy(settings, Path(task["folder"]), task["seed"])
    drawer = drawer_of(settings, loaded.lm, template, Roles(), settings.task.problems(), task["seed"])
    return drawer, tuned(loaded.lm.model)


if __name__ == "__main__":
    main(int(sys.argv[1]))
