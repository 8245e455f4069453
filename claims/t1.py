"""T1: the reward that DPO and PPO reach for their divergence from the reference, the true reward known. arXiv 2305.18290.

A tiny Llama writes strings of at most 5 of 8 letters (claims/strings.py); the true reward is the number of letters `a`, at most
3. Comparisons are drawn from the reference and labelled by Bradley and Terry. Three ways lead from the same reference to a
policy, for each beta: DPO on the comparisons; PPO with a reward model trained on the same comparisons; PPO with the true reward.
All have equally many updates of equally many strings (DPO 64 pairs, PPO 128 samples; what PPO and its reward model cost beside is
not counted), at two budgets. DPO also runs with six times the comparisons. Expected reward and KL are exact sums over all 37,449
strings, at intervals of every training; so is the frontier, pi_ref exp(r / beta) / Z for every beta.
"""

import statistics
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from claims.claim import Claim, Number, exact, main, number, shown, spread

ABOVE = 1e-6
"""No point of any training has a reward above the frontier's, at its own KL, by more than this (sums are exact: rounding)."""
NEAR = 0.9
"""DPO's final policies reach at least this share of the frontier's reward at their KL, in the mean over seeds, for each beta:
given ample comparisons (six times the equal budget's, each seen once), from a reference that gives every string a chance."""
MOST = 0.5
"""DPO's share of the frontier's reward is at least PPO's in more than this share of the KL bins that hold points of both."""
BINS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
"""Edges of the KL bins, in nats: up to where the frontier reaches the highest reward. A bin has the mean over its points."""

METHODS = {
    "dpo long": "DPO, 6 times the comparisons",
    "ppo true": "PPO, true reward",
    "ppo learned": "PPO, learned reward",
    "dpo": "DPO",
    "ppo true short": "PPO, true reward, a quarter of the updates",
    "ppo learned short": "PPO, learned reward, a quarter of the updates",
    "dpo short": "DPO, a quarter of the updates",
}
"""The longest first, so that processes end together."""
CLAIM = Claim(
    "T1",
    "DPO's frontier of reward and KL is at least PPO's, even where PPO knows the true reward",
    "arXiv 2305.18290",
    f"no point above the exact frontier; DPO's final reward, given ample comparisons, ≥ {NEAR:g} of the frontier's at its KL for "
    "every beta; at equal budget (256 and 64 updates) DPO's share of the frontier ≥ PPO's in most KL bins, with the learned and "
    "with the true reward",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3], "betas": [0.02, 0.05, 0.1, 0.2, 0.5, 1.0], "worth": [0, 1, 2, 3, 3, 3],
    "reference_steps": 300, "looks": 8,
    "budgets": {
        "short": {"pairs": 4096, "updates": 64, "rows": 64}, "full": {"pairs": 16_384, "updates": 256, "rows": 64},
        "long": {"pairs": 102_400, "updates": 800, "rows": 128},
    },
    "rates": {"reward model": 1e-3, "dpo": 2e-3, "ppo": 1e-3, "critic": 3e-3},
    "samples": 256, "epochs": 2, "minibatches": 2, "processes": 2,
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [101], "betas": [0.5], "reference_steps": 80, "looks": 2, "processes": 1, "samples": 128,
    "budgets": {
        "short": {"pairs": 512, "updates": 8, "rows": 64}, "full": {"pairs": 1024, "updates": 16, "rows": 64},
        "long": {"pairs": 2048, "updates": 32, "rows": 64},
    },
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """What a seed's trainings share: the reference, its distribution, the true reward of every string, comparisons."""

    ref: Any
    logp: Any
    reward: Any
    pairs: list[Any]
    known: Any


def budget_of(method: str, settings: dict[str, Any]) -> dict[str, int]:
    last = method.split()[-1]
    return settings["budgets"][last if last in settings["budgets"] else "full"]


