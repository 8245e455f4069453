"""What a run says of its own reward: before it begins, and when a part of it rises while the accuracy falls."""

import json
from types import SimpleNamespace

import pytest
from tiny_runs import ROLLOUT, SUMS, parsed, text

from posttrain.evaluation.audit import holes_of
from posttrain.pipeline.run import Listener, run
from posttrain.rl import Drawn, OnPolicyStream, Rollout
from posttrain.tasks import Task
from posttrain.training.watch import mean_and_error, signs


def history(parts, accuracy, every=4, width=0.04):
    """Rows of a run: parts[k] is what the parts are in the k-th stretch between validations."""
    rows = []
    for stretch, (values, value) in enumerate(zip(parts, accuracy, strict=True)):
        for place in range(every):
            wave = 0.01 * (place % 2)
            rows.append({"step": len(rows) + 1, **{name: number + wave for name, number in values.items()}})
        rows[-1]["validation"] = {"pass@1": {"value": value, "low": value - width, "high": value + width, "count": 100}}
        assert rows[-1]["step"] == every * (stretch + 1)
    return rows


def test_a_part_that_rises_while_the_accuracy_falls_is_named():
    rows = history([{"reward": 0.5, "reward/length": 0.2, "reward/right": 0.5}, {"reward": 0.8, "reward/length": 0.9, "reward/right": 0.3}], [0.5, 0.3])
    found = signs(rows, 4)
    assert [sign.split(" has risen")[0] for sign in found] == ["reward", "reward/length"]
    assert "from 0.205 to 0.905 since step 4, and pass@1 has fallen from 0.5 to 0.3" in found[1]


@pytest.mark.parametrize(
    ("parts", "accuracy"),
    [
        ([0.2, 0.9], [0.5, 0.6]),  # both rise
        ([0.9, 0.2], [0.5, 0.3]),  # both fall
        ([0.2, 0.9], [0.5, 0.45]),  # the intervals meet
        ([0.2, 0.204], [0.5, 0.3]),  # the part moves within its noise
        ([0.2], [0.5]),  # nothing to compare
    ],
)
def test_it_says_nothing_where_there_is_no_sign(parts, accuracy):
    assert signs(history([{"reward/length": part} for part in parts], accuracy), 4) == []


def test_the_best_validation_is_what_is_compared_with():
    rows = history([{"reward/a": part} for part in (0.1, 0.5, 0.9)], [0.3, 0.6, 0.4])
    assert "from 0.505 to 0.905 since step 8" in signs(rows, 4)[0]


def test_the_error_of_a_mean_is_worked_by_hand():
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == (2.5, (5 / 3 / 4) ** 0.5)


def test_updates_without_a_rollout_of_their_own_do_not_hide_it():
    """With several minibatches the reward stands in the first one's row only."""
    rows = history([{"reward/a": 0.1}, {"reward/a": 0.9}], [0.6, 0.3])
    for row in rows[1::2]:
        del row["reward/a"]
    assert len(signs(rows, 4)) == 1


def test_a_bare_number_of_held_out_data_is_no_accuracy():
    """A reward model's validation has a `score`, which is not measured on a task and has no interval."""
    rows = history([{"reward/a": 0.1}, {"reward/a": 0.9}], [0.6, 0.3])
    for row in rows:
        if "validation" in row:
            row["validation"] = {"loss": 0.5, "score": row["validation"]["pass@1"]["value"]}
    assert signs(rows, 4) == []


HOLED = {"kind": "problems", "grader": {"kind": "regex", "pattern": "{answer}", "match": "anywhere"}}


def test_a_planted_hole_is_said_before_a_run_begins_and_not_again(tmp_path):
    items = [{"id": f"p{a}{b}", "prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in SUMS]
    recipe = text("grpo", "lora", task={**HOLED, "source": {"kind": "inline", "items": items}}, rollout=ROLLOUT, steps=1)
    said = []
    run(parsed(recipe), tmp_path, Listener(say=said.append))
    (hole,) = [line for line in said if "pays answers that should earn nothing" in line]
    assert "grader regex" in hole
    assert "posttrain audit" in hole
    said.clear()
    none = recipe.replace('"problems": 4', '"problems": 4, "audit": 0')
    run(parsed(none), tmp_path / "none", Listener(say=said.append))
    assert not [line for line in said if "should earn nothing" in line]


@pytest.mark.parametrize("kind", ["arithmetic", "gsm8k", "countdown", "rooms"])
def test_nothing_is_said_of_a_reward_without_a_hole(kind):
    task = Task.model_validate({"kind": kind, "limit": 5})
    assert holes_of(task, task.problems()) == []


def test_programs_that_leave_before_their_tests_are_mentioned_above_two_in_a_hundred():
    said = []
    source = SimpleNamespace(take=lambda *_: Drawn((), ()))
    objective = SimpleNamespace(planned=lambda _: objective, refills=0)
    stream = OnPolicyStream(objective, source, Rollout(), None, None, 0, said.append)
    for share in (1, 3, 4, 7):
        stream._mention_ended({"reward/ended_early": (float(share), 100), "reward/passed": (90.0, 100)})
    assert [line.split("%")[0] for line in said] == ["3.0", "7.0"]


def test_a_run_whose_reward_is_hacked_says_so(tmp_path):
    """The reward pays for length, validation for being right: what is written down is enough to see it."""
    rows = history([{"reward": 0.1}, {"reward": 0.9}], [0.9, 0.1])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from posttrain.training.record import Lines

    assert len(signs(Lines(tmp_path / "metrics.jsonl").read(), 4)) == 1
