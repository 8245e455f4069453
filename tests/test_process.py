"""Rewards on the way: what steps earn, where in the tokens they stand, and the advantages that are made of them. Worked by hand."""

import pytest
import tiny_tokenizers
import torch
import worlds
from pydantic import ValidationError

from posttrain import losses
from posttrain.batch import Sequences
from posttrain.data.render import Template
from posttrain.models.roles import Roles
from posttrain.objectives import Objective
from posttrain.objectives.policy_gradient import stepwise
from posttrain.tasks import Grader
from posttrain.text import Grade, Message, Problem, Sample, Transcript

ASK = Problem("p", (Message("user", "Go."),), answer="7", facts={"level": 3})
TEMPLATE = Template(tiny_tokenizers.make("chatml"))


def written(text, problem=ASK, **fields):
    """A sample as it would have been drawn."""
    prompt, tokens = TEMPLATE.prompt(problem.prompt), TEMPLATE.tokenizer(text)["input_ids"]
    drawn = [*tokens, TEMPLATE.end_id]
    return Sample(
        problem, 0, (*prompt, *drawn), (False,) * len(prompt) + (True,) * len(drawn), (-1.0,) * len(drawn), "end", text, **fields
    )


def seqs_of(*lengths):
    return Sequences.of([([1] + [2] * length, [False] + [True] * length) for length in lengths])


# ---- advantages


def test_a_token_has_the_normalised_rewards_of_its_step_and_of_those_after_it():
    """Two answers of one group: steps (1, 0) at tokens 2 and 4 of 4, and (1) at token 3 of 3.

    The mean of 1, 0, 1 is 2/3, its deviation (Bessel) 0.57735: normalised 0.57725, -1.15450, 0.57725 with 1e-4 added.
    """
    seqs = seqs_of(4, 3)
    rewards, ends = stepwise([Grade(1.0, steps=((2, 1.0), (4, 0.0))), Grade(1.0, steps=((3, 1.0),))], seqs)
    assert (rewards.tolist(), ends.tolist()) == ([1.0, 0.0, 1.0], [1, 3, 6])
    high, low = (1 / 3) / (3**-0.5 + 1e-4), (-2 / 3) / (3**-0.5 + 1e-4)
    found = losses.step_advantages(rewards, ends, seqs.owner, torch.tensor([0, 0]))
    wanted = [high + low, high + low, low, low, high, high, high]
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-6)
    apart = losses.step_advantages(rewards, ends, seqs.owner, torch.tensor([0, 1]), "none")
    assert torch.allclose(apart, torch.tensor([0.0, 0.0, -0.5, -0.5, 0.0, 0.0, 0.0]))


def test_what_is_to_come_is_compared_with_what_is_to_come_from_the_same_step_on():
    """Rewards (1, 0, 2) and (0, 4): to come 3, 2, 2 and 4, 4. The means are 3.5 and 3 for the first two steps, 2 for the third."""
    seqs = seqs_of(6, 5)
    rewards, ends = stepwise(
        [Grade(3.0, steps=((1, 1.0), (3, 0.0), (6, 2.0))), Grade(4.0, steps=((2, 0.0), (4, 4.0)))], seqs
    )
    found = losses.return_advantages(rewards, ends, seqs.owner, torch.tensor([0, 0]), "none")
    assert found.tolist() == [-0.5, -1, -1, 0, 0, 0, 0.5, 0.5, 1, 1, 0]  # the last token is of no step
    scaled = losses.return_advantages(rewards, ends, seqs.owner, torch.tensor([0, 0]))
    assert torch.allclose(scaled[0], torch.tensor(-0.5 / (0.5**0.5 + 1e-4)))
    none = losses.return_advantages(rewards[:0], ends[:0], seqs.owner, torch.tensor([0, 0]))
    assert none.tolist() == [0.0] * 11


