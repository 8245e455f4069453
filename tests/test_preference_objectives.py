"""Direct preference objectives as they stand in the loop: where they begin, what they see of a pair, and whom they ask.

The losses as functions are in test_preference_losses.py; that batches may be cut, ordered and resumed at will in
test_properties.py and test_resume.py.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from example_batches import EXAMPLES, labelled, only, pairs, sampled_pairs, uncertain
from tiny_fits import TUNERS, Fixed, Watcher, build, fitted, learners, near, ready
from tiny_models import make
from tiny_runs import DATA, PREFERENCES, SHAPE, base, parsed, settings, text, train

from posttrain.batch import Labelled, Pairs, Sequences
from posttrain.data.dataset import Data
from posttrain.data.render import Template
from posttrain.errors import DataError, InputError, ModelError, RecipeError
from posttrain.models.create import create
from posttrain.models.load import load
from posttrain.models.roles import Earlier, Frozen, Roles
from posttrain.objectives import KTO, Objective
from posttrain.objectives.preference import PreferenceObjective, agreement, answer_sums
from posttrain.objectives.unpaired import BCO, UnpairedObjective, mismatched
from posttrain.pipeline.recipe import Recipe
from posttrain.text import RenderedRow
from posttrain.training.fit import Training, fit
from posttrain.training.optim import AdamW
from posttrain.training.roles import cached_references, frozen_roles
from posttrain.training.session import Rows, Session, make_updates
from posttrain.training.updates import Item, Update
from posttrain.tuners import Tuner, tuned

LN2 = math.log(2)
KINDS = {kind: cls for kind, cls in Objective.kinds.items() if issubclass(cls, PreferenceObjective | UnpairedObjective)}


def objective(kind, **fields):
    return Objective.lookup(kind)(**fields)


def item_of(chosen, batch):
    return Update((Item(chosen, batch, [f"row {row}" for row in range(batch.count)]),))


# ---- where they begin: the policy is its reference

START = {  # the loss where all log-ratios are zero
    "dpo": ({}, LN2),
    "dpo smoothed": ({"label_smoothing": 0.2}, LN2),
    "dpo per token": ({"length": "mean", "beta": 5.0}, LN2),
    "robust_dpo": ({"label_smoothing": 0.2}, LN2),
    "ipo": ({"length": "sum", "tau": 0.1}, 25.0),
    "ipo per token": ({"length": "mean", "tau": 0.5}, 1.0),
    "psi_po": ({"tau": 0.1}, 25.0),
    "psi_po log odds": ({"psi": "log_odds", "most_certain": 0.9, "tau": 0.5}, (math.log(9) / 0.5) ** 2),
    "hinge": ({}, 1.0),
    "exo": ({"label_smoothing": 0.01}, -LN2 - 0.5 * math.log(0.01 * 0.99)),
    "nca": ({}, 2 * LN2),
    "sppo": ({"beta": 0.01}, 2 * 50.0**2),
    "apo_zero": ({}, 1.0),
    "apo_down": ({}, 1.0),
    "f_dpo forward": ({"divergence": "forward_kl"}, LN2),
    "f_dpo js": ({"divergence": "js"}, LN2),
    "f_dpo alpha": ({"divergence": "alpha"}, LN2),
    "wpo": ({}, LN2),  # times the weight of each pair
    "kto": ({"weight_good": 1.25, "weight_bad": 1.5}, (1.25 + 1.5) / 4),
    "bco": ({}, LN2),
    "online_dpo": ({}, LN2),
    "xpo": ({}, LN2),
}


def begun(case):
    fields, value = START[case]
    kind = case.split()[0]
    batch = {"kto": labelled, "bco": labelled, "xpo": sampled_pairs}.get(kind, pairs)(None)
    return objective(kind, **fields), batch, value


def test_every_preference_objective_with_a_reference_begins_here():
    asked = {kind for kind, cls in KINDS.items() if "reference" in cls.model_construct().needs}
    assert asked == {case.split()[0] for case in START}
    assert set(KINDS) - asked == {"simpo", "cpo", "orpo"}


def reference_by(way, lm, tuner, name):
    """The reference of the policy as it begins, asked in one of the ways that there are."""
    settings = Tuner.lookup(tuner)(**TUNERS[tuner])
    if way == "the tuner switched off":
        return Roles(Frozen(lm, lambda: settings.switched_off(lm.model), micro_tokens=60))
    if way == "its weights as they were":
        earlier = Earlier(tuned(lm.model))
        return Roles(Frozen(lm, earlier.in_place, micro_tokens=60), earlier)
    return Roles(Frozen(make(name), micro_tokens=60))


WAYS = [
    ("full", "its weights as they were"), ("full", "another model"),
    ("lora", "the tuner switched off"), ("lora", "its weights as they were"), ("lora", "another model"),
]  # fmt: skip


@pytest.mark.parametrize("case", START)
@pytest.mark.parametrize(("tuner", "way"), WAYS)
def test_at_the_start_every_margin_is_zero_and_the_loss_is_its_closed_form(case, tuner, way):
    lm = build("llama", "float32", tuner, moved=False)
    chosen, batch, value = begun(case)
    roles = replace(reference_by(way, lm, tuner, "llama"), controls=chosen.controls(), micro_tokens=60)
    update = item_of(chosen, batch)
    asked = ready(lm, update, roles).items[0].batch
    with torch.no_grad():
        stats = chosen.loss(lm, asked).stats
        for seqs, ref in zip(asked.sequences, asked.refs, strict=True):
            sums = torch.zeros(8, dtype=torch.float64).index_add(0, seqs.owner, lm.logprobs(seqs).double())
            torch.testing.assert_close(sums, ref, rtol=0, atol=1e-5)
    assert all(abs(stats[name][0]) < 5e-5 for name in stats if name.endswith(("margin", "ratio"))), stats
    if chosen.kind == "wpo":
        assert float(asked.weight.min()) < 0.9 < float(asked.weight.max()) <= 1
        value *= float(asked.weight.mean())
    gradient, figures = fitted(lm, update, 60, roles)
    assert figures["loss/preference"] == pytest.approx(value, rel=2e-5)
    assert float(gradient.norm()) > 1e-3
    if chosen.kind == "kto":
        assert figures["point"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_asking_the_reference_leaves_the_policy_as_it_was_bit_for_bit(kind):
    for tuner, way in WAYS:
        lm = build("llama", "float32", tuner)
        chosen, batch, _ = begun(kind)
        roles = replace(reference_by(way, lm, tuner, "llama"), controls=chosen.controls())
        with torch.no_grad():
            for parameter in tuned(lm.model).values():  # as if updates had been made since
                parameter.mul_(1.25)
        before = {name: value.clone() for name, value in lm.model.state_dict().items()}
        seqs = batch.sequences[0]
        with torch.no_grad():
            logp = lm.logprobs(seqs)
        ready(lm, item_of(chosen, batch), roles)
        assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(lm.logprobs(seqs), logp)
        assert all(parameter.grad is None for parameter in lm.parameters())


def test_after_an_update_the_reference_still_says_what_it_said():
    for tuner, way in WAYS:
        lm = build("llama", "float32", tuner, moved=False)
        chosen, batch, _ = begun("dpo")
        roles = reference_by(way, lm, tuner, "llama")
        first = ready(lm, item_of(chosen, batch), roles).items[0].batch
        optim, watcher = AdamW(learning_rate=1e-2, warmup=0.0), Watcher()
        fit(Training(lm, learners(lm, optim), Fixed(item_of(chosen, batch)), 3, roles), watcher)
        later = ready(lm, item_of(chosen, batch), roles).items[0].batch
        assert all(torch.equal(one, other) for one, other in zip(first.refs, later.refs, strict=True)), way
        losses = [figures["loss/preference"] for figures in watcher.metrics]
        assert losses[0] == pytest.approx(LN2, abs=1e-5)
        assert losses[2] < losses[1] < losses[0]


# ---- what they see of a pair: formulas worked out from the model's own logits, one sequence at a time


def sums_alone(lm, seqs):
    """(log p of each answer, its tokens, the mean of log p - log sum p^2) of the tokens that are marked, and of no others."""
    sums, sizes, relative = [], [], []
    for row, marks in zip(seqs.rows(), seqs.train.split(seqs.lengths.tolist()), strict=True):
        with torch.no_grad():
            logp = lm.model(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        places = [place for place, mark in enumerate(marks.tolist()) if mark]
        own = [float(logp[place - 1, row[place]]) for place in places]
        less = [float(torch.logsumexp(2 * logp[place - 1], -1)) for place in places]
        sums.append(sum(own))
        sizes.append(max(1, len(places)))
        relative.append((sum(own) - sum(less)) / max(1, len(places)))
    return sums, sizes, relative


def log_s(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def s(x):
    return math.exp(log_s(x))


def smoothed(m, f):
    return -(1 - f.label_smoothing) * log_s(f.beta * m) - f.label_smoothing * log_s(-f.beta * m)


def exo(m, f):
    q, e = s(f.beta * m), f.label_smoothing
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def moved(x, f):
    if f.divergence == "js":
        return math.log(2) + log_s(x)
    alpha = 0.0 if f.divergence == "forward_kl" else f.alpha
    return (math.exp((alpha - 1) * x) - 1) / (alpha - 1)


def odds(x):
    return x - math.log(1 - math.exp(x)) if x < 0 else x - math.log(torch.finfo(torch.float64).eps)


# the loss of a pair whose first side is the better one: c and r are what each side is measured by, f the settings
FORMULAS = {
    "dpo": lambda c, r, f: smoothed(c - r, f),
    "wpo": lambda c, r, f: smoothed(c - r, f),
    "online_dpo": lambda c, r, f: smoothed(c - r, f),
    "xpo": lambda c, r, f: smoothed(c - r, f),
    "cpo": lambda c, r, f: smoothed(c - r, f),
    "robust_dpo": lambda c, r, f: (
        -(1 - f.label_smoothing) * log_s(f.beta * (c - r)) + f.label_smoothing * log_s(-f.beta * (c - r))
    ) / (1 - 2 * f.label_smoothing),
    "ipo": lambda c, r, f: (c - r - 1 / (2 * f.tau)) ** 2,
    "hinge": lambda c, r, f: max(0.0, 1 - f.beta * (c - r)),
    "exo": lambda c, r, f: exo(c - r, f),
    "nca": lambda c, r, f: -log_s(f.beta * c) - 0.5 * log_s(-f.beta * c) - 0.5 * log_s(-f.beta * r),
    "sppo": lambda c, r, f: (c - 1 / (2 * f.beta)) ** 2 + (r + 1 / (2 * f.beta)) ** 2,
    "apo_zero": lambda c, r, f: 1 - s(f.beta * c) + s(f.beta * r),
    "apo_down": lambda c, r, f: s(f.beta * c) + 1 - s(f.beta * (c - r)),
    "f_dpo": lambda c, r, f: -log_s(f.beta * (moved(c, f) - moved(r, f))),
    "simpo": lambda c, r, f: -log_s(f.beta * (c - r) - f.gamma),
    "orpo": lambda c, r, f: -f.weight * log_s(odds(c) - odds(r)),
}  # fmt: skip


def expected_of(chosen, lm, reference, batch):
    """(terms, margins) of a batch of pairs, worked out row by row."""
    ours, theirs = [sums_alone(lm, seqs) for seqs in batch.sequences], [sums_alone(reference, seqs) for seqs in batch.sequences]
    terms, margins = {}, []
    for row in range(batch.count):
        ratios = []
        for own, ref in zip(ours, theirs, strict=True):
            ratio = own[0][row] - (ref[0][row] if "reference" in chosen.needs else 0.0)
            ratios.append(ratio / own[1][row] if chosen.length == "mean" else ratio)
        margins.append(ratios[0] - ratios[1])
        p = float(batch.prefer[row])
        if chosen.kind == "psi_po":
            p = min(max(p, 1 - chosen.most_certain), chosen.most_certain)
            psi = (lambda x: math.log(x / (1 - x))) if chosen.psi == "log_odds" else (lambda x: x)
            value = (margins[-1] - (psi(p) - psi(1 - p)) / (2 * chosen.tau)) ** 2
        else:
            formula = FORMULAS[chosen.kind]
            value = p * formula(*ratios, chosen)
            value += (1 - p) * formula(*ratios[::-1], chosen) if p < 1 else 0.0
        if chosen.kind == "wpo":
            value *= min(1.0, math.exp(ours[0][2][row] + ours[1][2][row]))
        terms["preference"] = terms.get("preference", 0.0) + value
        if chosen.nll:
            terms["nll"] = terms.get("nll", 0.0) - chosen.nll * ours[0][0][row] / ours[0][1][row]
        if chosen.kind == "xpo":
            terms["optimism"] = terms.get("optimism", 0.0) + chosen.optimism * ours[0 if batch.theirs[row] else 1][0][row]
    return terms, margins


PAIRED = [each for each in EXAMPLES if issubclass(Objective.lookup(each.kind), PreferenceObjective)]


@pytest.mark.parametrize("example", PAIRED, ids=lambda each: f"{each.name}-{each.batch.__name__}")
def test_every_objective_on_pairs_is_its_formula_on_the_answers_alone(example):
    """No token of a prompt enters a sum, the reference's is taken off, the sides are not swapped, means are over answers."""
    lm = make("gpt2", "float64")
    reference = near(lm)
    chosen = example.objective
    batch = only(example.batch(lm), [0, 2, 3, 4, 6, 7])  # each with an answer on both sides
    terms, margins = expected_of(chosen, lm, reference, batch)
    update = ready(lm, item_of(chosen, batch), Roles(Frozen(reference, micro_tokens=60)))
    loss = chosen.loss(lm, update.items[0].batch)
    assert {name: float(term.detach()) for name, term in loss.terms.items()} == pytest.approx(terms, rel=2e-6)
    assert loss.stats["margin"] == (pytest.approx(sum(margins), rel=1e-5, abs=1e-5), 6)
    right = [0.5 + 0.5 * math.copysign(1, m) * (0 if p == 0.5 else math.copysign(1, p - 0.5))
             for m, p in zip(margins, batch.prefer.tolist(), strict=True)]  # fmt: skip
    assert loss.stats["accuracy"] == (pytest.approx(sum(right)), 6)
    assert min(abs(margin) for margin in margins) > 1e-3
    assert chosen.units(batch) == dict.fromkeys(terms, 6), "means over pairs"


