"""T7: what each tuner reaches with how many parameters, on three small real tasks: sentiment, common sense, arithmetic.

posttrain:tiny-base learns each task from short rows by `sft`, under every tuner at about the highest learning rate that is usual
for it, in equally many updates. Sentiment (sentences of film reviews) and common sense (questions with five choices) are
choices: the answer of the highest log-probability counts. Arithmetic (story problems of two steps) counts where the likeliest
token is right at every place of the solution, which is what greedy decoding writes. It is also learned from few rows, in full and
by biases.
"""

import gzip
import json
import sys
from typing import Any

from claims.claim import Claim, Number, exact, exceeds, main, number, shown, spread

POINT = 0.01
"""An adapter of at most SMALL of the parameters is at most so far below full fine-tuning, in the mean over tasks and seeds."""
SMALL = 0.05
CLOSE = 0.02
"""With few rows biases are within so much of full fine-tuning, in the mean over seeds."""

CLAIM = Claim(
    "T7",
    "Small adapters reach what full fine-tuning reaches; biases alone do for few rows and fall behind for many",
    "arXiv 1902.00751, 2106.10199",
    f"some adapter of ≤ {SMALL:.0%} of the parameters within {POINT * 100:g} point of full, mean over tasks; bitfit within "
    f"{CLOSE * 100:g} points of full from few rows, below it by 2 s.e. from many",
)
TUNERS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 8, "alpha": 16.0},
    "adapter 8": {"kind": "adapter", "size": 8},
    "adapter 64": {"kind": "adapter", "size": 64},
    "ia3": {"kind": "ia3"},
    "bitfit": {"kind": "bitfit", "add": True},
    "prompt": {"kind": "prompt", "tokens": 10},
    "prefix": {"kind": "prefix", "tokens": 10, "projection": None},
}
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3], "rows": {"sentiment": 256, "commonsense": 160, "arithmetic": 384}, "few": 32, "test": 200, "epochs": 3,
    "batch": 16, "longest": 40, "processes": 2,
    "rates": {
        "full": 3e-4, "lora": 2e-3, "adapter 8": 8e-3, "adapter 64": 3e-3, "ia3": 3e-2, "bitfit": 1e-2, "prompt": 0.1,
        "prefix": 3e-2,
    },
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [101], "rows": {"arithmetic": 32}, "few": 16, "test": 16, "epochs": 1, "processes": 1,
    "rates": {"full": 3e-4, "adapter 8": 2e-3, "bitfit": 5e-3},
}  # fmt: skip
Asked = tuple[str, list[str], int]
"""A prompt, the answers to choose among, and which is right; one answer alone is to be written."""


def shipped(name: str) -> list[dict[str, Any]]:
    from posttrain.paths import resolve

    content = resolve(f"posttrain:data/{name}").read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if name.endswith(".gz") else content).splitlines()]


def sentiment(part: str) -> list[Asked]:
    found = []
    for row in shipped(f"sentiment_{part}.jsonl.gz"):
        sentence = f"{row['prompt'][0]['content']} {row['completion'][0]['content']}"
        found.append((f"{sentence}\nThis is", [" negative", " positive"], int(row["label"] == "positive")))
    return found


def commonsense(part: str) -> list[Asked]:
    """The choices are listed, and the answer is the words of one."""
    found = []
    for row in shipped(f"commonsense_{part}.jsonl.gz"):
        listed = f"{row['question']}\n{', '.join(row['choices'])}?"
        found.append((listed, [f" {each}" for each in row["choices"]], row["labels"].index(row["answer"])))
    return found


def arithmetic(part: str) -> list[Asked]:
    ending = ".gz" if part == "train" else ""
    rows = [row for row in shipped(f"arith_{part}.jsonl{ending}") if row["steps"] == 2]
    return [(row["prompt"][0]["content"] + "\n", [row["solution"]], 0) for row in rows]


TASKS = {"sentiment": sentiment, "commonsense": commonsense, "arithmetic": arithmetic}


def data_of(rows: list[Asked]) -> Any:
    from posttrain.data.dataset import Data

    items = [{"prompt": prompt, "completion": answers[right]} for prompt, answers, right in rows]
    return Data.model_validate({"sources": {"kind": "inline", "items": items}, "format": "prompt_completion"})


