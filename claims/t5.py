"""T5: a fine-tuned model is its base and one bit a weight: more than ten times smaller, and near in its logits. arXiv 2402.10193.

Small Llamas learn to write five letters as they stand or backwards, by chance, and from there, as their fine-tuning, always
backwards: of what the base can do, one thing is chosen. The difference is kept as signs and one scale a matrix
(`posttrain.models.delta`), as matrices of low rank in the same bits, the scales of both distilled by objective `match_logits`,
and rounded to 4 bits. Measured on letters that no training saw. Beside it ("new") is what fine-tuning must teach from nothing:
bases that have only learned to write the letters as they stand.
"""

import sys
from typing import Any

from claims.claim import Claim, Number, exact, main, number, shown, spread

MATRICES = 15.0
"""The matrices of the widest model take at most this part of their 16 bits."""
SEVEN, SEVEN_WITHIN = 10.10, 0.005
"""A Llama of 7 billion parameters, by the closed form, and how near."""
KL_SHARE = 0.2
"""KL(fine-tuned || delta) is below this share of KL(fine-tuned || base), for each seed."""
DROP = 0.02
"""The share of right answers falls by no more than this, by the mean over seeds."""
NORMAL, NORMAL_WITHIN = 0.3634, 0.01
"""What signs leave of a normal difference's square, and how near."""