def test_the_figures_tell_what_became_of_each_side():
    lm = make("gpt2", "float64")
    reference = near(lm)
    batch = pairs(None)
    figures = fitted(lm, item_of(objective("dpo"), batch), 45, Roles(Frozen(reference)))[1]
    ours, theirs = [sums_alone(lm, each)[0] for each in batch.sequences], [sums_alone(reference, each)[0] for each in batch.sequences]
    for side, name in enumerate(("chosen", "rejected")):
        assert figures[f"{name}_logp"] == pytest.approx(sum(ours[side]) / 8)
        assert figures[f"{name}_ratio"] == pytest.approx((sum(ours[side]) - sum(theirs[side])) / 8, rel=1e-5)
    assert figures["margin"] == pytest.approx(figures["chosen_ratio"] - figures["rejected_ratio"], rel=1e-6)


def test_the_prompt_of_a_pair_is_computed_once_for_both_sides_and_of_a_group_of_pairs_once_for_all():
    lm, laid = make("llama"), []
    states = lm.states
    lm.states = lambda tree, plan: laid.append(len(tree.tokens)) or states(tree, plan)
    batch = only(pairs(None), [0])  # a prompt of 20 tokens; answers of 3 and 4
    with torch.no_grad():
        objective("simpo").loss(lm, batch)
        assert laid == [20 + 3 + 4]
        ready(lm, item_of(objective("dpo"), batch), Roles(Frozen(lm)))
        assert laid[1:] == [20 + 3 + 4], "the reference, too"
        objective("simpo").loss(lm, only(pairs(None), [0, 4, 7]))
    assert laid[2] == 20 + (3 + 9 + 5) + (4 + 2 + 7)


