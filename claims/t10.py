"""T10: a mean over an answer's tokens favours long wrong answers, a sum does not. arXiv 2503.20783.

In the world of strings one answer is right: the wanted letter by itself, after which the reference always ends. So right answers
have nothing to teach about when to end, and whatever the length of wrong ones does, their punishment does. Under `grpo` a wrong
token of a long answer is punished less than one of a short answer; under `dr_grpo` and `dapo` the same. The mean length of wrong
strings is summed up exactly, over all of them.
"""

import sys
from typing import Any

from claims.claim import Claim, Number, exact, exceeds, main, number, shown, spread

KINDS = ("grpo", "dr_grpo", "dapo")
RATIO = 10.0
"""The weight of a token of a wrong answer of 10 tokens over that of one of 100, of one group, under grpo; under the others 1."""

CLAIM = Claim(
    "T10",
    "Length bias: under a mean over each answer's tokens wrong answers grow longer, under a sum they do not",
    "arXiv 2503.20783, 2503.14476",
    f"the weight of a token of 10 over one of 100 is {RATIO:g} under grpo, 1 under dr_grpo and dapo; the mean length of wrong "
    "answers grows under grpo by 2 s.e., and by more than under dr_grpo and dapo",
)
SETTINGS: dict[str, Any] = {
    "seeds": [1, 2, 3, 4, 5, 6], "reference_steps": 300, "ends": 0.3, "steps": 150, "groups": 32, "every": 15, "rate": 1e-3,
    "processes": 2,
}  # fmt: skip
QUICK = {**SETTINGS, "seeds": [101, 102], "reference_steps": 40, "steps": 6, "groups": 4, "every": 3, "processes": 1}


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    work = [(kind, seed) for kind in KINDS for seed in settings["seeds"]]
    found = dict(zip(work, spread(of_seed, [(*each, settings) for each in work], settings["processes"]), strict=True))
    numbers: dict[str, Number] = {f"weight ratio {kind}": exact(weight_ratio(kind)) for kind in KINDS}
    curves: dict[str, Any] = {"steps": list(range(0, settings["steps"] + 1, settings["every"]))}
    for kind in KINDS:
        runs = [found[kind, seed] for seed in settings["seeds"]]
        numbers[f"growth {kind}"] = number(run["length"][-1] - run["length"][0] for run in runs)
        numbers[f"right {kind}"] = number(run["right"][-1] for run in runs)
        curves[kind] = [sum(each) / len(each) for each in zip(*(run["length"] for run in runs), strict=True)]
    for kind in KINDS[1:]:
        pairs = zip(numbers["growth grpo"]["seeds"], numbers[f"growth {kind}"]["seeds"], strict=True)
        numbers[f"grpo above {kind}"] = number(one - other for one, other in pairs)
    return {"numbers": numbers, "curves": curves}


def weight_ratio(kind: str) -> float:
    """|gradient by the log-probability of a token| in a wrong answer of 10 tokens over that in one of 100, two of one group."""
    import torch

    from posttrain.batch import Rollouts, Sequences
    from posttrain.objectives import Objective

    seqs = Sequences.of([([1] * (1 + length), [False] + [True] * length) for length in (10, 100)])
    logp = torch.full((110,), -1.0, requires_grad=True)
    objective: Any = Objective.lookup(kind)().planned(128)
    batch = Rollouts(seqs, logp.detach(), torch.full((110,), -1.0), torch.zeros(2, dtype=torch.long))

    class Policy:
        def token_sum(self, _seqs: Any, fn: Any, _temperature: float) -> Any:
            return fn(logp, slice(None)).sum(), logp.detach()

    objective.loss(Policy(), batch).terms["policy"].backward()
    assert logp.grad is not None
    return float(logp.grad[0] / logp.grad[10])


def of_seed(kind: str, seed: int, settings: dict[str, Any]) -> dict[str, list[float]]:
    """{"length": the mean length of wrong strings, "right": the share of right ones} before and while it learns."""
    import torch

    from claims import strings as world
    from posttrain.models.roles import Roles
    from posttrain.objectives import Objective

    policy = world.reference(seed, settings["reference_steps"], world.structured(seed, 4096, ends=settings["ends"], alone=True))
    lengths = (world.letters() > 0).sum(1).double()
    right = ((world.letters()[:, 0] == world.WANTED) & (lengths == 1)).double()
    seen: dict[str, list[float]] = {"length": [], "right": []}

    def look(_run: Any = None) -> None:
        chances = world.distribution(policy).exp()
        wrong = chances * (1 - right)
        seen["length"].append(float((wrong * lengths).sum() / wrong.sum()))
        seen["right"].append(float((chances * right).sum()))

    look()
    objective: Any = Objective.lookup(kind)()
    rollout = world.rollout_of(8 * settings["groups"], 1, 1)
    grader = world.SetGrader(right=tuple(right.nonzero().flatten().tolist()))
    updates = world.sampled_updates(objective, grader, policy, Roles(), rollout, seed)
    watcher = world.Watcher(settings["every"], look)
    torch.set_num_threads(1)
    world.learn(policy, {"policy": world.learner(policy.model, settings["rate"])}, updates, settings["steps"], watcher=watcher)
    return seen


def judge(numbers: dict[str, Number]) -> dict[str, bool]:
    ratios = {kind: numbers[f"weight ratio {kind}"]["value"] for kind in KINDS}
    return {
        "a token of a short wrong answer weighs 10 times one of a long one under grpo, as much under the others": (
            abs(ratios["grpo"] - RATIO) < 1e-4 and all(abs(ratios[kind] - 1) < 1e-4 for kind in KINDS[1:])
        ),
        "wrong answers grow under grpo": exceeds(numbers["growth grpo"]),
        "they grow more than under dr_grpo": exceeds(numbers["grpo above dr_grpo"]),
        "they grow more than under dapo": exceeds(numbers["grpo above dapo"]),
        "all learn": all(numbers[f"right {kind}"]["value"] > 0.3 for kind in KINDS),
    }


def say(numbers: dict[str, Number]) -> str:
    parts = [f"{kind} {shown(numbers[f'growth {kind}'], 2)} (right {numbers[f'right {kind}']['value']:.0%})" for kind in KINDS]
    return f"letters by which wrong strings grow: {', '.join(parts)}; grpo's token weights 10 : 1"


def draw(figure: Any, found: dict[str, Any]) -> None:
    figure.set_size_inches(4.2, 3)
    axis = figure.subplots()
    for kind, colour in zip(KINDS, ("#D55E00", "#0072B2", "#009E73"), strict=True):
        axis.plot(found["curves"]["steps"], found["curves"][kind], color=colour, label=kind)
    axis.set(xlabel="updates", ylabel="mean length of wrong strings")
    axis.legend(frameon=False)


if __name__ == "__main__":
    main(sys.modules[__name__])
