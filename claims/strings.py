"""A world small enough to know everything about: the strings of at most 5 of 8 letters, and tiny Llamas that write them.

A string ends with the end token or, at 5 letters, by itself: 37,449 strings in all, whose probabilities under a model are summed
up exactly. Everything that learns here does so by posttrain's own objectives, loop and sampler.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForSequenceClassification

from posttrain import draws
from posttrain.batch import Sequences
from posttrain.models.lm import LM
from posttrain.models.load import fresh, wrap_scalar
from posttrain.models.roles import Frozen, Roles
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource
from posttrain.objectives import SFT, BradleyTerry, Objective, OnPolicy
from posttrain.rl import Drawer, OnPolicyStream, Rollout
from posttrain.sampling import InProcess, Sampling
from posttrain.tasks import Grader
from posttrain.text import Grade, Message, Problem, RenderedRow, Sample
from posttrain.training.fit import Learner, Training, fit
from posttrain.training.optim import AdamW
from posttrain.training.updates import RowUpdates, SampledUpdates, Updates

END, LETTERS, LONGEST = 0, 8, 5
WANTED = 1  # the letter that rewards count
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
SOURCE = ModelSource(path="claims", layout="padded")  # equal short rows: nothing to save by the tree
MICRO_TOKENS = 4096


class Alphabet:
    """Stands where a template stands: the prompt is the end token alone, as between documents."""

    stop_ids = frozenset({END})
    tokenizer: Any

    def __init__(self) -> None:
        self.tokenizer = self

    def prompt(self, _messages: Sequence[Message]) -> list[int]:
        return [END]

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(chr(ord("a") + token - 1) for token in tokens if token != END)


# ---- all strings


@cache
def letters() -> Tensor:
    """[M, 5]: the letters of every string, 0 where it has ended; shorter ones first, those of a length in order."""
    found = []
    for length in range(LONGEST + 1):
        places = LETTERS ** torch.arange(length - 1, -1, -1)
        rows = torch.arange(LETTERS**length)[:, None] // places % LETTERS + 1
        found.append(torch.nn.functional.pad(rows, (0, LONGEST - length)))
    return torch.cat(found)


def distribution(lm: LM) -> Tensor:
    """[M], float64: log p of every string."""
    stems = letters()[-(LETTERS**LONGEST) :: LETTERS, :-1]  # every string of 4 letters
    with torch.no_grad():
        ids = torch.cat([torch.full((len(stems), 1), END), stems], 1)
        after = lm.model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    found, here = [], torch.zeros(1, dtype=torch.float64)
    for length in range(LONGEST):
        step = after[:: LETTERS ** (LONGEST - 1 - length), length]  # after every string of that length
        found.append(here + step[:, END])
        here = (here[:, None] + step[:, 1:]).flatten()
    return torch.cat([*found, here])


def counted(letter: int = WANTED) -> Tensor:
    """[M], float64: how often a letter stands in each string."""
    return (letters() == letter).sum(1).double()


def divergence(logp: Tensor, ref: Tensor) -> float:
    """KL(p || ref) in nats."""
    return float((logp.exp() * (logp - ref)).sum())


def expected(logp: Tensor, values: Tensor) -> float:
    return float((logp.exp() * values).sum())


def drawn(logp: Tensor, count: int, seed: int, *purpose: str | int) -> Tensor:
    """[count]: strings drawn from a distribution."""
    return torch.from_numpy(draws.generator(seed, "claims", *purpose).choice(len(logp), count, p=normal(logp)))


def normal(logp: Tensor) -> np.ndarray:
    shares = logp.exp().numpy()
    return shares / shares.sum()


@cache
def rendered(index: int) -> tuple[list[int], list[bool]]:
    """(tokens, marks) of a string with the prompt before it, and its end token where it has one."""
    row = [each for each in letters()[index].tolist() if each]
    tokens = [END, *row] + ([END] if len(row) < LONGEST else [])
    return tokens, [False] + [True] * (len(tokens) - 1)


# ---- models


def write_model(seed: int) -> LM:
    """A new tiny Llama."""
    tokens: Any = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": None}
    config = LlamaConfig(vocab_size=LETTERS + 1, max_position_embeddings=16, **tokens, **SHAPE)
    with torch.random.fork_rng():
        torch.manual_seed(draws.key(seed, "claims", "weights") % 2**63)
        return fresh(config, SOURCE)


def twin(lm: LM) -> LM:
    """A copy with weights of its own."""
    return LM(copy.deepcopy(lm.model), lm.layout)


def scorer(lm: LM, seed: int | None) -> ScalarLM:
    """A model that scores, with the states of `lm` and a new head: random, or zero where there is no seed."""
    config = copy.deepcopy(lm.model.config)
    config.num_labels, config.pad_token_id = 1, END
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(lm.model.model.state_dict())
    nn.init.zeros_(model.score.weight)
    if seed is not None:
        weight = draws.generator(seed, "claims", "head").standard_normal(model.score.weight.shape)
        model.score.weight.data.copy_(torch.from_numpy(weight / (weight.shape[1] + 1) ** 0.5))
    return wrap_scalar(model, SOURCE)


@cache
def everything() -> list[Sequences]:
    """All strings, some thousands at a time."""
    return [Sequences.of([rendered(index) for index in part.tolist()]) for part in torch.arange(len(letters())).split(1 << 13)]


def scores(lm: ScalarLM) -> Tensor:
    """[M], float64: the score of every string."""
    with torch.no_grad():
        return torch.cat([lm.scores(part) for part in everything()]).double()


# ---- learning


@dataclass
class Watcher:
    """Stands where a recorder stands: asks `look` every so many updates, and hands every update's figures to `figures`."""

    every: int
    look: Callable[[Training], None]
    figures: Callable[[dict[str, float]], None] = lambda _: None

    def step(self, run: Training, _update: Any, figures: dict[str, float], _seconds: float) -> None:
        self.figures(figures)
        if run.step % self.every == 0:
            self.look(run)

    def end(self, _run: Training) -> None:
        pass