ORDERED = [each for each in PAIRED if each.kind != "xpo"]


def swapped(batch):
    return replace(batch, chosen=batch.rejected, rejected=batch.chosen, prefer=1 - batch.prefer)


@pytest.mark.parametrize("example", ORDERED, ids=lambda each: f"{each.name}-{each.batch.__name__}")
def test_a_pair_written_the_other_way_round_with_its_label_is_the_same_pair(example):
    lm = make("gpt2", "float64")
    roles, chosen = Roles(Frozen(near(lm))), example.objective
    found = []
    for batch in (uncertain(lm), swapped(uncertain(lm))):
        update = ready(lm, item_of(chosen, batch), roles)
        found.append(chosen.loss(lm, update.items[0].batch))
    one, other = found
    for term in one.terms:
        assert float(one.terms[term].detach()) == pytest.approx(float(other.terms[term].detach()), rel=1e-6)
    assert float(one.stats["margin"][0]) == pytest.approx(-float(other.stats["margin"][0]), rel=1e-9)
    assert float(one.stats["accuracy"][0]) == float(other.stats["accuracy"][0])


@pytest.mark.parametrize("example", [each for each in ORDERED if each.kind != "psi_po"], ids=lambda each: f"{each.name}-{each.batch.__name__}")
def test_a_soft_label_is_the_expectation_over_both_orders(example):
    lm = make("gpt2", "float64")
    chosen = example.objective
    (item,) = ready(lm, item_of(chosen, uncertain(lm)), Roles(Frozen(near(lm)))).items
    batch, sure = item.batch, torch.ones(1)
    total = 0.0
    for row in range(8):
        single = batch.select([row])
        p = float(single.prefer[0])
        for weight, side in ((p, single), (1 - p, replace(swapped(single), chosen_ref=single.rejected_ref, rejected_ref=single.chosen_ref))):
            total += weight * float(sum(chosen.loss(lm, replace(side, prefer=sure)).terms.values()).detach())
    assert float(sum(chosen.loss(lm, batch).terms.values()).detach()) == pytest.approx(total, rel=1e-7)


