"""T16: the best of n by a reward model: how far from the reference, and where more is less. arXiv 2401.01879, 2210.10760.

Everything is exact: with F the distribution of the proxy's score under the reference, the best of n has a score at most s with
probability F(s)^n, and equal scores share by the reference's probabilities; so KL and expected gold reward are sums over all
strings of claims/strings.py. One check draws: samples of the real sampler, the best of each n by the reward model.

The gold reward has a hump: the first letter `a` is worth 2, the second costs 1, each further one 2. Strings with two and more are
5% of the reference's: a reward model of few comparisons has hardly seen any, and takes more for better.
"""

import math
import sys
from typing import Any

from claims.claim import Claim, Number, exact, exceeds, main, number, shown, spread

BOUND = 1e-9
"""The exact KL of best-of-n exceeds ln n - (n - 1) / n by no more than this, anywhere (rounding)."""
TIGHT = 0.05
"""In a large response space without ties the KL is within this share of the bound, for every n up to 1,024."""
DRAWN = 4.0
"""The gold reward of the best of n drawn samples is within this many standard errors of the exact one, for every n."""
FALL = 0.0
"""With few pairs the gold reward falls from the peak of its mean over seeds to the largest n by more than this, by two standard
errors of the difference (paired by seed)."""
DELAY = 0.0
"""With many pairs the peak's log2 n is larger than with few by more than this, by two standard errors (paired by seed)."""

CLAIM = Claim(
    "T16",
    "The KL of best-of-n is at most ln n - (n - 1) / n; by a reward model of few comparisons the gold reward peaks and then "
    "falls, and more comparisons delay the peak",
    "arXiv 2401.01879, 2210.10760",
    f"KL ≤ bound everywhere, ties included; within {TIGHT:.0%} of it in a space of 2^20 answers; with few pairs gold falls after "
    "its peak by more than 2 s.e.; with many pairs the peak comes at a larger n by more than 2 s.e.",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3, 4, 5, 6, 7, 8], "worth": [0, 2, 1, -1, -3, -5], "reference_steps": 300,
    "pairs": {"few": 256, "middle": 1024, "many": 8192}, "epochs": 6, "rows": 32, "rate": 1e-3,
    "largest": 16, "space": 2**20, "drawn": 8192, "processes": 2,
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [103], "pairs": {"few": 256, "many": 512}, "space": 2**16, "drawn": 512,
    "processes": 1,
}  # fmt: skip


def bound(n: int) -> float:
    return math.log(n) - (n - 1) / n


class BestOf:
    """The best of n under a reference (log-probabilities, float64) by a score; equal scores share by the reference."""

    def __init__(self, logp: Any, score: Any) -> None:
        import torch

        self.shares = logp.exp() / logp.exp().sum()
        levels, self.level = score.unique(return_inverse=True)
        self.mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, self.level, self.shares)
        self.below = torch.cat([torch.zeros(1, dtype=torch.float64), self.mass.cumsum(0).clamp(max=1)[:-1]])
        self.upto = torch.cat([self.below[1:], torch.ones(1, dtype=torch.float64)])

    def levels(self, n: int) -> Any:
        """The probability that the best of n has each score."""
        return self.upto**n - self.below**n

    def kl(self, n: int) -> float:
        won = self.levels(n)
        some = (won > 0) & (self.mass > 0)
        return float((won[some] * (won[some] / self.mass[some]).log()).sum())

    def mean(self, values: Any, n: int) -> float:
        """The expected value of the best of n."""
        import torch

        totals = torch.zeros_like(self.mass).index_add(0, self.level, self.shares * values)
        return float((self.levels(n) * totals / self.mass.clamp(min=1e-300)).sum())


