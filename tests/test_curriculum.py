"""Which problems come next, by what was measured of them."""

import json

import pytest
from pydantic import ValidationError
from tiny_runs import ROLLOUT, TASK, marks, text, train

from posttrain.pipeline.stage import Interrupted
from posttrain.rl.curriculum import Deck
from posttrain.rl.plan import Curriculum
from posttrain.text import Grade, Message, Problem, Sample
from posttrain.training.settings import TrainSettings

PROBLEMS = [Problem(f"p{number}", (Message("user", "?"),)) for number in range(12)]


def played(deck, count, rate):
    """Draws, and measures what `rate` says of each problem, with 4 answers."""
    chosen = deck.take(count)
    for problem in chosen:
        right = round(4 * rate(problem.id))
        deck.measured([(Sample(problem, index, (), (), (), "end", ""), Grade(float(index < right))) for index in range(4)])
    return [problem.id for problem in chosen]


def test_without_a_curriculum_every_problem_comes_once_an_epoch():
    deck = Deck(PROBLEMS, None, 3)
    first = [problem.id for _ in range(3) for problem in deck.take(4)]
    assert sorted(first) == sorted(problem.id for problem in PROBLEMS)
    assert deck.state() == {"drawn": [12]}


def test_those_nearest_to_the_target_are_drawn_again_and_solved_ones_are_not():
    rates = {"p0": 0.25, "p1": 0.5, "p2": 1.0, "p3": 0.0}
    deck = Deck(PROBLEMS[:4], Curriculum(replay=0.5, target=0.3, memory=0.0), 3)
    assert sorted(played(deck, 4, rates.get)) == ["p0", "p1", "p2", "p3"]
    assert deck.take(4)[:2] == [PROBLEMS[0], PROBLEMS[1]]
    assert [problem.id for problem in deck._again(100) for problem in [PROBLEMS[problem]]] == ["p0", "p1", "p3"]


def test_solved_problems_are_left_out_while_others_are_left():
    deck = Deck(PROBLEMS, Curriculum(replay=0.0, memory=0.0), 3)
    solved = {"p1", "p5", "p7"}
    for _ in range(3):
        played(deck, 4, lambda name: float(name in solved))
    second = [name for _ in range(3) for name in played(deck, 3, lambda name: 0.0)]
    assert not solved & set(second)
    assert len(set(second)) == 9
    alone = Deck(PROBLEMS[:2], Curriculum(replay=0.0), 3)
    played(alone, 2, lambda name: 1.0)
    assert len(alone.take(2)) == 2  # nothing else is left


def test_the_running_rate_is_worked_by_hand():
    deck = Deck(PROBLEMS[:1], Curriculum(memory=0.75), 3)
    played(deck, 1, lambda name: 0.5)
    played(deck, 1, lambda name: 0.0)
    assert deck.rates == {0: (0.375, 2)}


def test_a_deck_goes_on_where_it_was():
    deck = Deck(PROBLEMS, Curriculum(replay=0.5), 3)
    played(deck, 6, lambda name: int(name[1:]) % 5 / 4)
    other = Deck(PROBLEMS, Curriculum(replay=0.5), 3)
    other.load(json.loads(json.dumps(deck.state())))
    for _ in range(3):
        assert played(deck, 6, lambda name: 0.5) == played(other, 6, lambda name: 0.5)


def test_a_run_with_a_curriculum_resumes_bit_for_bit(tmp_path):
    recipe = text("grpo", "lora", rollout={**ROLLOUT, "curriculum": {"replay": 0.5}}, checkpoint={"every": 1})
    expected = marks(train(recipe, tmp_path / "unbroken"))
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "stopped", {3: 15})
    assert marks(train(recipe, tmp_path / "stopped")) == expected
    assert marks(train(text("grpo", "lora", checkpoint={"every": 1}), tmp_path / "plain"))["samples.jsonl"] != expected["samples.jsonl"]


def test_scores_without_a_scale_have_no_rate():
    task = {**TASK, "grader": {"kind": "weighted", "parts": {"a": {"grader": "exact"}}}}
    with pytest.raises(ValidationError, match="has scores of any size, and a rate is from 0 to 1"):
        TrainSettings.model_validate(
            {"model": "posttrain:tiny-base", "objective": "grpo", "task": task, "steps": 1, "rollout": {"curriculum": {}}}
        )