def test_a_tie_is_half_right_and_so_is_a_label_that_says_nothing():
    margin, prefer = torch.tensor([2.0, -1.0, 0.0, 0.5, 3.0, -2.0]), torch.tensor([1.0, 1.0, 1.0, 0.5, 0.2, 0.2])
    assert agreement(margin, prefer).tolist() == [1.0, 0.0, 0.5, 0.5, 0.0, 1.0]
    lm = make("llama")
    same = replace(pairs(None), rejected=pairs(None).chosen)
    with torch.no_grad():
        assert objective("simpo").loss(lm, same).stats["accuracy"] == (4.0, 8)


def cube(probability):
    return probability**3


def test_psi_may_be_a_function_of_ones_own():
    lm = make("gpt2", "float64")
    batch, chosen = only(uncertain(None), [0, 3]), objective("psi_po", psi="test_preference_objectives:cube", tau=0.2)
    roles = Roles(Frozen(near(lm)))
    margins = expected_of(objective("psi_po"), lm, roles.reference.lm, batch)[1]
    wanted = sum((m - (p**3 - (1 - p) ** 3) / 0.4) ** 2 for m, p in zip(margins, (0.9, 0.75), strict=True))
    (item,) = ready(lm, item_of(chosen, batch), roles).items
    assert float(chosen.loss(lm, item.batch).terms["preference"].detach()) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="test_preference_objectives"):
        objective("psi_po", psi="test_preference_objectives:cub")


# ---- single answers


def kto_point(lm, reference, seqs):
    """z by hand: each prompt with the answer of the next row whose prompt is another one."""
    prompts, answers = [], []
    for row, marks in zip(seqs.rows(), seqs.train.split(seqs.lengths.tolist()), strict=True):
        begin = marks.tolist().index(True)
        prompts.append(row[:begin])
        answers.append(row[begin:])
    crossed = []
    for index, prompt in enumerate(prompts):
        step = next(step for step in range(1, len(prompts)) if prompts[(index + step) % len(prompts)] != prompt)
        answer = answers[(index + step) % len(prompts)]
        crossed.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    batch = Sequences.of(crossed)
    gaps = [one - other for one, other in zip(sums_alone(lm, batch)[0], sums_alone(reference, batch)[0], strict=True)]
    return sum(gaps) / len(gaps)


@pytest.mark.parametrize("seed", [1, 3])
def test_ktos_z_is_that_of_the_whole_update_whatever_the_micro_batches(seed):
    lm = make("gpt2", "float64")
    reference = near(lm, seed=seed)
    chosen, batch = KTO(beta=0.1, weight_bad=1.5), only(labelled(None), [0, 2, 3, 4, 6, 7])
    z = kto_point(lm, reference, batch.seqs)
    assert (z > 0.01) == (seed == 3), "one is cut off at zero"
    z = max(0.0, z)
    ours, theirs = sums_alone(lm, batch.seqs)[0], sums_alone(reference, batch.seqs)[0]
    total = 0.0
    for one, other, good in zip(ours, theirs, batch.good.tolist(), strict=True):
        total += 1 - s(0.1 * (one - other - z)) if good else 1.5 * (1 - s(0.1 * (z - one + other)))
    for micro_tokens in (1, 45, 10**6):
        for asked_at_once in (1, 70, 10**6):
            roles = Roles(Frozen(reference, micro_tokens=asked_at_once), micro_tokens=asked_at_once)
            figures = fitted(lm, item_of(chosen, batch), micro_tokens, roles)[1]
            assert figures["point"] == pytest.approx(z, abs=1e-6)
            assert figures["loss/preference"] == pytest.approx(total / 6, rel=1e-6)


