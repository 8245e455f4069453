"""The machine's ceilings, and what a process used."""

import time
from collections.abc import Callable
from pathlib import Path


def peak_megabytes() -> float:
    """The most memory that this process has held resident."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def best(work: Callable[[], object], seconds: float = 1.0) -> float:
    """The shortest time of one call, over about `seconds`."""
    work()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings() -> dict[str, float]:
    """GFLOP/s of square matrix products in float32 (by the faster of torch's two libraries) and bfloat16, where the processor has
    it; GB/s of a copy."""
    import torch

    from posttrain.models.products import bfloat16_is_slow, product

    found = {}
    works = [("float32, torch's product", torch.float32, torch.matmul), ("float32", torch.float32, product)]
    for name, dtype, work in [*works, *([] if bfloat16_is_slow() else [("bfloat16", torch.bfloat16, torch.matmul)])]:
        one, other = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        found[name] = 2 * 2048**3 / best(lambda work=work, one=one, other=other: work(one, other)) / 1e9
    source, target = torch.empty(1 << 26), torch.empty(1 << 26)
    found["copy"] = 2 * 4 * source.numel() / best(lambda: target.copy_(source)) / 1e9
    return found
