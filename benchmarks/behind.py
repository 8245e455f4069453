"""Sampling beside learning against one after the other: `python -m benchmarks.behind [--steps 80] [--seeds 1]`.

The quickstart's GRPO from its SFT model: in one process with all cores, and with a sampler in a process of its own, half of the
cores each. Both are evaluated on the 500 test problems.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import Listener, run

QUICKSTART = Path(__file__).resolve().parent.parent / "recipes" / "quickstart.yaml"
SAMPLES = 32 * 8  # of a rollout of the quickstart
SAMPLERS = {"one process": "in_process", "two processes": {"kind": "process"}}


def recipe(steps: int, seed: int) -> str:
    """The quickstart's stages base, sft and grpo, the last once for each sampler, without validation."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))
    stages = found["stages"]
    grpo = {name: value for name, value in stages["grpo"].items() if name != "validation"} | {"steps": steps}
    kept = {"sft": stages["sft"]}
    for name, sampler in SAMPLERS.items():
        short = name.replace(" ", "_")
        kept[short] = {**grpo, "sampler": sampler}
        kept[f"{short}_test"] = {**stages["grpo_test"], "model": {"stage": short}}
    return json.dumps({"title": "behind", "seed": seed, "stages": kept})


def figures(folder: Path) -> tuple[int, float]:
    """Sampled tokens, and seconds, of a training after its first three updates."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][3:]
    tokens = sum(row["length"] for row in rows) * SAMPLES
    return round(tokens), sum(row["time"]["seconds"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    print("| sampler | seed | pass@1 | sampled tokens a second |\n|---|---|---|---|")
    for seed in range(asked.seeds):
        with tempfile.TemporaryDirectory() as root:
            found = run(Recipe.parse(recipe(asked.steps, seed), name="behind"), Path(root), Listener())
            for name in SAMPLERS:
                short = name.replace(" ", "_")
                right = json.loads((found.folders[f"{short}_test"] / "done.json").read_text())["metrics"]["pass@1"]
                tokens, seconds = figures(found.folders[short])
                shown = f"{right['value']:.1%} ({right['low']:.1%} to {right['high']:.1%})"
                print(f"| {name} | {seed} | {shown} | {tokens / seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