def test_prompts_are_crossed_with_answers_to_other_prompts_and_their_answers_alone_are_marked():
    rows = [([1, 2, 3, 4], 2), ([1, 2, 9], 2), ([5, 6, 7], 1), ([8, 8, 8], 3)]  # the last has no answer
    seqs = Sequences.of([(row, [place >= begin for place in range(len(row))]) for row, begin in rows])
    crossed = mismatched(seqs)
    assert crossed.rows() == [[1, 2, 6, 7], [1, 2, 6, 7], [5, 3, 4], [8, 8, 8, 3, 4]]
    assert crossed.trained_lengths.tolist() == [2, 2, 2, 2]
    assert mismatched(seqs.select([0, 1])) is None


def test_no_prompt_meets_an_answer_that_does_not_fit_or_tokens_that_were_not_answered():
    seqs = Sequences.of([
        ([1, 2, 3], [False, False, True]),
        ([4, 5, 6, 7, 8, 9], [False, False, True, False, False, True]),  # a turn of the user within
        ([4, 5, 6], [False, False, True]),
    ])  # fmt: skip
    assert mismatched(seqs, 5).rows() == [[1, 2, 6], [4, 5, 3], [4, 5, 3]]
    wide = mismatched(seqs, 6)
    assert wide.rows()[0] == [1, 2, 6, 7, 8, 9]
    assert wide.train[:6].tolist() == [False, False, True, False, False, True]
    assert mismatched(seqs, 2) is None


def test_an_update_of_one_prompt_is_refused_by_kto():
    lm, batch = make("llama"), only(labelled(None), [0, 4, 7])
    with pytest.raises(DataError, match=r"objective kto compares each prompt with another one's answer, .* one prompt only, or answers that fit no other prompt into the model's context; raise batch\.rows"):
        ready(lm, item_of(KTO(), batch), Roles(Frozen(lm)))


def test_bcos_shift_is_the_running_mean_of_the_rewards_of_the_updates_before():
    lm = make("gpt2", "float64")
    reference, chosen = near(lm), BCO(beta=0.2, decay=0.75)
    batch = only(labelled(None), [0, 2, 3, 4, 6, 7])
    ratios = [one - other for one, other in zip(sums_alone(lm, batch.seqs)[0], sums_alone(reference, batch.seqs)[0], strict=True)]
    sides = {flag: [ratio for ratio, good in zip(ratios, batch.good.tolist(), strict=True) if good == flag] for flag in (True, False)}
    reward = 0.2 * sum(sum(side) / len(side) for side in sides.values()) / 2
    still, shifts, figures = SimpleNamespace(clip=None, rate=lambda *_: 0.0, build=None), [0.0], Watcher()
    for _ in range(3):
        shifts.append(0.75 * shifts[-1] + 0.25 * reward)
    learning = learners(lm, AdamW(learning_rate=1e-30, warmup=0.0, weight_decay=0.0))
    learning["policy"].optim = still
    roles = Roles(Frozen(reference), controls=chosen.controls())
    fit(Training(lm, learning, Fixed(item_of(chosen, batch)), 3, roles, micro_tokens=45), figures)
    assert [each["point"] for each in figures.metrics] == pytest.approx(shifts[:3], rel=1e-5, abs=1e-8)
    assert [each["bco_shift"] for each in figures.metrics] == pytest.approx(shifts[1:], rel=1e-5)
    for each, shift in zip(figures.metrics, shifts, strict=False):
        wanted = [-log_s((0.2 * ratio - shift) * (1 if good else -1)) for ratio, good in zip(ratios, batch.good.tolist(), strict=True)]
        assert each["loss/preference"] == pytest.approx(sum(wanted) / 6, rel=1e-6)


def test_of_a_pair_each_side_is_an_answer_of_its_own_where_answers_are_single():
    sides = ([1, 2], [False, True]), ([1, 3, 4], [False, True, True])
    for prefer, good in ((1.0, (1.0, 0.0)), (0.5, (1.0, 0.0)), (0.25, (0.0, 1.0))):
        parts = KTO().split(RenderedRow(sides, (prefer, 0.0)))
        assert [part.sequences for part in parts] == [(sides[0],), (sides[1],)]
        assert tuple(part.numbers[0] for part in parts) == good
    single = RenderedRow((sides[0],), (1.0,))
    assert BCO().split(single) == (single,)
    assert objective("dpo").split(RenderedRow(sides, (1.0, 0.0))) == (RenderedRow(sides, (1.0, 0.0)),)


# ---- a reference that follows (TR-DPO)


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_reference_that_follows_moves_by_its_formula_and_by_nothing_else(tuner):
    lm = build("llama", "float32", tuner)
    parameters = tuned(lm.model)
    earlier = Earlier(parameters, every=2, mix=0.6)
    roles = Roles(Frozen(lm, earlier.in_place), earlier)
    wanted = {name: value.detach().clone() for name, value in parameters.items()}
    seen = []

    class Follower(Watcher):
        def step(self, run, update, metrics, seconds):
            super().step(run, update, metrics, seconds)
            if run.step % 2 == 0:
                for name, value in parameters.items():
                    wanted[name] = 0.6 * value.detach() + 0.4 * wanted[name]
            for name, value in wanted.items():
                torch.testing.assert_close(earlier.copies[name], value, rtol=1e-6, atol=1e-7)
            assert any(not torch.equal(earlier.copies[name], value) for name, value in parameters.items())
            seen.append(roles.tensors()["reference"].keys() == parameters.keys())

    figures = Follower()
    fit(Training(lm, learners(lm, AdamW(learning_rate=3e-3, warmup=0.0)), Fixed(item_of(objective("dpo"), pairs(None))), 5, roles), figures)
    assert seen == [True] * 5
    margins = [each["margin"] for each in figures.metrics]
    assert abs(margins[2]) < abs(margins[1]), "it came nearer after the second update"


