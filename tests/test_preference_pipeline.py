"""From samples to pairs to a reward model and policies, through a recipe: what each stage makes of the one before."""

import json
import math
from pathlib import Path

import pytest
from tiny_runs import SHAPE, base

from posttrain.errors import InputError, ModelError, RunError
from posttrain.evaluation.preferences import Judged, preference_figures
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.report import write_report
from posttrain.pipeline.run import run
from posttrain.pipeline.stage import Context, fingerprints
from posttrain.synth.pairs import pairs_of
from posttrain.text import Grade, Message, Problem, Sample

WORDS = ["yes", "no", "ab", "b a", "aa", "of course", "a cat", "seven"]
SOURCE = {"kind": "inline", "items": [{"id": f"p{i}", "prompt": f"Say something, {word}"} for i, word in enumerate(WORDS)]}
TASK = {"kind": "problems", "source": SOURCE, "grader": {"kind": "function", "path": "test_preference_pipeline:letters"}}
ANSWERS = {"kind": "inline", "items": [{"prompt": [{"role": "user", "content": f"Say something, {a}"}], "completion": b} for a in WORDS for b in WORDS]}
SAMPLING = {"max_tokens": 24}
COMPARED = {"sources": {"kind": "stage", "stage": "pairs"}}
RANKER = {"kind": "reward_model", "model": {"stage": "reward"}}
SHORT = {"steps": 4, "optim": {"learning_rate": 1e-2}, "batch": {"rows": 8}}


def letters(_problem, text):
    """A true reward that many samples differ in."""
    return float(text.count("a")) - 0.5 * text.count("e")


def evaluated(kind, **more):
    return {"kind": "evaluate", "model": {"stage": kind}, "task": TASK, "kl_to": {"stage": "sft"}, "evaluation": {"samples": 4, "greedy": False, "sampling": SAMPLING}, **more}  # fmt: skip





