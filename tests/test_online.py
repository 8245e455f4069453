"""Direct preference learning on what the policy samples now: which pairs are made, what is learned from them, and where it ends."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from test_ppo import TASK, Seen, divergence, played, prepared, rollout
from test_reward_models import made
from tiny_models import make
from torch import tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from posttrain.batch import Pairs, Sequences
from posttrain.errors import RunError
from posttrain.objectives import Objective
from posttrain.rl import rollouts
from posttrain.text import Grade, Problem, Sample
from posttrain.training.fit import fit
from posttrain.training.record import Recorder
from posttrain.training.settings import Checkpoints, TrainSettings

KINDS = ["online_dpo", "xpo"]
TUNERS = {"full": "full", "lora": {"kind": "lora", "rank": 4}}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    made(folder / "start")
    made(folder / "other", seed=1)
    return folder


def answer(problem, token, index=0, stop="end", by="policy", logp=-1.0):
    """An answer of one token after a prompt of one."""
    return Sample(Problem(problem, ()), index, (ord(problem[0]), token), (False, True), (logp,), stop, "", by=by)


def paired(objective, graded):
    """[(problem, better token, worse token)] and the batch."""
    samples, scores = zip(*graded, strict=True)
    batch, owners = objective.credit(
        samples, [score if isinstance(score, Grade) else Grade(score) for score in scores], None, None, 1.0
    )
    assert batch.count == len(owners)
    assert batch.prefer.tolist() == [1.0] * len(owners)
    assert batch.margin.tolist() == [0.0] * len(owners)
    found = []
    for owner, better, worse in zip(owners, batch.chosen.rows(), batch.rejected.rows(), strict=True):
        assert better[0] == worse[0] == ord(owner[0]), "both answer its own prompt"
        found.append((owner, better[1], worse[1]))
    return found, batch


def kind(name="online_dpo", **settings):
    return Objective.lookup(name)(**settings)


# ---- which pairs


def test_the_best_answer_to_each_prompt_is_paired_with_the_worst_and_prompts_are_never_mixed():
    graded = [
        (answer("q", 20, 0), 0.5), (answer("p", 10, 0), 3.0), (answer("p", 11, 1), 9.0), (answer("q", 21, 1), 0.25),
        (answer("p", 12, 2), -1.0), (answer("r", 30, 0), 100.0), (answer("q", 22, 2), 0.3),
    ]  # fmt: skip
    found, batch = paired(kind(), graded)
    assert found == [("p", 11, 12), ("q", 20, 21)]
    assert batch.theirs is None
    assert batch.chosen.train.tolist() == batch.rejected.train.tolist() == [False, True] * 2


def test_ties_equal_answers_and_failures_give_no_pair():
    graded = [
        (answer("p", 10, 0), 1.0), (answer("p", 11, 1), 1.0),  # equally good
        (answer("q", 20, 0), 2.0), (answer("q", 20, 1), 1.0),  # the same answer, graded by a moody grader
        (answer("r", 30, 0), Grade(None, failure="?")), (answer("r", 31, 1), 5.0),  # one that could not be graded
        (answer("s", 40, 0), Grade(None, failure="?")), (answer("s", 41, 1), 5.0), (answer("s", 42, 2), 4.0),
    ]  # fmt: skip
    assert paired(kind(), graded)[0] == [("s", 41, 42)]
    none, batch = paired(kind(), graded[:6])
    assert (none, batch.count, batch.chosen.count) == ([], 0, 0)


def test_an_answer_that_was_cut_off_is_compared_by_its_score_less_the_penalty():
    graded = [(answer("p", 10, 0, stop="length"), 3.0), (answer("p", 11, 1), 2.0), (answer("p", 12, 2), 1.0)]
    assert paired(kind(), graded)[0] == [("p", 10, 12)]
    assert paired(kind(no_end_penalty=0.5), graded)[0] == [("p", 10, 12)]
    assert paired(kind(no_end_penalty=1.5), graded)[0] == [("p", 11, 12)]
    assert paired(kind(no_end_penalty=5.0), graded)[0] == [("p", 11, 10)]
    assert paired(kind(no_end_penalty=1.0), graded[:2])[0] == [], "now a tie"


def test_xpo_pairs_an_answer_of_the_policy_with_one_of_the_reference_draw_by_draw():
    """Never two of the policy, however good and bad they are."""
    graded = [
        (answer("p", 10, 0), 9.0), (answer("p", 11, 1), -9.0), (answer("p", 12, 2), 1.0),
        (answer("q", 20, 0), 1.0),
        (answer("p", 13, 0, by="reference"), 0.0), (answer("p", 14, 1, by="reference"), 0.5), (answer("p", 15, 2, by="reference"), 1.0),
        (answer("q", 21, 0, by="reference"), 2.0),
    ]  # fmt: skip
    found, batch = paired(kind("xpo"), graded)
    assert found == [("p", 10, 13), ("p", 14, 11), ("q", 21, 20)]
    assert batch.theirs.tolist() == [False, True, True]
    alone = [(answer("p", 10, 0), 9.0), (answer("p", 11, 0, by="reference"), Grade(None, failure="?")), (answer("p", 12, 1), 0.0)]
    assert paired(kind("xpo"), alone)[0] == []


def test_a_reference_that_is_asked_once_a_row_does_not_go_with_sampling():
    for name in KINDS:
        with pytest.raises(
            ValidationError, match=f"reference.cache: objective {name} asks the reference about something else at every update"
        ):
            TrainSettings.model_validate(
                {"model": "m", "objective": name, "task": TASK, "steps": 1, "reference": {"cache": True}}
            )


# ---- when there is nothing to learn


def graded_by(run, scores):
    """Replaces the grader: rollout by rollout (from 1), by what `scores(rollout, row)` says."""
    stream = run.updates.stream
    run.asked = []

    def grade_all(samples):
        if samples:
            run.asked.append(stream.rollout)
        return [Grade(float(scores(stream.rollout, row))) for row in range(len(samples))]

    stream.source.grader = SimpleNamespace(grades=grade_all, prepare=lambda _: None)


@pytest.mark.parametrize("first", [1, 2, 10])
def test_a_rollout_without_a_pair_is_sampled_anew(first, home, tmp_path):
    run = prepared(home, tmp_path, "online_dpo")
    graded_by(run, lambda rollout, row: row if rollout >= first else 1.0)
    update = next(run.updates)
    assert update.items[0].batch.count == 3
    assert run.asked == list(range(1, first + 1))
    assert update.stats["reward"] == (sum(range(12)), 12), "the figures are those of the rollout that is learned from"


def test_after_ten_rollouts_without_a_pair_the_run_stops_with_what_to_do(home, tmp_path):
    run = prepared(home, tmp_path, "online_dpo")
    graded_by(run, lambda rollout, row: 0.25)
    with pytest.raises(RunError) as error:
        next(run.updates)
    assert str(error.value) == (
        "10 rollouts in a row gave nothing to learn from (up to rollout 10): the answers to each problem have equal scores (mean "
        "reward 0.25) or are the same; take easier or harder problems, more answers of each (rollout.per_problem), or a grader "
        "that tells more apart"
    )
    assert run.asked == list(range(1, rollouts.BARREN + 1))


# ---- what is learned from a pair


def whole_logp(folder, seqs):
    """log p of each answer by transformers, sequence by sequence."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for row, marks in zip(seqs.rows(), seqs.train.split(seqs.lengths.tolist()), strict=True):
        with torch.no_grad():
            table = model(input_ids=tensor([row])).logits[0].double().log_softmax(-1)
        found.append(sum(float(table[place - 1, row[place]]) for place in marks.nonzero()[:, 0].tolist()))
    return tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pairs_are_scored_anew_and_what_the_sampler_said_plays_no_part(temperature, home, tmp_path):
    """Against a reference of other weights; both are asked at temperature 1, whatever was sampled at."""
    run = prepared(
        home, tmp_path, {"kind": "online_dpo", "beta": 0.3}, reference=str(home / "other"), rollout=rollout(temperature), steps=1
    )
    pairs = next(run.updates).items[0].batch
    assert 1 <= pairs.count <= 3
    assert not hasattr(pairs, "sampled_logp")
    policy, reference = ([whole_logp(home / name, side) for side in pairs.sequences] for name in ("start", "other"))
    margin = (policy[0] - reference[0]) - (policy[1] - reference[1])
    again = prepared(
        home, tmp_path, {"kind": "online_dpo", "beta": 0.3}, reference=str(home / "other"), rollout=rollout(temperature), steps=1
    )
    stream, said = again.updates.stream, Seen()
    whole = stream.source._answers

    def lying(*args):
        return [
            Sample(**{**{name: getattr(one, name) for name in one.__slots__}, "logp": tuple(-50.0 for _ in one.logp)})
            for one in whole(*args)
        ]

    stream.source._answers = lying
    fit(again, said)
    assert said.figures[0]["loss/preference"] == pytest.approx(float(-logsigmoid(0.3 * margin).mean()), rel=1e-4)
    assert said.figures[0]["margin"] == pytest.approx(float(margin.mean()), rel=1e-4)