@cache
def world(seed: int, reference_steps: int, pairs: int, worth: tuple[float, ...]) -> World:
    import torch

    from claims import strings

    ref = strings.reference(seed, reference_steps)
    logp = strings.distribution(ref)
    reward = torch.tensor(worth, dtype=torch.float64)[strings.counted().long()]
    return World(ref, logp, reward, *strings.comparisons(logp, reward, pairs, seed))


def world_of(seed: int, settings: dict[str, Any]) -> World:
    most = max(budget["pairs"] for budget in settings["budgets"].values())
    return world(seed, settings["reference_steps"], most, tuple(settings["worth"]))


def trained(method: str, beta: float, seed: int, settings: dict[str, Any], learned: Any) -> list[tuple[float, float]]:
    """(KL, reward) of a policy at equal intervals of its training, the last at its end. `learned`: the reward model, if any."""
    from claims import strings
    from posttrain.models.actor_critic import ActorCritic
    from posttrain.objectives import DPO, PPO
    from posttrain.tasks.learned import RewardModelGrader
    from posttrain.training.updates import RowUpdates

    shared, rates = world_of(seed, settings), settings["rates"]
    budget = budget_of(method, settings)
    policy, points = strings.twin(shared.ref), []

    def look(_run: Any) -> None:
        logp = strings.distribution(policy)
        points.append((strings.divergence(logp, shared.logp), strings.expected(logp, shared.reward)))

    watcher = strings.Watcher(budget["updates"] // settings["looks"], look)
    if method.startswith("dpo"):
        rows, known = shared.pairs[: budget["pairs"]], shared.known[: budget["pairs"]]
        places = [[f"pair {index}" for index in range(len(rows))]]
        source = RowUpdates(DPO(beta=beta), [rows], places, None, budget["rows"], seed, [known])
        strings.learn(policy, {"policy": strings.learner(policy.model, rates["dpo"])}, source, budget["updates"], None, watcher)
        return points
    critic, roles = strings.scorer(shared.ref, None), strings.frozen(shared.ref)
    grader: Any = strings.LetterGrader(worth=tuple(settings["worth"]))
    if learned is not None:
        grader = RewardModelGrader(model=strings.SOURCE)
        grader._lm = learned  # as `prepare` would load it
    objective = PPO(kl=beta, no_end_score=None, value_clip=None, value_weight=0.5)
    actor = ActorCritic(policy, critic)
    plan = strings.rollout_of(settings["samples"], settings["epochs"], settings["minibatches"])
    sampled = strings.sampled_updates(objective, grader, actor, roles, plan, seed)
    of_critic = strings.learner(critic, rates["critic"], "critic.")
    learners = {"policy": strings.learner(policy.model, rates["ppo"]), "critic": of_critic}
    strings.learn(actor, learners, sampled, budget["updates"], roles, watcher)
    return points


def of_seed(seed: int, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """{beta: [(KL, reward, the frontier's reward at that KL)]} of one method, and the frontier itself."""
    import torch

    from claims import strings

    torch.set_num_threads(1)
    found: dict[str, Any] = {"points": {}}
    shared = world_of(seed, settings)
    frontier, learned, budget = Frontier(shared.logp, shared.reward), None, budget_of(method, settings)
    if method.startswith("ppo learned"):  # from the comparisons that DPO has, in as many updates
        pairs, rate = shared.pairs[: budget["pairs"]], settings["rates"]["reward model"]
        learned = strings.reward_model(shared.ref, pairs, budget["updates"], budget["rows"], rate, seed)
    for beta in settings["betas"]:
        points = trained(method, beta, seed, settings, learned)
        found["points"][beta] = [(kl, reward, frontier.reward(kl)) for kl, reward in points]
    found["frontier"] = [frontier.at(10 ** (place / 20 - 2)) for place in range(60)]  # betas from 0.01 to 10
    found["optima"] = {beta: frontier.at(beta) for beta in settings["betas"]}
    found["start"] = frontier.at(1e9)[1]
    return found


class Frontier:
    """The highest reward at each KL from the reference: that of pi_ref exp(r / beta) / Z, summed over all strings."""

    def __init__(self, logp: Any, reward: Any) -> None:
        import torch

        self.values = reward.unique()  # all that matters of a string is its reward
        self.logp = torch.stack([logp[reward == value].logsumexp(0) for value in self.values])

    def at(self, beta: float) -> tuple[float, float]:
        """(KL, reward)"""
        tilted = (self.logp + self.values / beta).log_softmax(0)
        return float((tilted.exp() * (tilted - self.logp)).sum()), float((tilted.exp() * self.values).sum())

    def reward(self, kl: float) -> float:
        """The highest reward that a policy of this KL can have."""
        low, high = 1e-3, 1e9
        if self.at(low)[0] <= kl:
            return float(self.values.max())
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.at(middle)[0] > kl else (low, middle)
        return self.at(low)[1]


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Shares of the frontier's reward, for each method and beta at the end, and for each method and KL bin on the way."""
    work = [(seed, method, settings) for method in METHODS for seed in settings["seeds"]]
    found = dict(zip([(seed, method) for seed, method, _ in work], spread(of_seed, work, settings["processes"]), strict=True))
    seeds, numbers, curves = settings["seeds"], {}, {}
    excess = [reward - best for each in found.values() for points in each["points"].values() for _, reward, best in points]
    numbers["highest above the frontier"] = exact(max(excess))
    for method in METHODS:
        for beta in settings["betas"]:
            last = [found[seed, method]["points"][beta][-1] for seed in seeds]
            name = f"{method} beta {beta:g}"
            numbers[f"{name} kl"] = number(kl for kl, _, _ in last)
            numbers[f"{name} reward"] = number(reward for _, reward, _ in last)
            numbers[f"{name} share"] = number(reward / best for _, reward, best in last)
            optima = [found[seed, method]["optima"][beta] for seed in seeds]
            numbers[f"{name} regret"] = number(
                best - beta * far - (reward - beta * kl) for (kl, reward, _), (far, best) in zip(last, optima, strict=True)
            )
            curves[name] = [found[seed, method]["points"][beta] for seed in seeds]
        numbers |= in_bins(method, [found[seed, method]["points"] for seed in seeds])
    curves["frontier"] = [found[seed, "dpo"]["frontier"] for seed in seeds]
    numbers["reward of the reference"] = number(found[seed, "dpo"]["start"] for seed in seeds)
    return {"numbers": numbers, "curves": curves}


def in_bins(method: str, of_seeds: list[dict[float, list[tuple[float, float, float]]]]) -> dict[str, Number]:
    """For each KL bin the mean share of the frontier's reward, over the points of each seed that has some there."""
    found = {}
    for low, high in pairwise(BINS):
        shares = [[reward / best for run in each.values() for kl, reward, best in run if low <= kl < high] for each in of_seeds]
        if any(shares):
            found[f"{method} bin {low:g} to {high:g}"] = number(statistics.fmean(each) for each in shares if each)
    return found


def better(numbers: dict[str, Number], ours: str, other: str) -> tuple[int, int]:
    """(bins in which `ours` is at least as near to the frontier, bins with points of both)"""
    shares = {name.removeprefix(ours): each["value"] for name, each in numbers.items() if name.startswith(f"{ours} bin")}
    both = [share >= numbers[other + name]["value"] for name, share in shares.items() if other + name in numbers]
    return sum(both), len(both)


DUELS = {
    "with the learned reward": ("dpo", "ppo learned"),
    "with the true reward": ("dpo", "ppo true"),
    "with the learned reward, a quarter of the updates": ("dpo short", "ppo learned short"),
    "with the true reward, a quarter of the updates": ("dpo short", "ppo true short"),
}


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    shares = [each["value"] for name, each in numbers.items() if name.startswith("dpo long beta") and name.endswith("share")]
    won = {words: better(numbers, *duel) for words, duel in DUELS.items()}
    return {
        "no point above the frontier": numbers["highest above the frontier"]["value"] <= ABOVE,
        "DPO near the frontier for every beta": min(shares) >= NEAR,
        **{f"DPO at least PPO {words}, in most bins": bins > MOST * of for words, (bins, of) in won.items()},
    }


def say(numbers: dict[str, Number]) -> str:
    parts = []
    for method in ("dpo long", "dpo", "ppo learned", "ppo true"):
        shares = [shown(each, 2) for key, each in numbers.items() if key.startswith(f"{method} beta") and key.endswith("share")]
        parts.append(f"{METHODS[method]} {', '.join(shares)}")
    won = {words: better(numbers, *duel) for words, duel in DUELS.items()}
    return (
        f"share of the frontier's reward at the end, smallest beta first: {'; '.join(parts)}. DPO is at least as near as PPO in "
        + "; ".join(f"{bins} of {of} KL bins {words}" for words, (bins, of) in won.items())
    )


LOWS = [f"{low:g}" for low in BINS[:-1]]
COLOURS = {"dpo long": "#56B4E9", "dpo": "#0072B2", "ppo learned": "#E69F00", "ppo true": "#D55E00"}


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(8.8, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    curves, numbers = found["curves"], found["numbers"]
    for place, frontier in enumerate(curves["frontier"]):
        kl, reward = zip(*sorted(frontier), strict=True)
        label = None if place else "exact frontier, each seed"
        left.plot([*kl, 16], [*reward, reward[-1]], color="0.25", linewidth=1, label=label, zorder=3)
    for offset, (method, colour) in zip((-0.12, -0.04, 0.04, 0.12), COLOURS.items(), strict=True):
        runs = [run for key, each in curves.items() if key.startswith(f"{method} beta") for run in each]
        way = [point[:2] for run in runs for point in run[:-1]]
        left.scatter(*zip(*way, strict=True), s=6, color=colour, alpha=0.3, linewidth=0)
        left.scatter(
            *zip(*[run[-1][:2] for run in runs], strict=True),
            s=26,
            color=colour,
            edgecolor="white",
            linewidth=0.5,
            label=METHODS[method],
        )
        for ending, line in (("", "-"), (" short", ":")):
            found_in = {key.split()[-3]: each for key, each in numbers.items() if key.startswith(f"{method}{ending} bin")}
            rows = [(place + offset, found_in[low]) for place, low in enumerate(LOWS) if low in found_in]
            middles = [place for place, _ in rows]
            values, errors = [each["value"] for _, each in rows], [2 * each["se"] for _, each in rows]
            right.errorbar(middles, values, errors, color=colour, linestyle=line, marker="o", markersize=4, capsize=2)
    right.plot([], [], color="0.25", linestyle=":", label="a quarter of the updates")
    right.legend(frameon=False, fontsize=8)
    left.set(xlabel="KL(policy ‖ reference), nats (logarithmic beyond 6)", ylabel="expected true reward", ylim=(0, 3.15))
    left.set_xscale("symlog", linthresh=6, linscale=2.5)
    left.set_xticks([0, 1, 2, 3, 4, 5, 6, 10, 16], ["0", "1", "2", "3", "4", "5", "6", "10", "16"])
    left.minorticks_off()
    left.set_xlim(0, 16)
    left.legend(frameon=False, loc="lower right", fontsize=8)
    right.axhline(NEAR, color="0.8", linewidth=1, zorder=0)
    right.set(xlabel="KL from the reference, nats", ylabel="share of the frontier's reward, ± 2 s.e.")
    right.set_xticks(range(len(LOWS)), [f"{low:g}–{high:g}" for low, high in pairwise(BINS)], fontsize=8)


if __name__ == "__main__":
    main(sys.modules[__name__])
