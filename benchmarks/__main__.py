"""`python -m benchmarks [--only sft-4k grpo ...] [--rounds 3]`: interleaved runs, checked against each other, as one table.

Every measurement is a process of its own; a round runs each engine of a work once, in turn; ratios are taken within a round, and
their median is shown. A ratio is shown only where the losses of the two engines agree.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import ceilings
from benchmarks.models import HOME, SHAPES, model_folder
from benchmarks.pairs import ALPHA, RANK, reward_folder
from benchmarks.sft import size_of_work
from benchmarks.start import BINARIES, ROWS, write_rows
from benchmarks.tuners import TUNERS
from posttrain.models.products import bfloat16_is_slow

THREADS = "2"
KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
WARM = 2  # steps of a run that are not timed
PLAIN = {"gradient_checkpointing": False}
LORA = {"tuner": {"kind": "lora", "rank": RANK, "alpha": ALPHA}}
FREE = {**PLAIN, "padding_free": True, "max_length": None}


@dataclass(frozen=True)
class Engine:
    """One side of a comparison: a function of benchmarks.<module>, with options."""

    name: str
    function: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def halves(self) -> bool:
        """Whether it multiplies in bfloat16: TRL's default."""
        return self.options.get("dtype") == "mixed" if self.function == "posttrain" else bool(self.options.get("bf16", True))


@dataclass(frozen=True)
class Work:
    """The same work by several engines. The first is ours; `default` is TRL's own setting; `exact` is its float32 one.

    Where the machine has no bfloat16, those that multiply in it are left out, and the default is the first of TRL's that remains.
    """

    name: str
    module: str
    shape: str
    steps: int
    engines: tuple[Engine, ...]
    default: str = "TRL default"
    exact: str = "TRL padding-free float32"
    options: dict[str, Any] = field(default_factory=dict)  # of every engine
    unit: str = "tokens"


def sft(shape: str, steps: int, *others: Engine) -> Work:
    ours = (Engine("posttrain mixed", "posttrain", {"dtype": "mixed"}), Engine("posttrain float32", "posttrain"))
    exact = Engine("TRL padding-free float32", "trl", {**FREE, "bf16": False})
    return Work(
        f"SFT, {shape} vocabulary", "sft", shape, steps,
        (*ours, Engine("TRL default", "trl"), Engine("TRL padding-free", "trl", FREE), exact, *others),
    )  # fmt: skip


def grpo(shape: str, steps: int, what: str, group: int = 8, prompt: int = 0) -> Work:
    whole = {"per_device_train_batch_size": 32}
    engines = (
        Engine("posttrain mixed", "posttrain", {"dtype": "mixed"}),
        Engine("posttrain float32", "posttrain"),
        Engine("TRL default", "trl", whole),
        Engine("TRL default, 4 x 8 samples at a time", "trl"),
        Engine("TRL without checkpointing", "trl", {**PLAIN, **whole}),
        Engine("TRL default, float32", "trl", {**whole, "bf16": False}),
        Engine("TRL without checkpointing, float32", "trl", {**PLAIN, **whole, "bf16": False}),
    )
    sizes = f"{32 // group} prompts{f' of {prompt} tokens' if prompt else ''} x {group} samples x at most 128 tokens"
    name = f"GRPO, {shape.partition('-')[0]} vocabulary, {sizes}: {what}"
    return Work(name, "grpo", shape, steps, engines, options={"group": group, "prompt": prompt})


def pairs(shape: str, steps: int, work: str, name: str, ours: dict[str, Any], theirs: dict[str, Any], *others: Engine) -> Work:
    """DPO or a reward model on HH rows."""
    engines = (
        Engine("posttrain mixed", "posttrain", {"dtype": "mixed", **ours}),
        *others,
        Engine("posttrain float32", "posttrain", ours),
        Engine("TRL default", "trl", theirs),
        Engine("TRL without checkpointing", "trl", {**PLAIN, **theirs}),
        Engine("TRL without checkpointing, float32", "trl", {**PLAIN, "bf16": False, **theirs}),
    )
    return Work(name, "pairs", shape, steps, engines, exact=engines[-1].name, options={"work": work}, unit="pairs")


