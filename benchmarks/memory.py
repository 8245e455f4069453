"""What a training step holds in memory, and what its settings change: `python -m benchmarks.worker memory step '{...}'`.

step: {"tokens": 2048, "rows": 8, "gradient_checkpointing": false, "state": "full"}.
Sizes are in 10^6 bytes, those of the process in MiB.
"""

import time
from typing import Any

from benchmarks.machine import peak_megabytes
from benchmarks.models import SHAPES, model_folder

STEPS = 6


def step(
    shape: str = "4k", tokens: int = 2048, rows: int = 8, gradient_checkpointing: bool = False, state: str = "full"
) -> dict[str, Any]:
    """Forward, backward and optimizer step on random rows, every token trained: least seconds of each, and what it held."""
    import torch

    from posttrain.batch import Sequences
    from posttrain.models.load import load
    from posttrain.models.source import ModelSource
    from posttrain.training.optim import AdamW
    from posttrain.tuners import tuned

    lm = load(ModelSource(path=str(model_folder(shape)), gradient_checkpointing=gradient_checkpointing)).lm
    parameters = tuned(lm.model)
    optim = AdamW.model_validate({"state": state})
    optimizer = optim.build(parameters)
    draw = torch.Generator().manual_seed(0)
    length = tokens // rows
    drawn = [torch.randint(3, SHAPES[shape].vocabulary, (length,), generator=draw).tolist() for _ in range(rows)]
    seqs = Sequences.of([(row, [False] + [True] * (length - 1)) for row in drawn])
    weight = torch.full((rows * (length - 1),), -1 / (rows * (length - 1)))
    before = peak_megabytes()
    times: dict[str, list[float]] = {"forward and backward": [], "optimizer": []}
    for _ in range(STEPS):
        began = time.perf_counter()
        loss, _ = lm.weighted_sum(seqs, weight)
        loss.backward()
        between = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times["forward and backward"].append(between - began)
        times["optimizer"].append(time.perf_counter() - between)
    peak = peak_megabytes()
    means = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return {
        "weights": sum(each.nbytes for each in parameters.values()) / 1e6,
        "optimizer state": sum(value.nbytes for value in means) / 1e6,
        "held for the backward": held_for_the_backward(lm, seqs) / 1e6,
        "process before": before,
        "process at its highest": peak,
        **{f"seconds of {name}": min(found) for name, found in times.items()},
    }


def held_for_the_backward(lm: Any, seqs: Any) -> int:
    """Bytes of the tensors, other than weights, that the layers' forward keeps; each storage once."""
    import torch

    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = lm.hidden(seqs)
    del states
    return sum(each.nbytes() for each in found.values())