CLAIM = Claim(
    "T5",
    "A fine-tuned model is its base and one bit a weight: > 10x smaller, and near in its logits",
    "arXiv 2402.10193",
    f"matrices ≥ {MATRICES:g}x smaller, Llama-2-7B {SEVEN:.2f}x by its sizes; the squared logit difference is lower after "
    f"distillation; KL to the fine-tuned model < {KL_SHARE:.0%} of the base's and below that of matrices of low rank in the same "
    f"bits; accuracy ≥ its own − {DROP:.0%}; a normal difference loses {NORMAL} ± {NORMAL_WITHIN:g}",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3], "widths": [64, 128, 256], "new": [256], "layers": 2, "base_steps": 400, "fine_steps": 300, "rate": 2e-3,
    "fine_rate": 1e-3, "rows": 64, "distil_steps": 200, "distil_rows": 32, "distil_rate": 1e-4, "seen": 5000, "held_out": 1000,
    "processes": 2,
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [101], "widths": [32], "new": [], "base_steps": 60, "fine_steps": 60, "distil_steps": 20,
    "distil_rate": 1e-3, "seen": 500, "held_out": 100, "processes": 1,
}  # fmt: skip
LETTERS, LENGTH = 26, 5
END, EQUALS = LETTERS, LETTERS + 1


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Each figure of each width, over seeds."""
    work = [(width, kind, seed) for kind in ("widths", "new") for width in settings[kind] for seed in settings["seeds"]]
    ordered = sorted(work, reverse=True)  # the widest first: they take longest
    found = dict(zip(ordered, spread(of_seed, [(*each, settings) for each in ordered], settings["processes"]), strict=True))
    numbers: dict[str, Number] = {"Llama-2-7B": exact(seven()), "left of a normal difference": number(normal(settings["seeds"]))}
    for width, kind, first in work:
        if first == settings["seeds"][0]:
            for name in found[width, kind, first]:
                said = f"{'new ' if kind == 'new' else ''}{width}: {name}"
                numbers[said] = number(found[width, kind, seed][name] for seed in settings["seeds"])
    return {"numbers": numbers, "curves": {"widths": settings["widths"]}}


def seven() -> float:
    from transformers import LlamaConfig

    from posttrain.compress.delta import sizes_of

    return sizes_of(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000)).ratio


def normal(seeds: list[int]) -> list[float]:
    """What signs leave of the square of a difference of normal draws."""
    import torch

    from posttrain import draws
    from posttrain.models.delta import Signs

    found = []
    for seed in seeds:
        difference = torch.from_numpy(draws.generator(seed, "T5", "normal").standard_normal((512, 512)))
        found.append(float((difference - Signs.of(difference).dense()).square().sum() / difference.square().sum()))
    return found


def rows_of(task: str, seed: int, count: int) -> list[Any]:
    """Random letters and what is to be written after them, as rendered rows: `copy`, `reverse`, or each of the two in turn."""
    from posttrain import draws
    from posttrain.text import RenderedRow

    found = []
    for index, letters in enumerate(draws.generator(seed, "T5", task).integers(0, LETTERS, (count, LENGTH)).tolist()):
        backwards = index % 2 if task == "either" else task == "reverse"
        tokens = [END, *letters, EQUALS, *(letters[::-1] if backwards else letters)]
        found.append(RenderedRow(((tokens, [False] * (LENGTH + 2) + [True] * LENGTH),)))
    return found


def of_seed(width: int, kind: str, seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """Trains a base, fine-tunes it, and measures every form of their difference. kind: "widths" (of the known), or "new"."""
    import torch
    from transformers import LlamaConfig

    from claims import strings
    from posttrain import draws
    from posttrain.batch import Sequences
    from posttrain.compress.delta import distances, remaining, sizes
    from posttrain.models.delta import Delta, LowRank, Signs, add
    from posttrain.models.load import fresh
    from posttrain.objectives import SFT

    torch.set_num_threads(1)
    tokens: Any = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": None}
    config = LlamaConfig(
        vocab_size=LETTERS + 2, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=settings["layers"],
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16, tie_word_embeddings=True, **tokens,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "T5", "weights") % 2**63)
        lm = fresh(config, strings.SOURCE)
    rows, asked_for = settings["rows"], settings["seen"] + settings["held_out"]
    known, reversed_ = rows_of("copy" if kind == "new" else "either", seed, settings["seen"]), rows_of("reverse", seed, asked_for)
    strings.learn(
        lm, {"policy": strings.learner(lm.model, settings["rate"])}, strings.row_updates(SFT(), known, rows, seed),
        settings["base_steps"],
    )  # fmt: skip
    fine, seen = strings.twin(lm), reversed_[: settings["seen"]]
    strings.learn(
        fine, {"policy": strings.learner(fine.model, settings["fine_rate"])}, strings.row_updates(SFT(), seen, rows, seed),
        settings["fine_steps"],
    )  # fmt: skip
    asked = Sequences.of([row.sequences[0] for row in reversed_[settings["seen"] :]])
    lm.requires_grad_(False)
    fine.requires_grad_(False)

    made = {"signs": Delta.between(lm.model, fine.model, Signs.of), "low rank": Delta.between(lm.model, fine.model, LowRank.of)}
    four = rounded_twin(lm, made["signs"], fine)
    left = [share for share in remaining(lm.model, fine.model, made["signs"]).values() if share is not None]
    found = {
        "matrices ratio": sizes(lm.model, made["signs"]).matrices_ratio,
        "whole ratio": sizes(lm.model, made["signs"]).ratio,
        "low rank matrices ratio": sizes(lm.model, made["low rank"]).matrices_ratio,
        "left of the difference": sum(left) / len(left),
        "accuracy fine": right(fine, asked),
    }
    for name, delta in made.items():
        add(lm.model, delta, name)

    def note(name: str, model: Any, which: str | None) -> None:
        from posttrain.models.delta import switched

        distance = distances(model, fine, [which], asked)[which]
        with switched(model.model, which):
            found[f"accuracy {name}"] = right(model, asked)
        found[f"kl {name}"], found[f"gap {name}"] = distance.kl.value, distance.logit_gap.value

    note("base", lm, None)
    note("4 bits", four, None)
    for name in made:
        note(f"{name} at first", lm, name)
        distil(lm, name, fine, seen, settings, seed)
        note(name, lm, name)
    return found


def distil(lm: Any, name: str, fine: Any, rows: list[Any], settings: dict[str, Any], seed: int) -> None:
    """Scale distillation: the scales of the delta move by AdamW, at a rate that falls by a cosine."""
    from claims import strings
    from posttrain.models.delta import held, switched
    from posttrain.models.roles import Frozen, Roles
    from posttrain.objectives import MatchLogits
    from posttrain.training.fit import Learner
    from posttrain.training.optim import AdamW

    scales = held(lm.model).deltas[name].scales
    for scale in scales.values():
        scale.requires_grad_(True)
    learner = Learner.of(scales, AdamW(learning_rate=settings["distil_rate"]))
    updates = strings.row_updates(MatchLogits(), rows, settings["distil_rows"], seed)
    with switched(lm.model, name):
        strings.learn(lm, {"policy": learner}, updates, settings["distil_steps"], Roles(teacher=Frozen(fine)))


def right(lm: Any, asked: Any) -> float:
    """The share of problems whose every token is the likeliest: those that greedy decoding answers rightly."""
    import torch

    with torch.no_grad():
        hit = lm.over_vocab(asked, lambda logits, target: (logits.argmax(-1) == target).float())
    wrong = torch.zeros(asked.count).index_add(0, asked.owner, 1 - hit)
    return float((wrong == 0).float().mean())


def rounded_twin(lm: Any, delta: Any, fine: Any) -> Any:
    """The base with its difference rounded to 4 bits, to nearest, a scale for each output; what else differs as in a delta."""
    import torch

    from claims import strings
    from posttrain.models.linears import below_head

    twin, made = strings.twin(lm), below_head(fine.model)
    with torch.no_grad():
        for path, layer in below_head(twin.model).items():
            difference = made[path].weight - layer.weight
            step = difference.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            layer.weight += step * (difference / step).round()
        for name, value in delta.whole.items():
            twin.model.get_parameter(name).copy_(value)
    return twin


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    width = widest(numbers)

    def seeds(name: str) -> list[float]:
        found: list[float] = numbers[f"{width}: {name}"]["seeds"]
        return found

    def below(name: str, other: str, share: float = 1.0) -> bool:
        return all(one < share * two for one, two in zip(seeds(name), seeds(other), strict=True))

    return {
        "matrices are smaller": min(seeds("matrices ratio")) >= MATRICES,
        "Llama-2-7B by its sizes": abs(numbers["Llama-2-7B"]["value"] - SEVEN) < SEVEN_WITHIN,
        "distillation brings the logits nearer": below("gap signs", "gap signs at first"),
        "near to the fine-tuned model": below("kl signs", "kl base", KL_SHARE),
        "as many right answers": drop(numbers, width, "signs")["value"] <= DROP,
        "a normal difference": abs(numbers["left of a normal difference"]["value"] - NORMAL) <= NORMAL_WITHIN,
        "nearer than low rank in the same bits": below("kl signs", "kl low rank"),
    }


def widest(numbers: dict[str, Number]) -> int:
    return max(int(name.partition(":")[0]) for name in numbers if name.partition(":")[0].isdigit())


def drop(numbers: dict[str, Number], width: int | str, form: str) -> Number:
    """What of the right answers is lost, paired by seed."""
    both = (numbers[f"{width}: accuracy {which}"]["seeds"] for which in ("fine", form))
    return number(fine - delta for fine, delta in zip(*both, strict=True))


def kl_share(numbers: dict[str, Number], width: int, form: str) -> Number:
    """KL to the fine-tuned model as a share of the base's, paired by seed."""
    both = (numbers[f"{width}: kl {which}"]["seeds"] for which in (form, "base"))
    return number(delta / base for delta, base in zip(*both, strict=True))