@pytest.mark.parametrize("tuner", TUNERS)
def test_an_update_makes_the_better_answers_likelier_than_the_worse_ones(tuner, home, tmp_path):
    run = prepared(home, tmp_path, "online_dpo", tuner=TUNERS[tuner], rollout=rollout(epochs=3), steps=3)
    seen = Seen()
    fit(run, seen)
    first, *_, last = seen.figures
    assert first["loss/preference"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["margin"] > 0.1
    assert last["accuracy"] == 1


# ---- xpo


@pytest.mark.parametrize("tuner", TUNERS)
def test_the_references_answers_are_drawn_with_the_tuner_off_or_the_earlier_weights(tuner, home, tmp_path):
    """After the policy has moved, they are still what the start writes under the same draws."""
    run = prepared(
        home, tmp_path, {"kind": "xpo", "optimism": 0.0}, tuner=TUNERS[tuner], optim={"learning_rate": 0.1, "warmup": 0.0}
    )
    fit(run, Seen())
    stream, drawn = run.updates.stream, []
    whole = stream.objective.credit

    def credit(samples, *rest):
        drawn.extend(samples)
        return whole(samples, *rest)

    moved = {name: value.detach().clone() for name, value in run.learners["policy"].parameters.items()}
    stream.objective = SimpleNamespace(also_samples={"reference"}, credit=credit)
    next(stream)
    assert all(torch.equal(value, moved[name]) for name, value in run.learners["policy"].parameters.items()), "the policy is back"
    theirs = [one for one in drawn if one.by == "reference"]
    ours = [one for one in drawn if one.by == "policy"]
    assert len(theirs) == len(ours) == 12
    assert {(one.problem.id, one.index) for one in theirs} == {(one.problem.id, one.index) for one in ours}
    for one in theirs:
        seqs = Sequences.of([(one.tokens, one.sampled)])
        assert sum(one.logp) == pytest.approx(float(whole_logp(home / "start", seqs)[0]), abs=1e-4)
    apart = [abs(sum(one.logp) - float(whole_logp(home / "start", Sequences.of([(one.tokens, one.sampled)]))[0])) for one in ours]
    assert min(apart) > 1e-3, "the policy has moved"
    assert [one.tokens for one in theirs] != [one.tokens for one in ours]


def test_a_reference_of_its_own_is_sampled_from_too(home, tmp_path):
    run = prepared(home, tmp_path, "xpo", reference=str(home / "other"))
    pairs = next(run.updates).items[0].batch
    assert pairs.count > 3, "a pair for each draw"
    sums = [whole_logp(home / name, pairs.chosen) for name in ("start", "other")]
    likelier = (sums[1] > sums[0]).tolist()
    assert likelier == pairs.theirs.tolist(), "each is likelier under the model that wrote it"


def xpo_pairs():
    """Pairs of the tiny model's, three of which the reference has won or lost."""
    draw = torch.Generator().manual_seed(1)
    sides = []
    prompts = [torch.randint(0, 97, (size,), generator=draw).tolist() for size in (4, 20, 7)]
    for sizes in ((3, 5, 2), (2, 6, 4)):
        sides.append(
            Sequences.of([
                (prompt + torch.randint(0, 97, (size,), generator=draw).tolist(), [False] * len(prompt) + [True] * size)
                for prompt, size in zip(prompts, sizes, strict=True)
            ])
        )  # fmt: skip
    refs = [torch.randn(3, generator=draw) - 20 for _ in range(2)]
    return Pairs(*sides, torch.ones(3), torch.zeros(3), *refs, theirs=tensor([True, False, False]))


def test_the_optimism_of_xpo_is_the_mean_log_probability_of_the_references_whole_answers():
    lm, pairs = make("gpt2", "float64"), xpo_pairs()
    objective = kind(
        "xpo", optimism=0.03, length="mean"
    )  # an answer's mean for the comparison; the sum for the optimism all the same
    loss = objective.loss(lm, pairs)
    with torch.no_grad():
        chosen, rejected = (
            side.split(seqs.trained_lengths.tolist())
            for side, seqs in zip(lm.logprobs(*pairs.sequences), pairs.sequences, strict=True)
        )
    theirs = float(chosen[0].sum() + rejected[1].sum() + rejected[2].sum())
    assert objective.units(pairs) == {"preference": 3, "optimism": 3}
    assert float(loss.terms["optimism"].detach()) == pytest.approx(0.03 * theirs, rel=1e-9)
    weights = list(lm.model.parameters())
    gradient = torch.autograd.grad(loss.terms["optimism"], weights, retain_graph=True)
    more = [value - 1e-4 * slope for value, slope in zip(weights, gradient, strict=True)]
    with torch.no_grad():
        for value, new in zip(weights, more, strict=True):
            value.copy_(new)
        after = float(objective.loss(lm, pairs).terms["optimism"])
    assert after < float(loss.terms["optimism"].detach()), "a step makes them less likely"


@pytest.mark.parametrize("settings", [{}, {"beta": 0.5, "label_smoothing": 0.1, "nll": 0.2}])
def test_without_optimism_xpo_is_online_dpo_on_the_mixed_pairs(settings):
    lm, pairs = make("gpt2", "float64"), xpo_pairs()
    weights = list(lm.model.parameters())
    found = []
    for objective in (kind("online_dpo", **settings), kind("xpo", optimism=0.0, **settings)):
        loss = objective.loss(lm, pairs)
        total = sum(term / objective.units(pairs)[name] for name, term in loss.terms.items())
        found.append((float(total.detach()), torch.cat([each.flatten() for each in torch.autograd.grad(total, weights)])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-12)
    assert float(found[0][1].norm()) > 1e-3


# ---- taken up again


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tuner", TUNERS)
def test_pairs_that_wait_are_taken_up_again_bit_for_bit(name, tuner, home, tmp_path):
    """Two minibatches a rollout, twice: the run is interrupted while some of them wait."""
    plan = rollout(problems=6, epochs=2, minibatches=2)

    def finish(folder, stop_at=None):
        run = prepared(home, folder, {"kind": name}, tuner=TUNERS[tuner], rollout=plan, steps=5)
        record = Recorder(folder, "owner", Checkpoints(every=10))
        record.interrupted = lambda: "SIGTERM" if run.step == stop_at else None
        resumed = record.resume(run)
        waiting = [list(rows) for rows in run.updates.stream.pending]
        fit(run, record)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return resumed, waiting, run, [{each: value for each, value in line.items() if each != "time"} for line in lines]

    for each in ("whole", "broken"):
        (tmp_path / each).mkdir()
    _, _, whole, figures = finish(tmp_path / "whole")
    finish(tmp_path / "broken", stop_at=2)
    resumed, waiting, again, same = finish(tmp_path / "broken")
    assert resumed
    assert len(waiting) == 2
    assert same == figures
    assert all(torch.equal(value, again.parameters[each]) for each, value in whole.parameters.items())


# ---- where it ends: a bandit


REFERENCE = (0.3, 0.05, 0.2, 0.25, 0.1, 0.1)


@pytest.mark.parametrize(("name", "steps"), [("online_dpo", 20), ("xpo", 60)])
def test_a_ranking_of_arms_moves_the_mass_to_the_best_of_them(name, steps):
    """Rewards of any size rank the same: only the order counts. XPO learns of an arm only against what the reference draws."""
    rewards = (0.2, 1e6, -0.5, 0.0, 0.6, -1.0)
    found = played(kind(name, beta=0.1), REFERENCE, rewards, samples=32, steps=steps, rate=0.03)
    assert float(found[1]) > 0.85
    assert float(found[5]) < 0.01


def test_a_larger_beta_stays_closer_to_the_reference():
    there = tensor(REFERENCE, dtype=torch.float64)
    rewards = (0.2, 1.0, -0.5, 0.0, 0.6, -1.0)
    found = [
        divergence(played(kind(beta=beta), REFERENCE, rewards, samples=32, steps=20, rate=0.03), there) for beta in (0.1, 3.0)
    ]
    assert found[1] < 0.5 * found[0]


def test_a_policy_that_always_says_the_best_has_nothing_more_to_learn_and_the_run_says_so():
    with pytest.raises(
        RunError, match=r"10 rollouts in a row gave nothing to learn from .* or are the same; take easier or harder problems"
    ):
        played(kind(beta=0.1), REFERENCE, (0.2, 1.0, -0.5, 0.0, 0.6, -1.0), samples=8, steps=60, rate=0.05)