def rendered(rows: list[Asked], template: Any) -> list[Any]:
    """As posttrain renders prompts with completions: plain text, the completion trained."""
    data = data_of(rows)
    found: list[Any] = data.render(data.read(), template).rows[0]
    assert len(found) == len(rows)
    return found


def chosen_rows(task: str, part: str, count: int, longest: int, template: Any, seed: int) -> list[Asked]:
    """`count` rows drawn from those whose prompts have at most `longest` tokens (and 24 more where they are not one sentence)."""
    from posttrain import draws

    most = longest + (0 if task == "sentiment" else 24)
    some = [row for row in TASKS[task](part) if len(template.tokenizer(row[0])["input_ids"]) <= most]
    order = draws.generator(seed, "T7", task, part).permutation(len(some))
    return [some[index] for index in order[:count].tolist()]


def accuracy(lm: Any, rows: list[Asked], template: Any) -> float:
    """The share of right choices, or of answers that greedy decoding would write as they are."""
    import torch

    from posttrain.batch import Sequences
    from posttrain.losses import sequence_sums

    several = [(prompt, answers, index) for prompt, answers, _ in rows for index in range(len(answers))]
    right = 0
    size = 64 * len(rows[0][1])
    made = rendered(several, template)
    for start in range(0, len(made), size):
        seqs = Sequences.of([each.sequences[0] for each in made[start : start + size]])
        with torch.no_grad():
            if len(rows[0][1]) == 1:
                hits = lm.over_vocab(seqs, lambda logits, wanted: (logits.argmax(-1) == wanted).float())
                wrong = sequence_sums(1 - hits, seqs.owner, seqs.count)
                right += int((wrong == 0).sum())
            else:
                sums = sequence_sums(lm.logprobs(seqs), seqs.owner, seqs.count)
                picked = sums.reshape(-1, len(rows[0][1])).argmax(1)
                first = start // len(rows[0][1])
                right += int((picked == torch.tensor([row[2] for row in rows[first : first + len(picked)]])).sum())
    return right / len(rows)