def test_a_reference_that_follows_whole_is_the_policy_again():
    lm = build("llama", "float32", "full")
    earlier = Earlier(tuned(lm.model), every=1, mix=1.0)
    figures = Watcher()
    roles = Roles(Frozen(lm, earlier.in_place), earlier)
    fit(Training(lm, learners(lm, AdamW(learning_rate=1e-2)), Fixed(item_of(objective("dpo"), pairs(None))), 3, roles), figures)
    assert [each["loss/preference"] for each in figures.metrics] == pytest.approx([LN2] * 3, abs=1e-5)
    assert Roles(earlier=Earlier(tuned(lm.model))).tensors() == {}, "one that stays is no part of a checkpoint"


def test_a_mixed_reference_keeps_half_of_its_weights_and_says_the_same():
    lm = build("llama", "float32", "full")
    lm.mixed = True
    parameters, rounded = tuned(lm.model), lm.read_in_bfloat16()
    whole, half = Earlier(parameters), Earlier(parameters, rounded=rounded)
    before = {name: each.detach().clone() for name, each in parameters.items()}
    both = [Frozen(lm, each.in_place).sums(*pairs(None).sequences) for each in (whole, half)]
    with torch.no_grad():
        for each in parameters.values():
            each.mul_(1.5)
    both += [Frozen(lm, each.in_place).sums(*pairs(None).sequences) for each in (whole, half)]
    moved = Frozen(lm).sums(*pairs(None).sequences)
    for one in both:
        assert all(map(torch.equal, one, both[0])), "bit for bit, whatever the policy has become"
    assert not torch.equal(moved[0], both[0][0])
    assert all(torch.equal(each, 1.5 * before[name]) and each.dtype == torch.float32 for name, each in parameters.items())
    kept = {name for name, each in half.copies.items() if each.dtype == torch.bfloat16}
    assert kept == {name for name, each in parameters.items() if each in rounded} != set()
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in kept)
    lm.mixed = False
    assert lm.read_in_bfloat16() == set(), "float32 reads them as they are"


def test_sums_of_long_answers_keep_their_digits():
    seqs = Sequences.of([([1] * 501, [False] + [True] * 500)] * 2)
    logp = torch.full((1000,), -8.3)
    logp[3] += 2e-5
    one, other = answer_sums(logp, seqs)
    assert float(one - other) == pytest.approx(float(logp[3].double() - logp[4].double()), rel=1e-6)


# ---- a reference that is asked once


