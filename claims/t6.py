"""T6: at the same number of learned tokens, a prefix of keys and values learns what vectors in front of the text cannot.

A tiny Llama has learned two tasks on strings of digits, told apart by a sign: `=` asks for the string reversed, `>` for its
digits sorted. Then it is frozen, and soft tokens learn a third one under a sign that it has never seen: `+` asks for the string
reversed where its first digit is below 5, else for its digits sorted. The tuners `prefix` (keys and values in every layer),
`prompt` (vectors in front) and, as infix, `p_tuning` (vectors between question and sign) learn from the same rows, equally long.
"""

import sys
from typing import TYPE_CHECKING, Any

from claims.claim import Claim, Number, exceeds, main, number, shown, spread

if TYPE_CHECKING:
    import numpy as np

GAP = 0.0
"""The loss of `prompt` is above that of `prefix` by more than this, by two standard errors (paired by seed), for p <= FEW."""
FEW = 5
"""The numbers of tokens for which a gap is asked for; for more of them only the order of the means."""

CLAIM = Claim(
    "T6",
    "A prefix in every layer learns at least as much as the same number of vectors in front of the text, or within it",
    "arXiv 2101.00190",
    f"held-out loss of prefix ≤ prompt for every p, by more than 2 s.e. for p ≤ {FEW}; of prefix ≤ infix for every p",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3], "tokens": [1, 5, 10, 20], "base_steps": 700, "steps": 150, "batch": 32, "rows": 8192, "held_out": 512,
    "rates": {"prefix": 0.1, "prompt": 0.1, "infix": 3e-3}, "base_rate": 3e-3, "processes": 2,
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [101], "tokens": [1, 2], "base_steps": 20, "steps": 6, "batch": 16, "rows": 256, "held_out": 64,
    "processes": 1,
}  # fmt: skip
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip
DIGITS = 6


def drawn(draw: "np.random.Generator", sign: str) -> tuple[str, str]:
    """A question and its answer under one of the three signs."""
    string = "".join(map(str, draw.integers(0, 10, DIGITS)))
    reversed_ = sign == "=" or (sign == "+" and string[0] < "5")
    return string + sign, string[::-1] if reversed_ else "".join(sorted(string))


def known(draw: "np.random.Generator") -> tuple[str, str]:
    return drawn(draw, "=>"[draw.integers(2)])


def new(draw: "np.random.Generator") -> tuple[str, str]:
    return drawn(draw, "+")


def tuner_of(method: str, tokens: int) -> Any:
    from posttrain.tuners import Prefix, Prompt, PTuning

    if method == "prefix":
        return Prefix(tokens=tokens, projection=None)
    return Prompt(tokens=tokens) if method == "prompt" else PTuning(tokens=tokens, at=[1 + DIGITS])


def of_seed(seed: int, settings: dict[str, Any]) -> dict[str, float]:
    """{`base`, and each method with its tokens: held-out loss on the new task}"""
    import torch

    from claims import symbols
    from posttrain.tuners import Full

    torch.set_num_threads(1)
    learned = symbols.rows(known, settings["rows"], seed, "known")
    rows = symbols.rows(new, settings["rows"] + settings["held_out"], seed, "new")
    learn, held_out = rows[settings["held_out"] :], rows[: settings["held_out"]]
    base = symbols.write_model(seed, **SHAPE)
    symbols.tune(base, Full(), learned, settings["base_steps"], settings["batch"], settings["base_rate"], seed)
    others = symbols.rows(known, settings["held_out"], seed, "other")
    found = {"base, known tasks": symbols.nll(base, others), "base": symbols.nll(base, held_out)}
    for method, rate in settings["rates"].items():
        for tokens in settings["tokens"]:
            lm = symbols.twin(base)
            symbols.tune(lm, tuner_of(method, tokens), learn, settings["steps"], settings["batch"], rate, seed)
            found[f"{method} {tokens}"] = symbols.nll(lm, held_out)
    return found


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Over seeds: the loss of each method for each number of tokens, and by how much it is above that of the prefix."""
    found = spread(of_seed, [(seed, settings) for seed in settings["seeds"]], settings["processes"])
    numbers: dict[str, Number] = {name: number(each[name] for each in found) for name in found[0]}
    for method in ("prompt", "infix"):
        for tokens in settings["tokens"]:
            gaps = [each[f"{method} {tokens}"] - each[f"prefix {tokens}"] for each in found]
            numbers[f"{method} over prefix {tokens}"] = number(gaps)
    return {"numbers": numbers, "curves": {"tokens": settings["tokens"]}}


def tokens_of(numbers: dict[str, Number]) -> list[int]:
    return [int(name.split()[1]) for name in numbers if name.startswith("prefix ")]


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    sizes = tokens_of(numbers)
    return {
        "prefix at least as good as prompt": all(numbers[f"prompt over prefix {size}"]["value"] >= 0 for size in sizes),
        f"by more than 2 s.e. for p up to {FEW}": all(
            exceeds(numbers[f"prompt over prefix {size}"], GAP) for size in sizes if size <= FEW
        ),
        "prefix at least as good as infix": all(numbers[f"infix over prefix {size}"]["value"] >= 0 for size in sizes),
    }


def say(numbers: dict[str, Number]) -> str:
    sizes = tokens_of(numbers)
    parts = [f"{method} {', '.join(shown(numbers[f'{method} {size}']) for size in sizes)}" for method in METHODS]
    return f"held-out loss (nats a token), p = {', '.join(map(str, sizes))}: {'; '.join(parts)}; untuned {shown(numbers['base'])}"


METHODS = {
    "prefix": ("prefix", "#0072B2"), "prompt": ("prompt", "#E69F00"), "infix": ("infix (p_tuning before the sign)", "#D55E00"),
}  # fmt: skip


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(6.8, 3.2)
    axes = figure.subplots()
    sizes, numbers = found["curves"]["tokens"], found["numbers"]
    for method, (label, colour) in METHODS.items():
        each = [numbers[f"{method} {size}"] for size in sizes]
        values, errors = [one["value"] for one in each], [2 * one["se"] for one in each]
        axes.errorbar(sizes, values, errors, color=colour, marker="o", markersize=4, capsize=3, label=label)
    axes.set(xscale="log", xlabel="learned tokens p", ylabel="held-out loss, nats a token, ± 2 s.e.", ylim=(0, None))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


if __name__ == "__main__":
    main(sys.modules[__name__])