def of_seed(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """For each number of pairs the gold reward, the proxy's score and the KL of every n; and the check by drawing."""
    import torch

    from claims import strings

    torch.set_num_threads(1)
    ref = strings.reference(seed, settings["reference_steps"])
    logp = strings.distribution(ref)
    gold = torch.tensor(settings["worth"], dtype=torch.float64)[strings.counted().long()]
    compared, _ = strings.comparisons(logp, gold, max(settings["pairs"].values()), seed)
    sizes = [2**place for place in range(settings["largest"] + 1)]
    found: dict[str, Any] = {"gold": {}, "kl": {}}
    for name, count in settings["pairs"].items():
        updates = count * settings["epochs"] // settings["rows"]
        proxy = strings.reward_model(ref, compared[:count], updates, settings["rows"], settings["rate"], seed)
        best = BestOf(logp, strings.scores(proxy))
        found["gold"][name] = [best.mean(gold, n) for n in sizes]
        found["kl"][name] = [best.kl(n) for n in sizes]
        if name == "few":
            found["drawn"] = by_drawing(ref, proxy, settings, seed, best, gold)
    tied = BestOf(logp, gold)  # six different rewards for all strings
    found["kl"]["gold itself, tied"] = [tied.kl(n) for n in sizes]
    return found


Drawn = dict[int, tuple[float, float]]


def by_drawing(ref: Any, proxy: Any, settings: dict[str, Any], seed: int, best: BestOf, gold: Any) -> Drawn:
    """{n: (gold reward of the best of n drawn samples minus the exact one, its standard error)}, the samples in groups of n."""
    import torch

    from claims import strings
    from posttrain.batch import Sequences
    from posttrain.sampling import InProcess, Sampling, sample
    from posttrain.text import Message, Problem

    problem = Problem("string", (Message("user", ""),))
    samples = sample(
        InProcess(), ref, strings.Alphabet(), [problem], settings["drawn"], Sampling(max_tokens=strings.LONGEST), seed  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        scores = proxy.scores_of_many(Sequences.of([(one.tokens, one.sampled) for one in samples]), 1 << 15)
    worth = torch.tensor([settings["worth"][one.tokens.count(strings.WANTED)] for one in samples], dtype=torch.float64)
    found = {}
    for n in (1, 4, 16, 64):
        groups = scores[: len(scores) // n * n].reshape(-1, n)
        won = worth[: groups.numel()].reshape(-1, n).gather(1, groups.argmax(1, keepdim=True))[:, 0]
        found[n] = (float(won.mean()) - best.mean(gold, n), float(won.std() / len(won) ** 0.5))
    return found


def large_space(seed: int, size: int, largest: int) -> list[float]:
    """KL over bound for n = 2, 4, ..., 2^largest: random answers of random probabilities, all scores different."""
    import numpy as np
    import torch

    from posttrain import draws

    draw = draws.generator(seed, "T16", "space")
    shares = torch.from_numpy(draw.gamma(1.0, size=size))
    best = BestOf((shares / shares.sum()).log(), torch.from_numpy(draw.permutation(np.arange(float(size)))))
    return [best.kl(2**place) / bound(2**place) for place in range(1, largest + 1)]


TIED = "KL over bound, gold itself (ties), n = 1024"


def means(rows: list[list[float]]) -> list[float]:
    """Column by column."""
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Over seeds: gold reward of every n, where it peaks and how far it falls; KL over its bound."""
    found = spread(of_seed, [(seed, settings) for seed in settings["seeds"]], settings["processes"])
    sizes = [2**place for place in range(settings["largest"] + 1)]
    numbers: dict[str, Number] = {}
    curves: dict[str, Any] = {"n": sizes}
    for name in settings["pairs"]:
        golds = [each["gold"][name] for each in found]
        numbers[f"{name}: log2 n of the peak"] = number(gold.index(max(gold)) for gold in golds)
        numbers[f"{name}: gold at the peak"] = number(max(gold) for gold in golds)
        numbers[f"{name}: fall after the peak"] = number(max(gold) - gold[-1] for gold in golds)
        curves[f"gold {name}"] = golds
        gold = means(golds)
        top = gold.index(max(gold))  # of the mean: a fall from each seed's own peak is never negative
        numbers[f"{name}: log2 n of the mean's peak"] = exact(top)
        numbers[f"{name}: fall from the mean's peak"] = number(each[top] - each[-1] for each in golds)
    few, many = (numbers[f"{name}: log2 n of the peak"]["seeds"] for name in ("few", "many"))
    numbers["delay of the peak, log2 n"] = number(late - early for early, late in zip(few, many, strict=True))
    kinds = list(found[0]["kl"])
    above = [kl - bound(n) for each in found for kind in kinds for kl, n in zip(each["kl"][kind], sizes, strict=True)]
    numbers["largest KL minus bound"] = exact(max(above))
    largest = [large_space(seed, settings["space"], 10) for seed in settings["seeds"]]
    numbers["largest gap to the bound in a large space"] = exact(max(abs(1 - each) for row in largest for each in row))
    numbers[TIED] = number(each["kl"]["gold itself, tied"][10] / bound(1024) for each in found)
    gaps = [abs(gap) / error for each in found for gap, error in each["drawn"].values()]
    numbers["drawn minus exact, standard errors"] = exact(max(gaps))
    curves |= {f"kl {kind}": means([each["kl"][kind] for each in found]) for kind in kinds}
    curves["kl large space"] = [share * bound(n) for share, n in zip(means(largest), sizes[1:], strict=False)]
    return {"numbers": numbers, "curves": curves}


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    return {
        "KL at most the bound": numbers["largest KL minus bound"]["value"] <= BOUND,
        "KL near the bound in a large space": numbers["largest gap to the bound in a large space"]["value"] <= TIGHT,
        "drawn samples agree with the exact sums": numbers["drawn minus exact, standard errors"]["value"] <= DRAWN,
        "with few pairs gold peaks, then falls": exceeds(numbers["few: fall from the mean's peak"], FALL),
        "more pairs delay the peak": exceeds(numbers["delay of the peak, log2 n"], DELAY),
    }


def say(numbers: dict[str, Number]) -> str:
    parts = [
        f"{name} pairs: peak at 2^{shown(numbers[f'{name}: log2 n of the peak'], 1)}, then a fall of "
        f"{shown(numbers[f'{name}: fall after the peak'], 2)}"
        for name in ("few", "many")
    ]
    return (
        f"KL − bound ≤ {numbers['largest KL minus bound']['value']:.0e}; in the large space within "
        f"{numbers['largest gap to the bound in a large space']['value']:.0e} of it, with six tied rewards "
        f"{shown(numbers[TIED], 2)} of the bound at n = 1,024; {'; '.join(parts)} to n = 2^16"
    )


LABELS = {
    "large space": ("a large space", "#0072B2"), "few": ("all strings, by a reward model", "#E69F00"),
    "gold itself, tied": ("all strings, six tied rewards", "#D55E00"),
}  # fmt: skip


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(8, 3.3)
    left, right = figure.subplots(1, 2)
    curves, pairs = found["curves"], found["settings"]["pairs"]
    sizes = curves["n"]
    left.plot(sizes, [bound(n) for n in sizes], color="0.25", label="ln n − (n − 1) / n")
    for name, (label, colour) in LABELS.items():
        row = curves[f"kl {name}"]
        at = sizes[1 : len(row) + 1] if name == "large space" else sizes
        large = {"markersize": 7, "markerfacecolor": "none"} if name == "large space" else {"markersize": 3.5}
        left.plot(at, row, "o", color=colour, label=label, **large)
    left.set(xscale="log", xlabel="n", ylabel="KL(best of n ‖ reference), nats")
    left.legend(frameon=False)
    for name, colour in zip(pairs, ("#D55E00", "#E69F00", "#0072B2"), strict=False):
        rows = curves[f"gold {name}"]
        for row in rows:
            right.plot(sizes, row, color=colour, alpha=0.25, linewidth=0.8)
        right.plot(sizes, means(rows), color=colour, linewidth=1.8, label=f"{pairs[name]:,} pairs")
    right.set(xscale="log", xlabel="n", ylabel="gold reward of the best of n by the proxy")
    right.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