def recipe():
    stages = {
        "sft": {"model": str(base()), "objective": "sft", "data": {"sources": ANSWERS, "format": "prompt_completion"}, "steps": 60, "optim": {"learning_rate": 1e-2}, "batch": {"rows": 16}},
        "pairs": {"kind": "pairs", "model": {"stage": "sft"}, "task": TASK, "per_problem": 6, "sampling": SAMPLING, "choice": "bradley_terry", "scale": 2.0},
        "reward": {"model": {"stage": "sft"}, "objective": "bradley_terry", "data": COMPARED, "normalise": {"unit_variance": True}, **SHORT},
        "dpo": {"vary": {"objective.beta": [0.1, 0.5]}, "model": {"stage": "sft"}, "objective": "dpo", "data": COMPARED, "reference": {"cache": True}, **SHORT},
        "kto": {"model": {"stage": "sft"}, "objective": "kto", "data": COMPARED, "tuner": "lora", **SHORT},
        "ppo": {"model": {"stage": "sft"}, "objective": "ppo", "critic": {"model": {"stage": "reward"}}, "task": {**TASK, "grader": RANKER}, "rollout": {"problems": 8, "per_problem": 1, "sampling": SAMPLING}, "steps": 2},
        "sft_test": evaluated("sft"),
        "dpo_test": evaluated("dpo"),
        "kto_test": evaluated("kto"),
        "ppo_test": evaluated("ppo"),
        "best_of": evaluated("sft", vary={"evaluation.samples": [2, 4]}, evaluation={"samples": 2, "greedy": False, "sampling": SAMPLING, "best_of": {"ranker": RANKER}}),
        "reward_test": {"kind": "evaluate_pairs", "model": {"stage": "reward"}, "data": COMPARED},
        "implicit_test": {"kind": "evaluate_pairs", "model": {"stage": "dpo-0.1"}, "reference": {"stage": "sft"}, "beta": 0.1, "data": COMPARED},
    }  # fmt: skip
    return Recipe.parse(json.dumps({"stages": stages}), name="tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(recipe(), tmp_path_factory.mktemp("runs"))


def rows_of(finished):
    return [json.loads(line) for line in (finished.folders["pairs"] / "rows.jsonl").read_text().splitlines()]


def test_pairs_are_two_different_answers_to_one_prompt_with_their_scores(finished):
    rows = rows_of(finished)
    assert len(rows) == finished.stages["pairs"]["pairs"] > 8
    for row in rows:
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        assert chosen != rejected
        assert row["chosen_score"] == letters(None, chosen)
        assert row["rejected_score"] == letters(None, rejected)
        assert row["prompt"][-1]["content"].startswith("Say something")
    agreement = sum(row["chosen_score"] > row["rejected_score"] for row in rows) / len(rows)
    assert agreement == finished.stages["pairs"]["agreement"]


def test_stages_with_the_same_rows_and_reference_ask_the_reference_once(finished):
    assert len(list((finished.folder / "cache").glob("reference-*.safetensors"))) == 1


def test_a_kto_stage_learns_from_both_sides_of_each_pair(finished):
    assert finished.stages["kto"]["data"]["rows"] == len(rows_of(finished))
    lines = [json.loads(line) for line in (finished.folders["kto"] / "metrics.jsonl").read_text().splitlines()]
    assert {"good_ratio", "bad_ratio", "point"} <= set(lines[0])


def test_best_of_n_gives_the_bound_on_its_divergence_and_a_score_of_the_chosen(finished):
    for count in (2, 4):
        metrics = finished.stages[f"best_of-{count}"]["metrics"]
        assert metrics["kl"]["value"] == pytest.approx(math.log(count) - (count - 1) / count)
        assert "pass@1" not in metrics or metrics["score"]["count"] == len(WORDS)


def test_pairs_are_scored_by_a_reward_model_and_by_a_policy_beside_the_length_baseline(finished):
    own, implicit = (finished.stages[name]["metrics"] for name in ("reward_test", "implicit_test"))
    assert own["longer_wins"] == implicit["longer_wins"]
    for metrics in (own, implicit):
        assert 0 <= metrics["accuracy"]["low"] <= metrics["accuracy"]["value"] <= metrics["accuracy"]["high"] <= 1
        assert {"gap", "loss", "calibration_error"} <= set(metrics)


def test_the_report_draws_score_against_divergence_for_every_method(finished):
    page = write_report(finished.folder).read_text()
    assert "Reward against divergence" in page
    for name in ("dpo", "best_of", "kto", "ppo", "sft"):
        assert f">{name}<" in page.split("<figure class=\"frontier\">")[1].split("</figure>")[0]
    assert "longer wins" in page


def test_a_stage_that_makes_no_rows_is_refused_as_a_source():
    value = {"stages": {"sft": {"model": "m", "objective": "sft", "data": "x.jsonl", "steps": 1}, "dpo": {"model": "m", "objective": "dpo", "data": {"sources": {"kind": "stage", "stage": "sft"}}, "steps": 1}}}  # fmt: skip
    with pytest.raises(InputError, match="stage 'dpo' wants the rows of stage 'sft', but a stage of kind train makes none"):
        Recipe.parse(json.dumps(value))


def test_a_divergence_from_a_model_that_reads_other_tokens_is_refused(tmp_path):
    texts = {"kind": "inline", "items": [{"text": "other words altogether, and 9 of them"}] * 9}
    other = {"kind": "create", "data": {"sources": texts}, "vocabulary": 310, "architecture": SHAPE}
    asked = {**evaluated("x"), "model": str(base()), "kl_to": {"stage": "other"}}
    with pytest.raises(ModelError, match=r"kl_to: .* has another tokenizer than the policy"):
        run(Recipe.parse(json.dumps({"stages": {"other": other, "test": asked}}), name="odd"), tmp_path)


def test_a_file_beside_the_rows_of_a_stage_still_decides_the_result(tmp_path):
    file = tmp_path / "pairs.jsonl"
    stage = {"model": str(base()), "objective": "dpo", "steps": 1, "data": {"sources": [str(file), {"kind": "stage", "stage": "pairs"}]}}
    recipe = Recipe.parse(json.dumps({"stages": {"pairs": {"kind": "pairs", "model": str(base()), "task": TASK}, "dpo": stage}}))
    found = []
    for answer in ("x", "y"):
        file.write_text(json.dumps({"prompt": "a", "chosen": answer, "rejected": "c"}) + "\n")
        found.append(fingerprints(recipe.stages["dpo"]))
    assert found[0].keys() == found[1].keys()
    assert found[0] != found[1]


def test_what_a_grader_loads_goes_with_its_stage():
    stage = Recipe.parse(json.dumps({**evaluated("x"), "model": "m", "kl_to": "m"})).stages["evaluate"]
    context = Context("evaluate", Path("x"), "key", 0, {}, {})
    assert context.resolved(stage).task.grader == stage.task.grader
    assert context.resolved(stage).task.grader is not stage.task.grader


def sampled(problem, index, text, stop="end"):
    return Sample(problem, index, (1, 2), (False, True), (0.0,), stop, text)


def test_pairs_leave_out_what_was_cut_off_what_is_equal_and_what_failed():
    one, two = (Problem(name, (Message("user", "hi"),)) for name in "ab")
    graded = [
        (sampled(one, 0, "x"), Grade(1.0)), (sampled(one, 1, "y"), Grade(3.0)), (sampled(one, 2, "z", "length"), Grade(9.0)),
        (sampled(one, 3, "w"), Grade(None, failure="no")), (sampled(two, 0, "x"), Grade(1.0)), (sampled(two, 1, "x"), Grade(1.0)),
    ]  # fmt: skip
    found = list(pairs_of(graded, "best_worst", 1.0, 0))
    assert [(a.text, b.text, x, y) for a, b, x, y in found] == [("y", "x", 3.0, 1.0)]


def test_noisy_labels_follow_bradley_terry_and_are_addressed_by_the_seed():
    problems = [Problem(str(i), (Message("user", "hi"),)) for i in range(2000)]
    graded = [(sampled(each, index, "ab"[index]), Grade(float(index))) for each in problems for index in (0, 1)]
    found = list(pairs_of(graded, "bradley_terry", 1.5, 7))
    assert sum(a.text == "b" for a, *_ in found) / len(found) == pytest.approx(1 / (1 + math.exp(-1.5)), abs=0.03)
    assert found == list(pairs_of(graded, "bradley_terry", 1.5, 7))
    assert found != list(pairs_of(graded, "bradley_terry", 1.5, 8))


def test_no_pair_at_all_is_an_error_that_says_why(tmp_path):
    stage = {"kind": "pairs", "model": str(base()), "task": TASK, "sampling": {"max_tokens": 2}}
    with pytest.raises(RunError, match=r"no pair was made of 16 answers: \d+ were cut off at sampling.max_tokens 2"):
        run(Recipe.parse(json.dumps(stage), name="none"), tmp_path)


def test_figures_of_preferences_have_their_known_values():
    pairs = [Judged(2.0, 0.0, 10, 5), Judged(0.0, 2.0, 5, 10), Judged(1.0, 1.0, 7, 7), Judged(0.0, 3.0, 4, 8, prefer=0.0)]
    figures = preference_figures(pairs)
    assert figures["accuracy"].value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert figures["longer_wins"].value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    expected = [math.log1p(math.exp(-2)), math.log1p(math.exp(2)), math.log(2), math.log1p(math.exp(-3))]
    assert figures["loss"].value == pytest.approx(sum(expected) / 4)
    sure = [1 / (1 + math.exp(-2))] * 2, [0.5], [1 / (1 + math.exp(-3))]
    off = 2 * abs(0.5 - sure[0][0]) + abs(0.5 - 0.5) + abs(1 - sure[2][0])
    assert figures["calibration_error"].value == pytest.approx(off / 4)
    assert figures["log_length_correlation"].value == pytest.approx(1.0, abs=0.2)
