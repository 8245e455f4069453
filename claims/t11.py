"""T11: how many groups teach something, and what a wider clip above does to the entropy. arXiv 2503.14476.

In the world of strings a random set of them is right, chosen so that a model's exact probability of being right is p. Groups are
drawn by posttrain's own iterator, and those with both right and wrong answers counted. Then the same model learns by `dapo` with
both clips at 0.2, and with 0.28 above, eight epochs of each rollout, so that ratios reach the clip; the entropy is summed up
exactly, over all strings.
"""

import sys
from typing import Any

from claims.claim import Claim, Number, exact, exceeds, main, number, shown, spread

SHARES = (0.1, 0.5)
GROUP = 8
WITHIN = 0.02
"""The measured share of mixed groups is within this of 1 - p^8 - (1 - p)^8."""
CLIPS = (0.2, 0.28)

CLAIM = Claim(
    "T11",
    "A group of answers teaches something with probability 1 − p^G − (1 − p)^G; a wider clip above keeps the entropy higher",
    "arXiv 2503.14476",
    f"measured share within {WITHIN:g} of the closed form at p near 0.1 and 0.5 with G = 8 (0.5695 and 0.9922 there); entropy "
    "after learning higher with 0.28 than with 0.2 by 2 s.e. of the paired difference",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10], "reference_steps": 300, "counted": 1024, "steps": 96, "groups": 32, "every": 16,
    "rate": 1e-3, "epochs": 8, "processes": 2,
}  # fmt: skip
QUICK = {
    **SETTINGS, "seeds": [101, 102], "reference_steps": 40, "counted": 64, "steps": 8, "groups": 4, "every": 4, "processes": 1,
}  # fmt: skip


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    runs = spread(of_seed, [(seed, settings) for seed in settings["seeds"]], settings["processes"])
    numbers: dict[str, Number] = {}
    for share in SHARES:
        numbers[f"p {share:g}"] = number(run[f"p {share:g}"] for run in runs)
        numbers[f"expected {share:g}"] = number(mixed(run[f"p {share:g}"]) for run in runs)
        numbers[f"mixed {share:g}"] = number(run[f"mixed {share:g}"] for run in runs)
        numbers[f"off {share:g}"] = number(run[f"mixed {share:g}"] - mixed(run[f"p {share:g}"]) for run in runs)
    numbers |= {f"closed form {share:g}": exact(mixed(share)) for share in SHARES}
    curves: dict[str, Any] = {"steps": list(range(0, settings["steps"] + 1, settings["every"]))}
    for clip in CLIPS:
        numbers[f"entropy {clip:g}"] = number(run[f"entropy {clip:g}"][-1] for run in runs)
        numbers[f"right {clip:g}"] = number(run[f"right {clip:g}"][-1] for run in runs)
        numbers[f"clipped {clip:g}"] = number(run[f"clipped {clip:g}"] for run in runs)
        curves[f"{clip:g}"] = [sum(each) / len(each) for each in zip(*(run[f"entropy {clip:g}"] for run in runs), strict=True)]
    low, high = (numbers[f"entropy {clip:g}"]["seeds"] for clip in CLIPS)
    numbers["entropy kept"] = number(b - a for a, b in zip(low, high, strict=True))
    return {"numbers": numbers, "curves": curves}


def mixed(p: float) -> float:
    """The probability that a group of independent answers has both right and wrong ones."""
    return 1 - p**GROUP - (1 - p) ** GROUP