def learn(
    policy: Any, learners: dict[str, Learner], updates: Updates, steps: int, roles: Roles | None = None,
    watcher: Watcher | None = None,
) -> None:  # fmt: skip
    run = Training(policy, learners, updates, steps, roles or Roles(), MICRO_TOKENS)
    record: Any = watcher or Watcher(steps, lambda _: None)
    fit(run, record)


def adam(rate: float) -> AdamW:
    return AdamW(learning_rate=rate, schedule="linear", warmup=0.05, final=0.1)


def learner(model: nn.Module, rate: float, prefix: str = "") -> Learner:
    return Learner.of({prefix + name: each for name, each in model.named_parameters()}, adam(rate))


def row_updates(objective: Objective, rows: list[RenderedRow], count: int, seed: int) -> RowUpdates:
    return RowUpdates(objective, [rows], [[f"row {index}" for index in range(len(rows))]], None, count, seed)


def structured(seed: int, count: int, ends: float = 0.12, alone: bool = False) -> list[RenderedRow]:
    """Strings of a random Markov chain in which the wanted letter is rare: what the reference learns from.

    ends: the chance of no further letter. alone: the wanted letter is a string by itself, and stands in no other.
    """
    draw = draws.generator(seed, "claims", "chain")
    chain = draw.dirichlet(np.full(LETTERS, 0.7), LETTERS + 1)
    chain[:, WANTED - 1] = 0.08
    if alone:
        chain[1:, WANTED - 1] = 0.0
    chain /= chain.sum(1, keepdims=True)
    found = []
    for _ in range(count):
        row: list[int] = []
        while len(row) < LONGEST and (not row or draw.random() > ends) and not (alone and row == [WANTED]):
            row.append(1 + int(draw.choice(LETTERS, p=chain[row[-1] if row else 0])))
        tokens = [END, *row] + ([END] if len(row) < LONGEST else [])
        found.append(RenderedRow(((tokens, [False] + [True] * (len(tokens) - 1)),)))
    return found


