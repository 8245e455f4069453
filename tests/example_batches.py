"""A small example of every registered objective: settings, and a batch to learn from. A new kind adds one line to EXAMPLES.

Every batch has 8 rows of unequal lengths, shared prefixes, a row with nothing trained and a row of one token. What a reference
says is left to `annotate`, which asks the one that the test hands over.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from tiny_models import VOCABULARY

from posttrain.batch import Classified, Labelled, Pairs, Ranked, Rollouts, Sequences, Stepped, Taught, Valued
from posttrain.models.actor_critic import ActorCritic
from posttrain.models.lm import LM
from posttrain.objectives import Objective

IDLE = [1, 5]  # in every batch: the row with nothing trained, and the row of one token


@dataclass(frozen=True)
class Example:
    """`batch(policy)` may ask the model; it must have 8 rows. `shared`: the critic is a head on the policy's states. `encoder`:
    the policy is one."""

    kind: str
    settings: dict[str, Any]
    batch: Callable[[Any], Any]
    shared: bool = False
    encoder: bool = False

    @property
    def name(self) -> str:
        shared = ["shared"] if self.shared else ["encoder"] if self.encoder else []
        return "-".join([self.kind, *(f"{key}={value}" for key, value in self.settings.items()), *shared])

    @property
    def objective(self) -> Objective:
        return Objective.lookup(self.kind)(**self.settings)

    @property
    def policy(self) -> str:
        """What kind of model it trains."""
        if "critic" in self.objective.trains:
            return "shared critic" if self.shared else "critic"
        if self.objective.reads == "Classified":
            return "encoder" if self.encoder else "classifier"
        return "scalar" if self.objective.scores else "lm"

    @property
    def idles(self) -> bool:
        """Whether the rows IDLE have nothing for it to train; a score is read of any row."""
        return not self.objective.scores or self.objective.reads == "Stepped"


def draw(count: int, seed: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def noise(count: int, seed: int, like: torch.Tensor, scale: float) -> torch.Tensor:
    return (scale * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(like.dtype)


def rows(seed: int = 0, other: int = 0, lengths: tuple[int, ...] = (3, 9, 5)) -> list[tuple[list[int], list[bool]]]:
    """8 rows: two groups with prompts of 20 and 17 tokens, a row with nothing trained, and one of a single token.

    `other` changes the answers and not their prompts, and the last two rows.
    """
    found = []
    for group, prompt in enumerate((draw(20, seed + 1), draw(17, seed + 2))):
        for index, length in enumerate(lengths):
            answer = draw(length, seed + other + 10 * group + index + 3)
            found.append((prompt + answer, [False] * len(prompt) + [True] * length))
    found.append((draw(14, seed + other + 30), [False] * 14))
    found.append((draw(1, seed + other + 31), [False]))
    return [found[index] for index in (0, 6, 3, 4, 1, 7, 5, 2)]


# ---- batches for policies


def sequences(_lm: LM) -> Sequences:
    return Sequences.of(rows())


def taught(_lm: LM) -> Taught:
    return Taught(Sequences.of(rows()))


def weighted(_lm: LM) -> Sequences:
    return Sequences.of(rows(), weight=[1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 0.25, 1.0])


def rollouts(lm: LM) -> Rollouts:
    """Samples of a policy a few updates ago: some ratios lie outside of the clip range, on both sides; a row has no advantage."""
    seqs, temperature = Sequences.of(rows()), 0.7
    good = torch.tensor([1.3, -0.4, 0.8, -1.1, 0.0, 0.6, -0.7, 0.9])
    with torch.no_grad():
        logp = lm.logprobs(seqs, temperature=temperature)
    return Rollouts(
        seqs,
        sampled_logp=logp + noise(len(logp), 41, logp, 0.3),
        advantage=good.to(logp.dtype)[seqs.owner],
        version=torch.zeros(seqs.count, dtype=torch.long),
        ref_logp=logp + noise(len(logp), 43, logp, 0.5),
        temperature=temperature,
    )


def behind(lm: LM) -> Rollouts:
    """Drawn by a sampler that was not the policy from which the update starts."""
    batch = rollouts(lm)
    return replace(batch, old_logp=batch.sampled_logp + noise(len(batch.sampled_logp), 61, batch.sampled_logp, 0.4))


def nearby(lm: LM) -> Rollouts:
    """Samples of nearly the same policy: their mean ratios lie within a few ten-thousandths of 1, and a little beyond."""
    batch = rollouts(lm)
    with torch.no_grad():
        logp = lm.logprobs(batch.seqs, temperature=batch.temperature)
    return replace(batch, sampled_logp=logp + noise(len(logp), 67, logp, 1e-3))


def uneven(lm: LM) -> Rollouts:
    """Every token has an advantage of its own."""
    batch = rollouts(lm)
    return replace(batch, advantage=noise(len(batch.advantage), 71, batch.advantage, 1.0))


def valued(policy: ActorCritic) -> Valued:
    """Rollouts whose critic has moved since, by less and by more than it is clipped to."""
    sampled = rollouts(policy)
    with torch.no_grad():
        value = policy.values(sampled.seqs)
    returns = value + noise(len(value), 47, value, 1.0)
    advantage = noise(len(value), 53, value, 1.0)
    return Valued(replace(sampled, advantage=advantage), value + noise(len(value), 59, value, 0.3), returns)


def pairs(_policy: Any) -> Pairs:
    sides = Sequences.of(rows()), Sequences.of(rows(other=100, lengths=(4, 2, 7)))
    return Pairs(*sides, prefer=torch.ones(8), margin=torch.zeros(8))


def uncertain(policy: Any) -> Pairs:
    return replace(pairs(policy), prefer=torch.tensor([0.9, 1.0, 0.4, 0.75, 0.95, 1.0, 0.6, 0.3]))


def graded_pairs(policy: Any) -> Pairs:
    return replace(pairs(policy), margin=torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.0, 0.25, 3.0]))


def sampled_pairs(policy: Any) -> Pairs:
    """One side is the reference's answer, the other the policy's."""
    return replace(pairs(policy), theirs=torch.tensor([True, False, False, True, True, True, False, False]))


def labelled(_policy: Any) -> Labelled:
    return Labelled(Sequences.of(rows()), torch.tensor([True, False, True, True, False, True, False, False]))


# ---- batches for models that score


def ranked(_policy: Any) -> Ranked:
    """1 to 4 answers to each of 8 prompts, which some rows share; scores differ within a row."""
    sizes = [3, 2, 4, 1, 2, 3, 2, 4]
    found, scores = [], []
    for row, size in enumerate(sizes):
        prompt = draw(17 + row % 3, 200 + row // 2)
        for index in range(size):
            found.append((prompt + draw(1 + (5 * index + 3 * row) % 11, 300 + 10 * row + index), None))
            scores.append(float((3 * index + row) % 5) / 2)
    marked = [(tokens, [False] + [True] * (len(tokens) - 1)) for tokens, _ in found]
    return Ranked(Sequences.of(marked), torch.tensor(sizes), torch.tensor(scores))


def tied(policy: Any) -> Ranked:
    """Two answers of a row have one score, and all of another row's."""
    batch = ranked(policy)
    score = batch.score.clone()
    score[1] = score[0]
    score[batch.group == 4] = 1.0
    return replace(batch, score=score)