def of_run(seed: int, task: str, name: str, count: int, settings: dict[str, Any]) -> dict[str, float]:
    """One training: {"accuracy", "parameters"}; the base's own accuracy where the tuner is called so."""
    import torch

    from claims import strings
    from posttrain import draws
    from posttrain.data.render import Template
    from posttrain.objectives import SFT
    from posttrain.training.fit import Learner
    from posttrain.training.optim import AdamW
    from posttrain.tuners import Tuner, tuned
    from posttrain.tuners.load import load

    torch.set_num_threads(1)
    loaded = load("posttrain:tiny-base")
    lm, template = loaded.lm, Template(loaded.tokenizer, chat=False)
    test = chosen_rows(task, "test", settings["test"], settings["longest"], template, 0)
    whole = sum(each.numel() for each in lm.model.parameters())
    if name == "base":
        return {"accuracy": accuracy(lm, test, template), "parameters": 0, "whole": whole, "test": len(test)}
    learned = rendered(chosen_rows(task, "train", count, settings["longest"], template, seed), template)
    tuner = Tuner.model_validate(TUNERS[name])
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "T7", task, name) % 2**63)
        tuner.install(lm.model)
    parameters = tuned(lm.model)
    optim = AdamW(learning_rate=settings["rates"][name], schedule="linear", warmup=0.1)
    # few rows are seen as often as it takes to make half as many updates
    steps = max(len(learned), settings["rows"][task] // 2) * settings["epochs"] // settings["batch"]
    strings.learn(
        lm, {"policy": Learner.of(parameters, optim, tuner)}, strings.row_updates(SFT(), learned, settings["batch"], seed), steps
    )
    moved = sum(each.numel() for each in parameters.values())
    return {"accuracy": accuracy(lm, test, template), "parameters": moved, "whole": whole, "test": len(test)}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Over seeds: the accuracy of each tuner on each task, and how far it is below full fine-tuning."""
    tasks, names, seeds, few = list(settings["rows"]), list(settings["rates"]), settings["seeds"], settings["few"]
    work = [(seed, task, name, settings["rows"][task], settings) for task in tasks for name in names for seed in seeds]
    work += [(seed, "arithmetic", name, few, settings) for name in ("full", "bitfit") for seed in seeds]
    work += [(0, task, "base", 0, settings) for task in tasks]
    found = {each[:4]: one for each, one in zip(work, spread(of_run, work, settings["processes"]), strict=True)}
    numbers: dict[str, Number] = {}

    def scores(task: str, name: str, count: int | None = None) -> list[float]:
        rows = settings["rows"][task] if count is None else count
        return [found[seed, task, name, rows]["accuracy"] for seed in seeds]

    for task in tasks:
        numbers[f"{task}: base"] = exact(found[0, task, "base", 0]["accuracy"])
        numbers[f"{task}: test rows"] = exact(found[0, task, "base", 0]["test"])
    for name in names:
        one = found[seeds[0], tasks[0], name, settings["rows"][tasks[0]]]
        numbers[f"{name}: share of the parameters"] = exact(one["parameters"] / one["whole"])
        for task in tasks:
            numbers[f"{task}: {name}"] = number(scores(task, name))
        gaps = [[full - mine for full, mine in zip(scores(task, "full"), scores(task, name), strict=True)] for task in tasks]
        numbers[f"{name}: below full, mean over tasks"] = number(sum(each) / len(tasks) for each in zip(*gaps, strict=True))
    for name in ("full", "bitfit"):
        numbers[f"arithmetic, few rows: {name}"] = number(scores("arithmetic", name, few))
    for words, count in (("few", few), ("many", None)):
        both = zip(scores("arithmetic", "full", count), scores("arithmetic", "bitfit", count), strict=True)
        numbers[f"bitfit below full, {words} rows"] = number(full - mine for full, mine in both)
    return {"numbers": numbers, "curves": {"tasks": tasks, "names": names}}


def small_adapters(numbers: dict[str, Number]) -> list[str]:
    shares = {name.partition(":")[0]: each["value"] for name, each in numbers.items() if name.endswith("share of the parameters")}
    return [name for name, share in shares.items() if name.startswith("adapter") and share <= SMALL]


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    gaps = [numbers[f"{name}: below full, mean over tasks"] for name in small_adapters(numbers)]
    return {
        "a small adapter within a point of full": any(gap["value"] <= POINT for gap in gaps),
        "biases close to full from few rows": numbers["bitfit below full, few rows"]["value"] <= CLOSE,
        "biases below full from many rows": exceeds(numbers["bitfit below full, many rows"]),
    }


def say(numbers: dict[str, Number]) -> str:
    names = [name.partition(":")[0] for name in numbers if name.endswith("share of the parameters")]
    tasks = [name.partition(":")[0] for name in numbers if name.endswith(": base")]
    rows = [
        f"{name} ({numbers[f'{name}: share of the parameters']['value']:.2%}) "
        + ", ".join(shown(numbers[f"{task}: {name}"]) for task in tasks)
        for name in names
    ]
    base = ", ".join(shown(numbers[f"{task}: base"]) for task in tasks)
    few, many = (shown(numbers[f"bitfit below full, {words} rows"]) for words in ("few", "many"))
    return f"accuracy on {', '.join(tasks)}: untuned {base}; {'; '.join(rows)}. bitfit below full: few rows {few}, many {many}"


COLOURS = {"sentiment": "#0072B2", "commonsense": "#E69F00", "arithmetic": "#D55E00"}


def draw(figure: Any, found: dict[str, Any]) -> None:
    tasks, names, numbers = found["curves"]["tasks"], found["curves"]["names"], found["numbers"]
    figure.set_size_inches(3 * len(tasks), 3.4)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for name in names:
            share, one = numbers[f"{name}: share of the parameters"]["value"], numbers[f"{task}: {name}"]
            axes.errorbar([100 * share], [100 * one["value"]], [200 * one["se"]], color=COLOURS[task], marker="o", capsize=3)
            axes.annotate(name, (100 * share, 100 * one["value"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.axhline(100 * numbers[f"{task}: base"]["value"], color="0.7", linestyle=":", linewidth=1)
        axes.set(xscale="log", xlabel="parameters moved, % of the model's", title=task)
    panels[0].set(ylabel="accuracy, %, ± 2 s.e. (dotted: untuned)")


if __name__ == "__main__":
    main(sys.modules[__name__])