WORKS = {
    "sft-4k": sft("4k", 20, Engine("TRL without checkpointing", "trl", PLAIN)),
    "sft-32k": sft("32k", 10),
    "sft-128k": sft("128k", 6),
    "grpo-4k": grpo("4k", 5, "none ends before its 128 tokens"),
    "grpo-4k-taught": grpo("4k-taught", 6, "a model whose answers end by themselves"),
    "grpo-4k-g4": grpo("4k", 5, "none ends before its 128 tokens", group=4),
    "grpo-4k-g16": grpo("4k", 5, "none ends before its 128 tokens", group=16),
    "grpo-4k-long-g4": grpo("4k", 4, "none ends before its 128 tokens", group=4, prompt=512),
    "grpo-4k-long-g8": grpo("4k", 4, "none ends before its 128 tokens", prompt=512),
    "grpo-4k-long-g16": grpo("4k", 4, "none ends before its 128 tokens", group=16, prompt=512),
    "grpo-32k": grpo("32k", 3, "none ends before its 128 tokens"),
    "dpo-4k": pairs("4k", 10, "dpo", "DPO on HH, 4k vocabulary", {}, {}),
    "dpo-4k-lora": pairs("4k", 10, "dpo", "DPO with LoRA on HH, 4k vocabulary", LORA, {"lora": True}),
    "dpo-4k-cached": pairs(
        "4k", 10, "dpo", "DPO with cached references on HH, 4k vocabulary", {"reference": {"cache": True}},
        {"precompute_ref_log_probs": True},
    ),
    "reward-4k": pairs(
        "4k", 10, "reward", "reward model on HH, 4k vocabulary", {}, {},
        Engine("posttrain mixed, 2,048 tokens at a time", "posttrain", {"dtype": "mixed", "batch": {"micro_tokens": 2048}}),
    ),
}