def test_with_one_step_at_the_end_all_ways_are_one():
    seqs = seqs_of(3, 2, 4)
    grades = [Grade(1.0), Grade(0.0), Grade(0.5)]
    rewards, ends = stepwise(grades, seqs)
    groups = torch.tensor([0, 0, 0])
    outcome = losses.group_advantages(torch.tensor([1.0, 0.0, 0.5]), groups)[seqs.owner]
    assert torch.allclose(losses.step_advantages(rewards, ends, seqs.owner, groups), outcome)
    assert torch.allclose(losses.return_advantages(rewards, ends, seqs.owner, groups), outcome)


@pytest.mark.parametrize("supervision", ["outcome", "process", "to_go"])
def test_an_objective_learns_from_the_steps_that_it_is_set_to(supervision):
    objective = Objective.model_validate({"kind": "grpo", "supervision": supervision, "scale": "none"})
    samples = [written("a b c d"), written("e f g h")]
    lasts = [len(one.logp) for one in samples]
    grades = [Grade(1.0, steps=((2, 1.0), (lasts[0], 0.0))), Grade(1.0, steps=((2, 0.0), (lasts[1], 1.0)))]
    batch, _ = objective.credit(samples, grades, None, Roles(), 1.0)
    of_first = batch.advantage[: lasts[0]]
    wanted = {"outcome": [0.0, 0.0], "process": [0.0, -0.5], "to_go": [0.0, -0.5]}[supervision]
    assert (float(of_first[0]), float(of_first[-1])) == tuple(wanted)


def test_the_critic_s_family_puts_each_reward_on_its_step():
    objective = Objective.model_validate({"kind": "ppo", "supervision": "process", "kl": 0})
    seqs = seqs_of(3, 2)
    grades = [Grade(9.0, steps=((1, 0.25), (3, 0.75))), Grade(0.5)]
    assert objective._earned(grades, [9.0, 0.5], seqs).tolist() == [0.25, 0.0, 0.75, 0.0, 0.5]
    whole = Objective.model_validate({"kind": "ppo", "kl": 0})
    assert whole._earned(grades, [9.0, 0.5], seqs).tolist() == [0.0, 0.0, 9.0, 0.0, 0.5]


def test_steps_are_refused_where_nothing_compares_them():
    with pytest.raises(ValidationError, match="compares steps with those of the group"):
        Objective.model_validate({"kind": "reinforce_pp", "supervision": "process"})


# ---- graders


SUMS = {"kind": "lines", "line": "equation"}


@pytest.mark.parametrize(
    ("line", "right"),
    [("2 + 3 = 5", 1), ("2 * (3 + 4) = 14", 1), ("14 = 2 * 7", 1), ("2 + 3 = 6", 0), ("5", 0), ("2 + 3 = 5 = 5", 0), ("x = 5", 0),
     ("", 0), ("1 / 0 = 1 / 0", 0), ("10 / 4 = 2.5", 1), ("= 5", 0), ("so 2 + 3 = 5", 0)],
)  # fmt: skip
def test_an_equation_is_true_or_not(line, right):
    assert Grader.model_validate("equation").grade(ASK, line).score == right


def test_each_line_is_a_step_that_ends_with_its_line_break():
    text = "2 + 3 = 5\n\n5 * 2 = 11\n11 - 4 = 7"
    grader = Grader.model_validate({**SUMS, "outcome": "equations", "weight": 0.5})
    grader.prepare(TEMPLATE)
    one = written(text)
    (grade,) = grader.grades([one])
    assert (grade.score, grade.parts["outcome"]) == (1.0, 1.0)
    assert abs(grade.parts["lines"] - 0.5 * 2 / 3) < 1e-12
    assert [reward for _, reward in grade.steps] == [0.5, 0.0, 0.5, 1.0]
    drawn = [token for token, own in zip(one.tokens, one.sampled, strict=True) if own]
    upto = [TEMPLATE.decode(drawn[:end]) for end, _ in grade.steps]
    assert upto[0].rstrip("\n") == "2 + 3 = 5"
    assert upto[1] == "2 + 3 = 5\n\n5 * 2 = 11\n"
    assert upto[2:] == [f"{text}<|im_end|>"] * 2