def stepped(_policy: Any) -> Stepped:
    """Every second token of an answer ends a step."""
    marked = [(tokens, [mark and place % 2 == 0 for place, mark in enumerate(train)]) for tokens, train in rows()]
    seqs = Sequences.of(marked)
    right = torch.tensor([1.0, 0.0, 1.0, 0.3, 1.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    return Stepped(seqs, right[: seqs.trained])


def classified(_policy: Any) -> Classified:
    """One of three classes."""
    return Classified(Sequences.of(rows()), torch.tensor([[0.0], [2.0], [1.0], [1.0], [0.0], [2.0], [2.0], [0.0]]))


def tagged(_policy: Any) -> Classified:
    """Any of three labels, all and none among them."""
    target = [[1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]
    return Classified(Sequences.of(rows()), torch.tensor(target, dtype=torch.float32))


def measured(_policy: Any) -> Classified:
    """A number."""
    return Classified(Sequences.of(rows()), torch.tensor([[0.5], [-1.0], [2.0], [0.0], [1.5], [3.0], [-0.5], [1.0]]))


LABELS = {"labels": ["ant", "bee", "cow"]}
EXAMPLES = [
    Example("sft", {}, sequences),
    Example("sft", {}, weighted),
    Example("pretrain", {}, sequences),
    Example("match_logits", {}, taught),
    Example("grpo", {"aggregate": "sequence"}, rollouts),
    Example("grpo", {"aggregate": "token", "clip_high": 0.28}, rollouts),
    Example("grpo", {"aggregate": "sequence", "kl": 0.3}, rollouts),
    Example("grpo", {"kl": 0.3, "kl_as": "weighted", "entropy": 0.1, "dual_clip": 1.2}, rollouts),
    Example("grpo", {"ratio": "sequence_product", "aggregate": "sum"}, rollouts),
    Example("grpo", {"aggregate": "token", "top_entropy": 0.3, "entropy": 0.1}, rollouts),
    Example("grpo", {"correction": {"cap": 1.1}}, behind),
    Example("grpo", {"correction": {"level": "sequence_mean", "mask": True, "floor": 0.8}}, behind),
    Example("dr_grpo", {"length": 12}, rollouts),
    Example("dapo", {}, rollouts),
    Example("gspo", {}, nearby),
    Example("cispo", {"cap": 1.2}, rollouts),
    Example("rloo", {}, rollouts),
    Example("reinforce_pp", {}, uneven),
    Example("remax", {}, rollouts),
    Example("sapo", {}, rollouts),
    Example("vespo", {}, rollouts),
    Example("dpo", {}, pairs),
    Example("dpo", {"label_smoothing": 0.1, "nll": 0.5, "length": "mean", "beta": 2.0}, pairs),
    Example("dpo", {}, uncertain),
    Example("robust_dpo", {}, pairs),
    Example("ipo", {"length": "sum"}, pairs),
    Example("ipo", {"length": "mean"}, pairs),
    Example("psi_po", {}, uncertain),
    Example("psi_po", {"psi": "log_odds", "most_certain": 0.9, "tau": 0.5}, uncertain),
    Example("hinge", {}, pairs),
    Example("exo", {}, pairs),
    Example("nca", {"beta": 0.1}, pairs),
    Example("sppo", {"beta": 0.1}, uncertain),
    Example("apo_zero", {}, pairs),
    Example("apo_down", {}, pairs),
    Example("f_dpo", {"divergence": "forward_kl"}, pairs),
    Example("f_dpo", {"divergence": "js"}, pairs),
    Example("f_dpo", {"divergence": "alpha", "alpha": 0.3}, pairs),
    Example("wpo", {}, pairs),
    Example("simpo", {}, pairs),
    Example("cpo", {"label_smoothing": 0.1}, pairs),
    Example("orpo", {}, pairs),
    Example("kto", {"weight_bad": 1.5}, labelled),
    Example("bco", {}, labelled),
    Example("online_dpo", {}, pairs),
    Example("xpo", {"optimism": 0.1}, sampled_pairs),
    Example("bradley_terry", {}, pairs),
    Example("bradley_terry", {"centring": 0.1}, graded_pairs),
    Example("bradley_terry", {}, uncertain),
    Example("ranking_reward", {}, tied),
    Example("best_of_k", {}, ranked),
    Example("score_regression", {}, ranked),
    Example("labelled_reward", {}, labelled),
    Example("process_reward", {}, stepped),
    Example("classify", {"problem": "single", **LABELS}, classified),
    Example("classify", {"problem": "single", **LABELS}, classified, encoder=True),
    Example("classify", {"problem": "single", **LABELS, "label_smoothing": 0.1, "weights": {"bee": 2.5}}, classified),
    Example("classify", {"problem": "multi", **LABELS, "weights": {"cow": 0.5}}, tagged),
    Example("classify", {"problem": "multi", **LABELS}, tagged, encoder=True),
    Example("classify", {"problem": "regression"}, measured),
    Example("ppo", {}, valued),
    Example("ppo", {"entropy": 0.1, "dual_clip": 1.2, "clip": 0.1}, valued),
    Example("ppo", {"value_clip": None, "value_weight": 1.0}, valued, shared=True),
]


def only(value: Any, kept: list[int]) -> Any:
    """A batch of the given rows in the given order, whatever its type: `select` itself keeps the order of the batch."""
    return joined([value.select([row]) for row in kept])


def joined(parts: list[Any]) -> Any:
    changed: dict[str, Any] = {}
    for each in fields(parts[0]):
        values = [getattr(part, each.name) for part in parts]
        if each.name == "starts":
            changed["starts"] = torch.cat([torch.zeros(1, dtype=torch.long), *(value.diff() for value in values)]).cumsum(0)
        elif isinstance(values[0], torch.Tensor):
            changed[each.name] = torch.cat(values)
        elif is_dataclass(values[0]):
            changed[each.name] = joined(values)
    return replace(parts[0], **changed)