def say(numbers: dict[str, Number]) -> str:
    width = widest(numbers)
    at = {name.partition(": ")[2]: each for name, each in numbers.items() if name.startswith(f"{width}:")}
    forms = ("base", "signs at first", "signs", "low rank", "4 bits")
    kls = ", ".join(f"{name} {shown(at[f'kl {name}'], 4)}" for name in forms)
    news = sorted({int(name.partition(":")[0][4:]) for name in numbers if name.startswith("new ")})
    beside = "".join(
        f"; what is new to the base, width {each}: KL {shown(numbers[f'new {each}: kl base'])}, signs "
        f"{shown(numbers[f'new {each}: kl signs'])}, lost {shown(drop(numbers, f'new {each}', 'signs'))}"
        for each in news
    )
    return (
        f"width {width}: matrices {shown(at['matrices ratio'], 2)}x smaller, Llama-2-7B {shown(numbers['Llama-2-7B'], 2)}x; KL "
        f"to the fine-tuned model: {kls}; squared logit difference {shown(at['gap signs at first'])}, distilled "
        f"{shown(at['gap signs'])}; right {shown(at['accuracy fine'])}, lost {shown(drop(numbers, width, 'signs'))}{beside}"
    )


COLOURS = {"signs at first": "#E69F00", "signs": "#D55E00", "low rank": "#0072B2", "4 bits": "0.5"}


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(8, 3.2)
    left, middle = figure.subplots(1, 2)
    numbers, widths = found["numbers"], found["curves"]["widths"]
    for name, colour in COLOURS.items():
        kept = [kl_share(numbers, width, name) for width in widths]
        lost = [drop(numbers, width, name) for width in widths]
        for axes, row in ((left, kept), (middle, lost)):
            values, errors = [each["value"] for each in row], [2 * each["se"] for each in row]
            axes.errorbar(widths, values, errors, color=colour, marker="o", label=name)
    left.axhline(KL_SHARE, color="0.6", linestyle=":")
    middle.axhline(DROP, color="0.6", linestyle=":")
    left.set(xscale="log", yscale="log", xlabel="width", ylabel="KL to the fine-tuned model, share of the base's")
    middle.set(xscale="log", xlabel="width", ylabel="right answers lost")
    for axes in (left, middle):
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.minorticks_off()
    left.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