def begun_stage(folder, kind="dpo", adapter="full", **changes):
    """(updates, roles, policy) of a stage as the training session makes them, before its first update."""
    stage = parsed(text(kind, adapter, **changes)).stages["train"]
    loaded = load(stage.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stage.tuner.install(loaded.lm.model)
    roles = frozen_roles(stage, loaded, tuned(loaded.lm.model))
    session = Session(folder, "owner")
    updates, _ = make_updates(stage, session, loaded.lm, Template(loaded.tokenizer), roles, Rows.read(stage))
    return updates, roles, loaded.lm


def cache_files(root):
    return sorted(root.glob("cache/*"))


@pytest.mark.parametrize("adapter", TUNERS)
@pytest.mark.parametrize("kind", ["dpo", "bco"])
def test_what_is_cached_of_the_reference_is_what_it_says_when_asked(kind, adapter, tmp_path):
    updates, roles, lm = begun_stage(tmp_path / "one", kind, adapter, reference={"cache": True})
    assert roles.reference is None, "none is in memory while training"
    others, asked, policy = begun_stage(tmp_path / "two", kind, adapter)
    for _ in range(4):
        (item,), (other,) = next(updates).items, next(others).items
        assert item.batch.refs
        assert not other.batch.refs
        assert item.labels == other.labels
        (known,) = ready(lm, Update((item,)), roles).items
        (said,) = ready(policy, Update((other,)), asked).items
        for one, two in zip(known.batch.refs, said.batch.refs, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert len(cache_files(tmp_path)) == 1


def test_a_second_stage_with_the_same_rows_does_not_ask_again_and_a_changed_row_or_reference_does(tmp_path, monkeypatch):
    cached = {"reference": {"cache": True}}
    begun_stage(tmp_path / "first", **cached)
    (file,) = cache_files(tmp_path)
    written = file.stat().st_mtime_ns
    other = tmp_path / "other"
    moved = load(parsed(text("dpo")).stages["train"].model)
    with torch.no_grad():
        moved.lm.model.model.norm.weight.add_(0.1)
    moved.lm.model.save_pretrained(other)
    moved.tokenizer.save_pretrained(other)
    with monkeypatch.context() as patch:
        patch.setattr(Frozen, "sums", lambda *_: pytest.fail("asked again"))
        updates, _, _ = begun_stage(tmp_path / "second", objective={"kind": "ipo", "length": "sum"}, **cached)
        assert next(updates).items[0].batch.refs
        begun_stage(tmp_path / "third", "dpo", "lora", **cached)
    changed = json.loads(json.dumps(PREFERENCES))
    changed["sources"]["items"][3]["rejected"] += " No."
    begun_stage(tmp_path / "fourth", data=changed, **cached)
    assert len(cache_files(tmp_path)) == 2
    begun_stage(tmp_path / "fifth", reference={"cache": True, "model": str(other)})
    assert len(cache_files(tmp_path)) == 3
    begun_stage(tmp_path / "sixth", model=str(other), **cached)
    assert len(cache_files(tmp_path)) == 3, "the same reference, whether it is named or what the stage starts from"
    assert file.stat().st_mtime_ns == written


def test_a_run_with_cached_references_is_the_run_with_live_ones(tmp_path):
    rows = []
    for cache in (True, False):
        folder = train(text("dpo", steps=3, reference={"cache": cache}), tmp_path / str(cache))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows.append([{name: line[name] for name in ("loss/preference", "margin", "grad_norm", "chosen_ratio")} for line in lines])
    assert len(rows[0]) == 3
    assert rows[0][0]["loss/preference"] == pytest.approx(LN2, abs=1e-5)
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=2e-5)


def test_the_cache_is_asked_of_another_model_where_the_recipe_names_one(tmp_path):
    stage = parsed(text("dpo", reference={"cache": True})).stages["train"]
    loaded = load(stage.model)
    rows = [[RenderedRow((([1, 2, 3], [False, True, True]), ([1, 4], [False, True])), (1.0, 0.0))]]
    session = Session(tmp_path / "x", "owner")
    (found,) = cached_references(stage, session.cache, loaded.lm, loaded.tokenizer, rows, session.say)
    batch = Pairs.from_rows(rows[0])
    with torch.no_grad():
        wanted = [float(loaded.lm.logprobs(each).sum()) for each in batch.sequences]
    assert found.tolist() == [pytest.approx(wanted, rel=1e-6)]
    assert found.dtype == torch.float64


# ---- what is refused before anything is loaded

LABELS = {"sources": {"kind": "inline", "items": [{"prompt": f"{a}?", "completion": "Yes.", "label": True} for a in range(3)]}}


def read(stage):
    """As a session reads its rows: parsed, then judged by the objective."""
    return Rows.read(stage).settled(stage)


def refused_rows(kind, **changes):
    with pytest.raises(DataError) as caught:
        read(parsed(text(kind, **changes)).stages["train"])
    return str(caught.value)


@pytest.mark.parametrize("kind", ["kto", "bco"])
def test_answers_of_one_class_are_refused(kind):
    assert refused_rows(kind, data=LABELS) == (
        f"inline:1: all 3 answers are good; objective {kind} learns from good and bad ones: add the others, or take sft for "
        "good ones alone"
    )
    bad = json.loads(json.dumps(LABELS))
    for item in bad["sources"]["items"]:
        item["label"] = False
    assert "all 3 answers are bad" in refused_rows(kind, data=bad)
    mixed = json.loads(json.dumps(LABELS))
    mixed["sources"]["items"][1]["label"] = False
    read(parsed(text(kind, data=mixed)).stages["train"])
    read(parsed(text(kind, data=PREFERENCES)).stages["train"])  # a pair is one of each


def test_log_odds_of_a_certain_label_are_refused_with_its_row():
    soft = json.loads(json.dumps(PREFERENCES))
    for item in soft["sources"]["items"]:
        item["prefer"] = 0.8
    log_odds = {"kind": "psi_po", "psi": "log_odds"}
    Rows.read(parsed(text("dpo", objective=log_odds, data=soft)).stages["train"])
    soft["sources"]["items"][2]["prefer"] = 1.0
    assert refused_rows("dpo", objective=log_odds, data=soft) == (
        "inline:3: objective psi_po with psi log_odds has no finite target where a preference is as certain as 1; give the "
        "column `prefer` (a probability), or set objective.most_certain below 1"
    )
    Rows.read(parsed(text("dpo", objective={**log_odds, "most_certain": 0.99}, data=soft)).stages["train"])
    Rows.read(parsed(text("dpo", objective="psi_po", data=soft)).stages["train"])


@pytest.mark.parametrize("kind", [kind for kind, cls in KINDS.items() if "beta" in cls.model_fields])
@pytest.mark.parametrize("beta", [0, -0.1, "nan"])
def test_a_strength_that_is_not_above_zero_is_refused_with_its_line(kind, beta):
    recipe = f"model: x/y\nsteps: 3\nobjective:\n  kind: {kind}\n  beta: {beta}\n"
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe, name="bad.yaml")
    first = str(caught.value).splitlines()[0]
    assert first.startswith("bad.yaml:5: objective"), first
    assert "beta: input should be" in first