def reference(seed: int, steps: int, rows: list[RenderedRow] | None = None, rate: float = 3e-3) -> LM:
    """A model that has learned to write structured strings: of `rows`, or 4,096 of the usual ones."""
    lm = write_model(seed)
    updates = row_updates(SFT(), structured(seed, 4096) if rows is None else rows, 64, seed)
    learn(lm, {"policy": learner(lm.model, rate)}, updates, steps)
    return lm


def comparisons(ref: Tensor, reward: Tensor, count: int, seed: int) -> tuple[list[RenderedRow], Tensor]:
    """Pairs of strings drawn from the reference, the winner by Bradley and Terry: with probability sigmoid(difference).

    And [count, 2], float32: log p of both sides under the reference.
    """
    first, second = drawn(ref, count, seed, "first"), drawn(ref, count, seed, "second")
    uniform = torch.from_numpy(draws.generator(seed, "claims", "labels").random(count))
    wins = uniform < torch.sigmoid(reward[first] - reward[second])
    chosen, rejected = torch.where(wins, first, second), torch.where(wins, second, first)
    rows = [RenderedRow((rendered(a), rendered(b)), (1.0, 0.0)) for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    return rows, torch.stack([ref[chosen], ref[rejected]], 1).float()


def reward_model(ref: LM, pairs: list[RenderedRow], steps: int, rows: int, rate: float, seed: int) -> ScalarLM:
    """Trained by `bradley_terry` from the reference."""
    lm = scorer(ref, seed)
    learn(lm, {"policy": learner(lm.model, rate)}, row_updates(BradleyTerry(), pairs, rows, seed), steps)
    return lm


def frozen(lm: LM) -> Roles:
    return Roles(reference=Frozen(twin(lm), micro_tokens=1 << 15), micro_tokens=1 << 15)


class LetterGrader(Grader):
    """The true reward: a table of what each count of the wanted letter is worth."""

    worth: tuple[float, ...]

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        return [Grade(self.worth[one.tokens.count(WANTED)]) for one in samples]


class SetGrader(Grader):
    """1 where a string is one of a set, given by their numbers."""

    right: tuple[int, ...]

    def grade_all(self, samples: Sequence[Sample]) -> list[Grade]:
        chosen = set(self.right)
        return [Grade(float(number_of(one.tokens[1:]) in chosen)) for one in samples]


def number_of(tokens: Sequence[int]) -> int:
    """Which of all strings it is."""
    row = [each for each in tokens if each != END]
    shorter = sum(LETTERS**length for length in range(len(row)))
    return shorter + sum((each - 1) * LETTERS ** (len(row) - 1 - place) for place, each in enumerate(row))


def chosen(chances: Tensor, share: float, seed: int) -> Tensor:
    """Random strings whose probabilities add up to nearly `share`."""
    order = torch.from_numpy(draws.generator(seed, "claims", "set", str(share)).permutation(len(chances)))
    likely = chances[order]
    fits = likely < share / 8  # no single one decides
    order, likely = order[fits], likely[fits]
    return order[likely.cumsum(0) <= share]


def problems_of(rollout: Rollout) -> list[Problem]:
    """As many as a rollout has, all the same."""
    return [Problem(f"string {index}", (Message("user", ""),)) for index in range(rollout.problems)]


def sampled_updates(
    objective: OnPolicy, grader: Grader, policy: Any, roles: Roles, rollout: Rollout, seed: int
) -> SampledUpdates:
    problems = problems_of(rollout)
    roles.controls.update(objective.controls())
    template: Any = Alphabet()
    source = Drawer(objective, problems, grader, InProcess(), rollout, policy, template, roles, seed)
    return SampledUpdates(OnPolicyStream(objective, source, rollout, policy, roles, seed))


def rollout_of(samples: int, epochs: int, minibatches: int) -> Rollout:
    return Rollout(
        problems=samples // 8, per_problem=8, epochs=epochs, minibatches=minibatches, sampling=Sampling(max_tokens=LONGEST)
    )