def measured(module: str, function: str, options: dict[str, Any]) -> dict[str, Any]:
    """What one process of benchmarks.worker prints."""
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "GOMP_SPINCOUNT": "1000", "BENCHMARK_BEGAN": str(time.time())}
    for name in KERNELS:  # posttrain sets them when it is imported, as its users have it; the others keep their default
        environment.pop(name, None)
        if not function.startswith("posttrain"):
            environment[name] = "1024"
    command = [sys.executable, "-m", "benchmarks.worker", module, function, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rate(run: dict[str, Any]) -> float:
    """Useful tokens a second, the first steps left out."""
    return sum(run["tokens"][WARM:]) / sum(run["seconds"][WARM:])


def gap(one: list[float], other: list[float]) -> float:
    """The largest relative difference of the losses of the first ten steps; infinite where one is not a number."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(one[:10], other[:10], strict=True)]
    return max(gaps) if all(map(math.isfinite, gaps)) else math.inf


def compare(work: Work, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs a work and prints its table; returns everything measured."""
    engines = [engine for engine in work.engines if not (engine.halves and bfloat16_is_slow())]
    runs: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
    for turn in range(rounds):
        for engine in engines:
            print(f"{work.name}: round {turn + 1} of {rounds}: {engine.name}", file=sys.stderr, flush=True)
            options = {"shape": work.shape, "steps": work.steps, **work.options, **engine.options}
            runs[engine.name].append(measured(work.module, engine.function, options))
    agree, why = agreement(work, runs)
    trl = [name for name in runs if name.startswith("TRL")]
    best = max(trl, key=lambda name: median(map(rate, runs[name])))
    default = work.default if work.default in runs else trl[0]
    say(f"\n**{work.name}** ({why})\n")
    say(f"| engine | {work.unit}/s | peak MB | of TRL's default | of TRL's best | peak of default's |")
    say("|---|---|---|---|---|---|")
    for name, found in runs.items():
        speed, peak = median(map(rate, found)), median(each["peak"] for each in found)
        cells = ["", "", ""]
        if name.startswith("posttrain") and agree:
            cells = [
                f"{median(rate(a) / rate(b) for a, b in zip(found, runs[default], strict=True)):.2f}",
                f"{median(rate(a) / rate(b) for a, b in zip(found, runs[best], strict=True)):.2f}",
                f"{median(a['peak'] / b['peak'] for a, b in zip(found, runs[default], strict=True)):.2f}",
            ]
        label = f"{name} (TRL's best)" if name == best else name
        shown = f"{speed:.2f}" if work.unit == "pairs" else f"{speed:,.0f}"
        say(f"| {label} | {shown} | {peak:,.0f} | {' | '.join(cells)} |")
    if not agree:
        say("\nNo ratio is shown: the engines did not compute the same thing.")
    return {"runs": runs, "agree": agree, "why": why}


def agreement(work: Work, runs: dict[str, list[dict[str, Any]]]) -> tuple[bool, str]:
    """Whether the engines did the same work, and how nearly."""
    if work.module == "grpo":
        found = measured("grpo", "agreement", {"shape": work.shape})
        # or: as near to float64 as TRL is, about; float32 itself knows the gradient of some models no better
        near = found["gradient"] < 1e-6 or found["ours"] < 2 * found["theirs"] < 2e-5
        agree = found["loss"] < 1e-6 and near
        ours = "posttrain mixed" if "posttrain mixed" in runs else "posttrain float32"
        mismatch = runs[ours][0]["mismatch"]
        return agree, (
            f"on a batch from TRL, float32: loss differs by {found['loss']:.1g}, the gradient by {found['gradient']:.1g} "
            f"(ours {found['ours']:.1g} from float64, TRL's {found['theirs']:.1g}); "
            f"{ours.removeprefix('posttrain ')}: sampler's log-probs {mismatch:.1g} from the trainer's"
        )
    if "posttrain mixed" not in runs:
        off = max(gap(a["losses"], b["losses"]) for a, b in zip(runs["posttrain float32"], runs[work.exact], strict=True))
        return off < 1e-5, f"losses of ten steps differ by {off:.1g} in float32"
    exact, mixed, ours, theirs = (
        max(gap(a["losses"], b["losses"]) for a, b in zip(runs[one], runs[other], strict=True))
        for one, other in (
            ("posttrain float32", work.exact), ("posttrain mixed", "TRL default"),
            ("posttrain mixed", "posttrain float32"), ("TRL default", work.exact),
        )
    )  # fmt: skip
    if work.module == "pairs":  # a pair's loss sees the rounding of two whole answers: ours may be no larger than twice TRL's
        told = f"in bf16, ours is {ours:.1g} from float32, TRL's {theirs:.1g}"
        return exact < 1e-5 and ours < 2 * theirs, f"losses of ten steps differ by {exact:.1g} in float32; {told}"
    return exact < 1e-5 and mixed < 1e-3, f"losses of ten steps differ by {exact:.1g} in float32, {mixed:.1g} in bf16"


def shares(work: Work, result: dict[str, Any], top: dict[str, float], say: Callable[[str], None]) -> None:
    """The share of the machine's peak that goes into useful work."""
    sizes = size_of_work(work.shape, work.steps)[WARM:]
    flops = sum(SHAPES[work.shape].flops(*each) for each in sizes)
    for name, kind in (("posttrain float32", "float32"), ("posttrain mixed", "bfloat16"), ("TRL default", "bfloat16")):
        if name not in result["runs"]:
            continue
        speed = max(flops / sum(run["seconds"][WARM:]) for run in result["runs"][name]) / 1e9
        say(f"| {work.name} | {name} | {speed:,.0f} | {top[kind]:,.0f} ({kind}) | {speed / top[kind]:.0%} |")


def sampling(say: Callable[[str], None]) -> dict[str, Any]:
    """Tokens a second beside transformers' own generation."""
    engines = {
        "posttrain float32": ("posttrain", {}),
        "posttrain mixed": ("posttrain", {"dtype": "mixed"}),
        "generate, float32": ("generate", {}),
        "generate, bfloat16": ("generate", {"bf16": True}),
        "continuous batching": ("continuous", {}),
    }
    if bfloat16_is_slow():
        del engines["posttrain mixed"], engines["generate, bfloat16"]
    found: dict[str, dict[int, float]] = {name: {} for name in engines}
    sizes = (1, 8, 32, 128)
    for rows in sizes:
        for name, (function, options) in engines.items():
            if function == "continuous" and rows not in (8, 32):
                continue
            print(f"sampling {rows}: {name}", file=sys.stderr, flush=True)
            run = measured("sampling", function, {"shape": "4k", "rows": rows, **options})
            found[name][rows] = max(a / b for a, b in zip(run["tokens"], run["seconds"], strict=True))
    say("\n**Sampling, tokens/s** (4k vocabulary, 128 tokens each)\n")
    say("| engine | " + " | ".join(f"batch {rows}" for rows in sizes) + " |")
    say("|---|" + "---|" * len(sizes))
    for name, row in found.items():
        say(f"| {name} | " + " | ".join(f"{row[rows]:,.0f}" if rows in row else "–" for rows in sizes) + " |")
    return found


def tuners(say: Callable[[str], None]) -> dict[str, Any]:
    """What training holds under tuners that move little: the peak, of full fine-tuning's and of TRL's with peft."""
    steps, shape, dtype = 3, "wide", "float32" if bfloat16_is_slow() else "mixed"
    settings = {what: {"shape": shape, "steps": steps, "what": what, "dtype": dtype} for what in TUNERS}
    ours = {what: measured("tuners", "posttrain", asked) for what, asked in settings.items()}
    theirs = {what: measured("tuners", "trl", asked) for what, asked in settings.items() if what != "bitfit"}  # peft has none
    say(f"\n**Memory by what moves** (SFT, {SHAPES[shape].layer_weights / 1e6:,.0f}M weights in the layers, {dtype})\n")
    say("| tuner | peak MB | of full | tokens/s | TRL with peft, peak MB | ours of it | our speed of its | losses apart by |")
    say("|---|---|---|---|---|---|---|---|")
    for what, run in ours.items():
        cells = [f"{run['peak']:,.0f}", f"{run['peak'] / ours['full']['peak']:.2f}", f"{rate(run):,.0f}"]
        if what in theirs:
            other = theirs[what]
            off = gap(run["losses"][:1], other["losses"][:1])
            same = [f"{run['peak'] / other['peak']:.2f}", f"{rate(run) / rate(other):.2f}"] if off < 1e-3 else ["", ""]
            cells += [f"{other['peak']:,.0f}", *same, f"{off:.1g}"]
        say(f"| {what} | {' | '.join(cells + ['–'] * (7 - len(cells)))} |")
    return {"posttrain": ours, "TRL": theirs}


def start(say: Callable[[str], None]) -> dict[str, Any]:
    """How long a user waits."""
    model = str(model_folder("4k"))
    write_rows()
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text(f"model: {model}\nobjective: sftt\ndata: {ROWS}\n")
        commands = {
            "`posttrain --help`": [BINARIES / "posttrain", "--help"],
            "`posttrain run` of a wrong recipe, refused": [BINARIES / "posttrain", "run", wrong],
            "`trl sft --help`": [BINARIES / "trl", "sft", "--help"],
        }
        found = {}
        for name, command in commands.items():
            times = []
            for _ in range(6):
                began = time.perf_counter()
                subprocess.run(list(map(str, command)), capture_output=True)
                times.append(time.perf_counter() - began)
            found[name] = median(times[1:])
    first = {
        "posttrain_command": "`posttrain run`: to its first training step",
        "trl_command": "`trl sft`: to its first training step",
        "posttrain": "`posttrain.train` in a script: to its first training step",
        "trl": "TRL's `SFTTrainer` in a script: to its first training step",
    }
    for function, name in first.items():
        found[name] = median(measured("start", function, {"model": model})["first"] for _ in range(5))
    say("\n**Start**\n\n| | seconds |\n|---|---|")
    for name, seconds in found.items():
        say(f"| {name} | {seconds:.2f} |")
    return found


OTHERS = {"tuners": tuners, "sampling": sampling, "start": start}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*WORKS, *OTHERS], default=[*WORKS, *OTHERS])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    HOME.mkdir(parents=True, exist_ok=True)
    for shape in (*SHAPES, "4k-taught"):
        model_folder(shape)
    reward_folder("4k")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    if bfloat16_is_slow():
        say("This CPU has no instructions for bfloat16, TRL's default: everything is measured in float32.")
    top, results = ceilings(), {}
    for name in asked.only:
        if name in WORKS:
            results[name] = compare(WORKS[name], asked.rounds, say)
    top = {name: max(value, top[name]) for name, value in ceilings().items()}
    if any(WORKS[name].module == "sft" for name in results):
        say("\n**Share of the machine's peak on useful work**\n")
        say("| work | engine | GFLOP/s | peak | share |\n|---|---|---|---|---|")
        for name, result in results.items():
            if WORKS[name].module == "sft":
                shares(WORKS[name], result, top, say)
    for name, section in OTHERS.items():
        if name in asked.only:
            results[name] = section(say)
    say(f"\n{THREADS} threads; copy {top['copy']:.0f} GB/s; {asked.rounds} rounds.")
    (HOME / "results.json").write_text(json.dumps({"ceilings": top, **results}, indent=1))
    (HOME / "results.md").write_text("\n".join(lines) + "\n")
    if any(not result["agree"] for name, result in results.items() if name in WORKS):
        sys.exit(1)


if __name__ == "__main__":
    main()