def test_without_an_outcome_the_score_is_the_share_of_right_lines():
    grader = Grader.model_validate(SUMS)
    grader.prepare(TEMPLATE)
    assert grader.open_scale
    assert [grade.score for grade in grader.grades([written("1 + 1 = 2\n1 + 1 = 3"), written("")])] == [0.5, 0.0]
    assert grader.grade(ASK, "1 + 1 = 2").score == 1.0


def test_the_lines_of_an_episode_are_those_of_its_last_turn():
    one = written("talk\n2 + 2 = 4\n1 = 2")
    first = TEMPLATE.tokenizer("talk\n")["input_ids"]
    episode = Transcript((), ends=(len(first), len(one.logp)))
    grader = Grader.model_validate(SUMS)
    grader.prepare(TEMPLATE)
    told = Sample(one.problem, 0, one.tokens, one.sampled, one.logp, "end", "2 + 2 = 4\n1 = 2", transcript=episode)
    (grade,) = grader.grades([told])
    drawn = [token for token, own in zip(one.tokens, one.sampled, strict=True) if own]
    assert [(TEMPLATE.decode(drawn[:end]), reward) for end, reward in grade.steps] == [
        ("talk\n2 + 2 = 4\n", 1.0), ("talk\n2 + 2 = 4\n1 = 2<|im_end|>", 0.0),
    ]  # fmt: skip


def test_a_weighted_sum_has_the_steps_of_its_parts():
    grader = Grader.model_validate(
        {"kind": "weighted", "parts": {"way": {"grader": SUMS, "weight": 2.0}, "end": {"grader": "equations", "weight": 3.0}}}
    )
    grader.prepare(TEMPLATE)
    one = written("1 + 1 = 2\n2 + 5 = 7")
    (grade,) = grader.grades([one])
    assert grade.score == 2.0 + 3.0
    assert [reward for _, reward in grade.steps] == [2.0, 2.0, 3.0]
    assert grade.steps[-1][0] == len(one.logp)


def test_a_step_that_is_no_number_is_a_failure():
    class Odd(Grader):
        def grade(self, problem, text):
            return Grade(1.0, steps=((1, float("nan")),))

    assert Odd().grades([written("a")])[0].failure == "the grader's step 1 is nan"


def test_a_reward_function_of_trl_is_asked_for_all_answers_at_once():
    grader = Grader.model_validate({"kind": "reward_function", "path": "worlds:by_length"})
    grades = grader.grades([written("ab"), written("abc"), written("none")])
    assert [grade.score for grade in grades] == [2 + 3 + 7, 3 + 3 + 7, None]
    assert "None, not a number" in grades[2].failure
    assert worlds.ASKED["prompts"][0] == [{"role": "user", "content": "Go."}]
    assert worlds.ASKED["completions"][1] == [{"role": "assistant", "content": "abc"}]
    assert TEMPLATE.decode(worlds.ASKED["completion_ids"][0]) == "ab<|im_end|>"
    plain = Grader.model_validate({"kind": "reward_function", "path": "worlds:by_length", "plain": True})
    assert plain.grades([written("ab")])[0].score == 12
    assert worlds.ASKED["prompts"] == ["Go."]
    for name, why in (("too_few", "returned 1 rewards for 2 answers"), ("bad", "raised ZeroDivisionError: division by zero")):
        grades = Grader.model_validate({"kind": "reward_function", "path": f"worlds:{name}"}).grades([written("a"), written("b")])
        assert [grade.failure.partition(" (worlds.py:")[0] for grade in grades] == [f"worlds:{name} {why}"] * 2


@pytest.mark.parametrize(("name", "why"), [("later", "is a coroutine"), ("unclear", r"takes neither `completions` nor \*\*columns")])
def test_a_reward_function_that_cannot_be_asked_is_refused(name, why):
    with pytest.raises(ValidationError, match=why):
        Grader.model_validate({"kind": "reward_function", "path": f"worlds:{name}"})


def test_a_reward_function_that_never_answers_is_given_up():
    grader = Grader.model_validate({"kind": "reward_function", "path": "worlds:never", "seconds": 0.2})
    assert [grade.failure for grade in grader.grades([written("a")] * 2)] == ["worlds:never has not answered in 0.2 s"] * 2
    worlds.RELEASED.set()
