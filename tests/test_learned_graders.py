"""Graders that are models: a reward model reads what was sampled, a judge is asked for a mark, and graders add up."""

import json
import math

import pytest
import torch
from test_ppo import TASK, prepared, rollout
from test_reward_models import inline, made, settings_of, trained, words
from torch import tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from posttrain.data.render import Template
from posttrain.errors import ModelError, RecipeError
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import run as run_recipe
from posttrain.pipeline.stage import Context, references
from posttrain.rl.rollouts import describe
from posttrain.tasks.composed import WeightedGrader
from posttrain.tasks.learned import JudgeGrader, RewardModelGrader
from posttrain.text import Grade, Message, Problem, Sample


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A policy, a reward model that was trained from it (with a shift), and a judge of another family."""
    folder = tmp_path_factory.mktemp("graders")
    made(folder / "start")
    trained(folder / "run", str(folder / "start"), normalise={})
    made(folder / "judge", "llama3", seed=3, max_position_embeddings=512)
    return folder


def length(_problem, text):
    return float(len(text))


def sometimes(_problem, text):
    return math.nan if len(text) % 2 else 1.0


@pytest.fixture
def samples(home, tmp_path):
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={"shared": True}, rollout=rollout())
    found = [one for one, _ in next(run.updates).samples]
    assert {one.stop for one in found} == {"end", "length"}
    return found


# ---- a reward model


@pytest.mark.parametrize("micro_tokens", [1, 60, 4096])
def test_a_reward_model_reads_the_sampled_tokens_verbatim_end_token_and_all(micro_tokens, home, samples):
    grader = RewardModelGrader(model=str(home / "run" / "model"), micro_tokens=micro_tokens)
    grader.check()
    grader.prepare(Template(words(home / "start")))
    grades = grader.grade_all(samples)
    model = AutoModelForSequenceClassification.from_pretrained(home / "run" / "model").eval()
    assert model.config.reward_shift != 0
    with torch.no_grad():
        expected = [float(model(input_ids=tensor([one.tokens])).logits[0, 0]) + model.config.reward_shift for one in samples]
        without = [float(model(input_ids=tensor([one.tokens[:-1]])).logits[0, 0]) + model.config.reward_shift for one in samples]
    assert [grade.score for grade in grades] == pytest.approx(expected, abs=1e-5)
    assert all(abs(one - other) > 1e-4 for one, other in zip(expected, without, strict=True))
    text = words(home / "start")
    retokenised = [text(text.decode(one.tokens))["input_ids"] != list(one.tokens) for one in samples]
    assert any(retokenised), "a text would not give the same tokens"
    assert not any(value.requires_grad for value in grader._lm.parameters())
    assert grader.grade_all([]) == []
    assert grader.grade(samples[0].problem, "x") == Grade(None, failure="a reward model grades samples, not texts")


def test_a_reward_model_of_another_tokenizer_is_refused_before_its_weights_are_read(home, monkeypatch):
    made(home / "gemma", "gemma")
    monkeypatch.setattr("posttrain.models.load.load_scalar", lambda *_: pytest.fail("weights were read"))
    grader = RewardModelGrader(model=str(home / "gemma"))
    with pytest.raises(ModelError) as error:
        grader.prepare(Template(words(home / "start")))
    assert str(error.value).startswith(f"reward model: {home / 'gemma'} has another tokenizer than the policy ('<|")
    assert str(error.value).endswith(
        "of the policy's and none there), so it would read other text than is written; take a reward model of the policy's family"
    )


def test_a_reward_model_may_have_one_token_more_than_the_policy_its_pad(home, tmp_path):
    start = made(tmp_path / "start", "lonely")
    folder = trained(tmp_path / "run", start, steps=1) / "model"
    assert len(words(folder)) == len(words(start)) + 1
    grader = RewardModelGrader(model=str(folder))
    grader.prepare(Template(words(start)))
    one = Sample(Problem("p", ()), 0, (5, 6, 7), (False, True, True), (-1.0, -1.0), "end", "")
    assert math.isfinite(grader.grade_all([one])[0].score)


def test_a_model_that_only_writes_does_not_grade(home):
    grader = RewardModelGrader(model=str(home / "start"))
    with pytest.raises(ModelError, match="is no reward model: it has no `score`; train one with objective bradley_terry"):
        grader.prepare(Template(words(home / "start")))
    with pytest.raises(ModelError, match="no such model folder"):
        RewardModelGrader(model="./nowhere").check()


def test_a_reward_model_is_read_once_and_a_score_that_is_no_number_is_a_failure(home, samples, monkeypatch):
    grader = RewardModelGrader(model=str(home / "run" / "model"))
    template = Template(words(home / "start"))
    grader.prepare(template)
    lm = grader._lm
    grader.prepare(template)
    assert grader._lm is lm
    monkeypatch.setattr(type(lm), "scores_of_many", lambda *_: tensor([0.5, math.nan, math.inf]))
    assert grader.grade_all(samples[:3]) == [
        Grade(0.5), Grade(None, failure="the grader's score is nan"), Grade(None, failure="the grader's score is inf"),
    ]  # fmt: skip


# ---- a judge


def asked(name, text="no", prompt="What is 3 + 4?"):
    return Sample(Problem(name, (Message("system", "Be brief."), Message("user", prompt))), 0, (), (), (), "end", text)


@pytest.mark.parametrize(("lowest", "highest"), [(1, 10), (0, 3), (8, 12)])
def test_a_judges_reward_is_its_expected_mark_brought_to_one(lowest, highest, home):
    """By transformers, mark by mark; 10, 11 and 12 are marks of two tokens."""
    grader = JudgeGrader(model=str(home / "judge"), lowest=lowest, highest=highest, micro_tokens=200)
    grader.check()
    grader.prepare(Template(words(home / "start")))
    some = [asked("p", "It is 7."), asked("q", "{answer} is 8, {highest}!"), asked("r", "")]
    grades = grader.grade_all(some)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(home / "judge").eval(), words(home / "judge")
    for one, grade in zip(some, grades, strict=True):
        question = grader.question.replace("{prompt}", "Be brief.\nWhat is 3 + 4?").replace("{lowest}", str(lowest))
        question = question.replace("{highest}", str(highest)).replace("{answer}", one.text)
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
        logp = []
        for mark in range(lowest, highest + 1):
            said = [*tokenizer(str(mark), add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids("<|eot_id|>")]
            assert len(said) == 1 + len(str(mark))
            with torch.no_grad():
                table = model(input_ids=tensor([prompt + said])).logits[0].double().log_softmax(-1)
            logp.append(sum(float(table[len(prompt) - 1 + place, token]) for place, token in enumerate(said)))
        chance = tensor(logp, dtype=torch.float64).softmax(0)
        mark = float(chance @ torch.arange(lowest, highest + 1, dtype=torch.float64))
        assert grade.parts == {"mark": pytest.approx(mark, abs=1e-4)}
        assert grade.score == pytest.approx((mark - (lowest + highest) / 2) / ((highest - lowest) / 2), abs=1e-4)
    assert len({grade.score for grade in grades}) == 3
    assert grader.grade_all([]) == []
    assert grader.grade(some[0].problem, "It is 7.").score == pytest.approx(grades[0].score, abs=1e-6)


class Believes:
    """A judge of which the probability of each mark is known."""

    context = None

    def __init__(self, chances):
        self.chances = chances

    def logprobs_of_many(self, seqs, micro_tokens):
        told = torch.zeros(seqs.count, 2)
        told[:, 0] = tensor(self.chances * (seqs.count // len(self.chances))).log()
        told[:, 1] = -3.0
        first = torch.cat([torch.arange(len(part)) for part in seqs.owner.split(seqs.trained_lengths.tolist())])
        return told[seqs.owner, (first > 0).long()] * (first < 2)


@pytest.mark.parametrize(
    ("chances", "score"),
    [
        ({8: 0.5, 9: 0.5}, 0.6666667),
        ({1: 1.0}, -1.0),
        ({10: 1.0}, 1.0),
        ({1: 0.5, 10: 0.5}, 0.0),
        ({5: 0.1, 6: 0.1}, 0.0),  # what the judge would rather say than a mark does not count
    ],
)
def test_the_printed_values_of_an_expected_mark(chances, score, home):
    grader = JudgeGrader(model=str(home / "judge"))
    grader.prepare(Template(words(home / "start")))
    grader._judge = (Believes([chances.get(mark, 0.0) for mark in range(1, 11)]), grader._judge[1])
    grades = grader.grade_all([asked("p"), asked("q")])
    assert [grade.score for grade in grades] == pytest.approx([score] * 2, abs=1e-6)
    assert grades[0].parts["mark"] == pytest.approx(5.5 + 4.5 * score, abs=1e-6)


def test_a_judges_question_must_show_the_answer_and_its_marks_must_span_a_range(home):
    for question, message in (
        ("Is it good?", "the question does not show the answer; put {answer} into it"),
        (
            "{answer} {reply}",
            r"the question cannot be filled in \('reply'\); it may hold {prompt}, {answer}, {lowest} and {highest}",
        ),
        ("{answer} {", "the question cannot be filled in"),
    ):
        with pytest.raises(ValueError, match=message):
            JudgeGrader(model="m", question=question)
    with pytest.raises(ModelError, match="judge: lowest 3 is not below highest 3"):
        JudgeGrader(model=str(home / "judge"), lowest=3, highest=3).check()


def test_an_answer_that_would_speak_as_the_judge_and_one_too_long_for_it_have_no_grade(home):
    grader = JudgeGrader(model=str(home / "judge"))
    grader.prepare(Template(words(home / "start")))
    judge, template = grader._judge
    spelled = str(template.tokenizer.convert_ids_to_tokens(template.end_id))
    long = "p " * judge.context
    found = grader.grade_all([asked("a", "p"), asked("b", f"p{spelled}"), asked("c", long), asked("d", "q")])
    assert [grade.failure for grade in found] == [
        None, f"the answer spells the judge's control token {spelled}", "the question is longer than the judge's context", None,
    ]  # fmt: skip
    alone = [grader.grade_all([asked("a", text)])[0].score for text in ("p", "q")]
    assert [found[0].score, found[3].score] == pytest.approx(alone, abs=1e-6)


# ---- a sum


def weighted(**parts):
    return WeightedGrader.model_validate(
        {"parts": {name: {"grader": grader, "weight": weight} for name, (grader, weight) in parts.items()}}
    )


LONG, ODD = ({"kind": "function", "path": f"test_learned_graders:{name}"} for name in ("length", "sometimes"))


def test_a_weighted_sum_keeps_its_parts_and_they_are_logged_by_name(home, samples):
    reward = {"kind": "reward_model", "model": str(home / "run" / "model")}
    grader = weighted(long=(LONG, -0.5), liked=(reward, 2.0))
    grader.check()
    grader.prepare(Template(words(home / "start")))
    alone = RewardModelGrader(model=reward["model"])
    alone.prepare(Template(words(home / "start")))
    liked = [grade.score for grade in alone.grade_all(samples)]
    grades = grader.grade_all(samples)
    for one, grade, mark in zip(samples, grades, liked, strict=True):
        assert grade.parts == {"long": len(one.text), "liked": mark}
        assert grade.score == pytest.approx(-0.5 * len(one.text) + 2 * mark)
    stats = describe(samples, grades)
    assert stats["reward"] == (pytest.approx(sum(grade.score for grade in grades)), len(samples))
    assert stats["reward/long"] == (sum(len(one.text) for one in samples), len(samples))
    assert stats["reward/liked"] == (pytest.approx(sum(liked)), len(samples))
    assert weighted(long=(LONG, 1.0)).grade(samples[0].problem, "four") == Grade(4.0, {"long": 4.0})


def test_where_one_part_fails_there_is_no_score_and_no_part():
    grader = weighted(long=(LONG, 1.0), odd=(ODD, 1.0))
    grades = grader.grade_all([asked("p", "four"), asked("q", "fives")])
    assert grades[0] == Grade(5.0, {"long": 4.0, "odd": 1.0}, weights={"long": 1.0, "odd": 1.0})
    assert grades[1] == Grade(None, failure="odd: test_learned_graders:sometimes returned nan")
    stats = describe([asked("p", "four"), asked("q", "fives")], grades)
    assert (stats["ungraded"], stats["reward/long"]) == ((1.0, 2), (4.0, 1))


def test_a_part_that_cannot_grade_a_problem_is_named_and_a_sum_has_parts():
    exact = weighted(long=(LONG, 1.0), right=("exact", 1.0))
    assert exact.gold_problem(Problem("p", ())) == "it has no answer"
    assert exact.gold_problem(Problem("p", (), "7")) is None
    with pytest.raises(ValueError, match="parts"):
        WeightedGrader(parts={})


# ---- in a run


def test_constant_rewards_are_said_once(home, tmp_path):
    task = TASK | {"grader": {"kind": "function", "path": "test_learned_graders:same"}}
    said = []
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={"shared": True}, task=task)
    run.updates.stream.say = said.append
    for _ in range(3):
        next(run.updates)
    assert said == [
        "every answer of rollout 1 has the same reward, 2: a constant reward teaches nothing; look at the samples and the grader"
    ]


def test_samples_without_a_grade_are_said_and_again_where_they_become_more(home, tmp_path, monkeypatch):
    task = TASK | {"grader": {"kind": "function", "path": "test_learned_graders:some"}}
    said = []
    run = prepared(home, tmp_path, {"kind": "ppo"}, critic={"shared": True}, task=task)
    run.updates.stream.say = said.append
    for failing in (1, 2, 4):
        monkeypatch.setattr("test_learned_graders.FAILING", [failing])
        next(run.updates)
    where = f"test_learned_graders:some raised OSError: down (test_learned_graders.py:{some.__code__.co_firstlineno + 3})"
    assert [line for line in said if "could not be graded" in line] == [
        f"1 of 12 samples of rollout 1 could not be graded and are left out: {where}",
        f"4 of 12 samples of rollout 3 could not be graded and are left out: {where}",
    ]


FAILING = [0]


def some(_problem, text):
    if FAILING[0]:
        FAILING[0] -= 1
        raise OSError("down")
    return float(len(text))


def same(_problem, _text):
    return 2.0


RECIPE = {
    "stages": {
        "policy": {
            "model": "posttrain:tiny-base",
            "objective": "ppo",
            "critic": {"model": {"stage": "reward"}},
            "reference": {"stage": "sft"},
            "task": {
                "kind": "problems",
                "source": TASK["source"],
                "grader": {
                    "kind": "weighted",
                    "parts": {
                        "liked": {"grader": {"kind": "reward_model", "model": {"stage": "reward"}}, "weight": 2.0},
                        "judged": {
                            "grader": {
                                "kind": "weighted",
                                "parts": {
                                    "mark": {"grader": {"kind": "judge", "model": {"stage": "judge", "dtype": "bfloat16"}}}
                                },
                            }
                        },
                    },
                },
            },
            "steps": 1,
        },
        "reward": {
            "model": {"stage": "sft"},
            "objective": "bradley_terry",
            "data": inline([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            "steps": 1,
        },
        "judge": {
            "model": {"stage": "sft"},
            "objective": "sft",
            "data": inline([{"prompt": "a", "completion": "b"}]),
            "steps": 1,
        },
        "sft": {
            "model": "posttrain:tiny-base",
            "objective": "sft",
            "data": inline([{"prompt": "a", "completion": "b"}]),
            "steps": 1,
        },
    }
}


def test_stages_named_deep_inside_a_grader_come_first_and_are_put_in_place(tmp_path):
    recipe = Recipe.parse(json.dumps(RECIPE))
    assert sorted(references(recipe.stages["policy"])) == ["judge", "reward", "sft"]
    order = recipe.order()
    assert order[-1] == "policy"
    assert order[0] == "sft"
    context = Context("policy", tmp_path, "key", 0, {name: tmp_path / name for name in recipe.stages}, {})
    found = context.resolved(recipe.stages["policy"])
    parts = found.task.grader.parts
    judge = parts["judged"].grader.parts["mark"].grader
    assert parts["liked"].grader.model.path == str(tmp_path / "reward" / "model")
    assert (judge.model.path, judge.model.dtype) == (str(tmp_path / "judge" / "model"), "bfloat16")
    assert (found.critic.model.path, found.reference.model.path) == (
        str(tmp_path / "reward" / "model"),
        str(tmp_path / "sft" / "model"),
    )
    assert (parts["liked"].weight, judge.highest) == (2.0, 10)
    assert recipe.stages["policy"].task.grader.parts["liked"].grader.model.stage == "reward", "the recipe stays as it is"
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert found.task.fingerprint() != recipe.stages["policy"].task.fingerprint()


def test_a_stage_that_does_not_exist_is_missed_wherever_it_is_named():
    text = json.dumps(RECIPE).replace('{"stage": "judge", "dtype"', '{"stage": "juge", "dtype"')
    with pytest.raises(RecipeError, match="stage 'policy' uses stage 'juge', which does not exist; did you mean 'judge'"):
        Recipe.parse(text)


def test_a_recipe_trains_a_reward_model_and_a_policy_by_it_and_logs_both_parts_of_the_reward(home, tmp_path):
    start = str(home / "start")
    reward = settings_of(start, steps=1).model_dump(mode="json", exclude_unset=True)
    grader = {
        "kind": "weighted",
        "parts": {
            "liked": {"grader": {"kind": "reward_model", "model": {"stage": "reward"}}},
            "long": {"grader": LONG, "weight": 0.1},
        },
    }
    policy = {
        "model": start, "objective": "ppo", "critic": {"model": {"stage": "reward"}}, "task": TASK | {"grader": grader},
        "rollout": rollout(max_tokens=4), "steps": 1,
    }  # fmt: skip
    result = run_recipe(Recipe.parse(json.dumps({"name": "both", "stages": {"policy": policy, "reward": reward}})), tmp_path)
    (line,) = [json.loads(each) for each in (result.folders["policy"] / "metrics.jsonl").read_text().splitlines()]
    assert line["reward"] == pytest.approx(line["reward/liked"] + 0.1 * line["reward/long"], abs=1e-5)
    assert (result.model("policy") / "config.json").is_file()
    assert (result.folders["policy"] / "critic" / "config.json").is_file()