def of_seed(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    import torch

    from claims import strings as world
    from posttrain.models.roles import Roles
    from posttrain.objectives import Objective
    from posttrain.rl import Drawer
    from posttrain.sampling import InProcess

    torch.set_num_threads(1)
    start = world.reference(seed, settings["reference_steps"])
    chances = world.distribution(start).exp()
    found: dict[str, Any] = {}
    sets = {share: world.chosen(chances, share, seed) for share in SHARES}
    for share, right in sets.items():
        found[f"p {share:g}"] = float(chances[right].sum())
        rollout = world.rollout_of(GROUP * settings["counted"], 1, 1)
        template: Any = world.Alphabet()
        drawer = Drawer(
            Objective.lookup("grpo")(), world.problems_of(rollout), world.SetGrader(right=tuple(right.tolist())),
            InProcess(), rollout, start, template, Roles(), seed,
        )  # fmt: skip
        groups: dict[str, set[float | None]] = {}
        for one, grade in drawer.take(1, 0).all:
            groups.setdefault(one.problem.id, set()).add(grade.score)
        found[f"mixed {share:g}"] = sum(len(each) > 1 for each in groups.values()) / len(groups)
    right = sets[SHARES[0]]
    for clip in CLIPS:
        found |= learned(world.twin(start), right, clip, seed, settings)
    return found


def learned(policy: Any, right: Any, clip: float, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The exact entropy, and how much is right, before and while a model learns; and how many tokens were clipped."""
    from claims import strings as world
    from posttrain.models.roles import Roles
    from posttrain.objectives import Objective

    seen: dict[str, list[float]] = {"entropy": [], "right": []}

    def look(_run: Any = None) -> None:
        logp = world.distribution(policy)
        seen["entropy"].append(-float((logp.exp() * logp).sum()))
        seen["right"].append(float(logp.exp()[right].sum()))

    look()
    objective: Any = Objective.lookup("dapo")(clip_low=CLIPS[0], clip_high=clip)
    rollout = world.rollout_of(GROUP * settings["groups"], settings["epochs"], 1)
    updates = world.sampled_updates(objective, world.SetGrader(right=tuple(right.tolist())), policy, Roles(), rollout, seed)
    clipped: list[float] = []
    watcher = world.Watcher(settings["every"], look, lambda figures: clipped.append(figures.get("clip_fraction", 0.0)))
    world.learn(policy, {"policy": world.learner(policy.model, settings["rate"])}, updates, settings["steps"], watcher=watcher)
    return {
        f"entropy {clip:g}": seen["entropy"], f"right {clip:g}": seen["right"], f"clipped {clip:g}": sum(clipped) / len(clipped),
    }  # fmt: skip


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    return {
        "the share of mixed groups is the closed form": all(abs(numbers[f"off {share:g}"]["value"]) < WITHIN for share in SHARES),
        "the closed form is 0.5695 and 0.9922": all(
            abs(numbers[f"closed form {share:g}"]["value"] - printed) < 5e-5
            for share, printed in zip(SHARES, (0.5695, 0.9922), strict=True)
        ),
        "a wider clip above keeps more entropy": exceeds(numbers["entropy kept"]),
        "it learns no less": numbers["right 0.28"]["value"] > numbers["right 0.2"]["value"] - 0.05,
    }


def say(numbers: dict[str, Number]) -> str:
    shares = "; ".join(
        f"p {numbers[f'p {share:g}']['value']:.3f}: {shown(numbers[f'mixed {share:g}'])} of groups mixed, "
        f"expected {numbers[f'expected {share:g}']['value']:.3f}"
        for share in SHARES
    )
    entropies = ", ".join(
        f"{clip:g}: {shown(numbers[f'entropy {clip:g}'], 2)} (right {numbers[f'right {clip:g}']['value']:.0%}, "
        f"{numbers[f'clipped {clip:g}']['value']:.1%} of tokens clipped)"
        for clip in CLIPS
    )
    return f"{shares}. Entropy in nats after learning with a clip above of {entropies}; kept {shown(numbers['entropy kept'], 2)}"


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(4.2, 3)
    axis = figure.subplots()
    for clip, colour in zip(CLIPS, ("#D55E00", "#0072B2"), strict=True):
        axis.plot(found["curves"]["steps"], found["curves"][f"{clip:g}"], color=colour, label=f"clip above {clip:g}")
    axis.set(xlabel="updates", ylabel="entropy of strings in nats")
    axis.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