REFUSED = [
    ("kto", {"reference": {"cache": True}}, "reference.cache: objective kto asks the reference about something else at every"),
    ("dpo", {"objective": "simpo", "reference": {"cache": True}}, "objective simpo, as it is set, compares with no reference; remove"),
    ("dpo", {"objective": "orpo", "reference": {"refresh": {"every": 2}}}, "objective orpo, as it is set, compares with no reference"),
    ("sft", {"reference": "x/y"}, "objective sft, as it is set, compares with no reference; remove the section `reference`"),
    ("grpo", {"reference": "x/y"}, "objective grpo, as it is set, compares with no reference"),
    ("grpo", {"objective": {"kind": "grpo", "kl": 0.1}, "reference": {"cache": True}}, "reference.cache: objective grpo asks"),
    ("grpo", {"objective": "online_dpo", "reference": {"cache": True}}, "reference.cache: objective online_dpo asks"),
    ("dpo", {"reference": {"cache": True, "refresh": {"every": 2}}}, "cannot be asked once; take cache or refresh"),
    ("dpo", {"reference": {"path": "x/y", "refresh": {"every": 2}}}, "reference.*refresh"),
    ("dpo", {"critic": {"shared": True}}, "objective dpo trains no critic; remove the section `critic`"),
    ("ppo", {"critic": None}, "objective ppo trains a critic: add the section `critic`"),
    ("ppo", {"critic": {"shared": True, "model": "x/y"}}, "a shared critic is a head on the policy's states: it takes no `model`"),
    ("ppo", {"critic": {"shared": True, "tuner": {"kind": "lora", "rank": 2}}}, "it takes no `model` and no `tuner`"),
    ("dpo", {"normalise": {}}, "objective dpo trains no reward model; remove the section `normalise`"),
    ("bradley_terry", {"mix": {"objective": "sft", "data": DATA}}, "trains a model that scores and does not write; remove `mix`"),
    ("bradley_terry", {"reference": "x/y"}, "objective bradley_terry, as it is set, compares with no reference"),
    ("dpo", {"objective": "ipo"}, "objective.*length: is missing; this setting must be given"),
    ("dpo", {"objective": {"kind": "simpo", "length": "sum"}}, "length"),
    ("dpo", {"objective": {"kind": "exo", "label_smoothing": 0}}, "label_smoothing: input should be greater than 0"),
    ("dpo", {"objective": {"kind": "dpo", "label_smoothing": 0.5}}, "label_smoothing: input should be less than 0.5"),
    ("dpo", {"objective": {"kind": "psi_po", "psi": "odds"}}, "'odds' names no function; write identity, log_odds, or"),
    ("dpo", {"mix": {"objective": "dpo", "data": PREFERENCES}}, "objective dpo cannot be mixed in"),
    ("dpo", {"reference": {"refresh": {"mix": 0}}}, "mix: input should be greater than 0"),
]


@pytest.mark.parametrize(("kind", "changes", "words"), REFUSED)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_loaded(kind, changes, words):
    recipe = {key: value for key, value in settings(kind, **changes).items() if value is not None}
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(json.dumps({**recipe, "model": "no/such"}), name="tiny")


def test_a_refused_combination_is_told_with_its_line():
    recipe = "model: x/y\nsteps: 3\ndata: rows.jsonl\nobjective:\n  kind: dpo\n  bta: 0.2\n"
    with pytest.raises(RecipeError, match=r"^bad\.yaml:6: objective\.bta: no such setting; did you mean 'beta'\?$"):
        Recipe.parse(recipe, name="bad.yaml")


def test_a_reference_of_another_family_is_refused(tmp_path):
    create(["other words altogether, and 9 of them"] * 9, 300, SHAPE, 1, tmp_path / "other")
    with pytest.raises(ModelError, match=r"reference: .* has another tokenizer than the policy"):
        begun_stage(tmp_path / "x", reference={"path": str(tmp_path / "other")})


def test_labelled_batches_hold_what_annotate_found():
    lm = make("llama")
    (item,) = ready(lm, item_of(KTO(), labelled(None)), Roles(Frozen(near(lm)))).items
    assert isinstance(item.batch, Labelled)
    assert item.batch.ref.shape == item.batch.point.shape == (8,)
    assert len(set(item.batch.point.tolist())) == 1


def test_a_reference_named_by_other_words_or_in_another_precision_is_the_start_itself():
    told = []
    stage = parsed(text("dpo", model={"path": str(base()), "dtype": "mixed"}, reference=str(base()))).stages["train"]
    loaded = load(stage.model)
    roles = frozen_roles(stage, loaded, {}, told.append)
    assert roles.reference.lm is loaded.lm
    assert not told


def test_a_critic_of_a_run_of_a_given_time_has_a_constant_rate_too():
    stage = settings("ppo", critic={"optim": {"learning_rate": 1e-3}}, seconds=5, optim={"schedule": "constant", "warmup": 0})
    del stage["steps"]
    with pytest.raises(InputError, match=r"set critic\.optim\.schedule: constant and critic\.optim\.warmup: 0"):
        parsed(json.dumps(stage))
    stage["critic"]["optim"] |= {"schedule": "constant", "warmup": 0}
    parsed(json.dumps(stage))


def test_a_pair_whose_sides_differ_only_in_what_the_template_leaves_out_is_counted_as_equal():
    loaded = load(str(base()))
    loaded.tokenizer.chat_template = loaded.tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    items = [{"prompt": "What?", "chosen": "yes", "rejected": "yes "}, {"prompt": "What?", "chosen": "yes", "rejected": "no"}]
    data = Data.model_validate({"sources": {"kind": "inline", "items": items}})
    rendered = data.render(data.read(), Template(loaded.tokenizer))
    assert {reason: each.count for reason, each in rendered.dropped.items()} == {"chosen and rejected are the same": 1}


def test_rows_that_cannot_be_measured_on_are_refused_before_training():
    certain = {"kind": "inline", "items": [{"prompt": "a", "chosen": "b", "rejected": "c", "prefer": 1.0}]}
    unsure = {"kind": "inline", "items": [{"prompt": "a", "chosen": "b", "rejected": "c", "prefer": 0.7}]}
    stage = parsed(text("dpo", objective={"kind": "psi_po", "psi": "log_odds"}, data={"sources": unsure}, validation={"data": {"sources": certain}})).stages["train"]
    with pytest.raises(DataError, match=r"no finite target where a preference is as certain as 1"):
        read(stage)
