"""Stages run once: finished ones are reused, a changed one runs again with all that depends on it, and the run says why."""

import json
import sys

import pytest
from tiny_runs import DATA, base

from posttrain.errors import InputError, RunError
from posttrain.pipeline.provenance import user_code
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import Listener, locked, plan, run

TINY = """\
seed: 3
stages:
  new:
    kind: create
    vocabulary: 320
    architecture: {hidden_size: 32, layers: 2, heads: 2, key_value_heads: 1, feed_forward: 48, context: 128}
    data: {format: text, sources: {kind: inline, items: [{text: "1 + 2 = 3 and 2 + 2 = 4 says the cat"}, {text: "a dog has 5 bones"}]}}
  sft:
    model: {stage: new}
    objective: sft
    data:
      format: prompt_completion
      sources:
        kind: inline
        items:
          - {prompt: [{role: user, content: "1 + 2"}], completion: "1 + 2 = 3"}
          - {prompt: [{role: user, content: "2 + 2"}], completion: "2 + 2 = 4"}
    optim: {learning_rate: 1.0e-2}
    batch: {rows: 2}
    steps: 3
    checkpoint: {every: 2}
  rl:
    model: {stage: sft}
    objective: grpo
    task: &task {kind: arithmetic, source: {kind: inline, items: [{id: a, prompt: "1 + 2", answer: "3"}, {id: b, prompt: "2 + 2", answer: "4"}]}}
    rollout: {problems: 2, per_problem: 2, sampling: {max_tokens: 6}}
    steps: 2
  test: {kind: evaluate, model: {stage: rl}, kl_to: {stage: new}, task: *task, evaluation: {samples: 2, sampling: {max_tokens: 6}}}
  sft_test: {kind: evaluate, model: {stage: sft}, task: *task, evaluation: {samples: 2, sampling: {max_tokens: 6}}}
"""


def recipe(*overrides: str) -> Recipe:
    return Recipe.parse(TINY, overrides, "tiny")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, run(recipe(), root)


def test_a_run_ends_with_a_summary_of_every_stage(finished):
    root, result = finished
    summary = json.loads((root / "tiny" / "summary.json").read_text())
    assert list(summary["stages"]) == ["new", "sft", "rl", "test", "sft_test"]
    test = summary["stages"]["test"]
    assert set(test["metrics"]) >= {"pass@1", "greedy", "pass@2", "length", "kl"}
    figure = test["metrics"]["pass@1"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert figure["count"] == 2
    for stage in summary["stages"].values():
        assert stage["seconds"] > 0
        assert stage["peak_memory_mb"] > 50
    record = json.loads((result.folders["sft"] / "stage.json").read_text())
    assert record["facts"]["settings"]["optim"]["learning_rate"] == 0.01
    assert record["versions"]["torch"]
    assert record["facts"]["fingerprints"]


@pytest.mark.parametrize(("dtype", "slow", "told"), [("mixed", True, True), ("mixed", False, False), ("float32", True, False)])
def test_a_run_says_that_its_cpu_has_no_bfloat16(dtype, slow, told, monkeypatch, tmp_path):
    monkeypatch.setattr("posttrain.training.session.bfloat16_is_slow", lambda: slow)
    said = []
    document = {"model": {"path": str(base()), "dtype": dtype}, "objective": "sft", "data": DATA, "steps": 1}
    run(Recipe.model_validate({"stages": {"sft": document}}), tmp_path, Listener(say=said.append))
    word = f"this CPU has no instructions for bfloat16: model.dtype: float32 is many times faster than {dtype}"
    assert (word in " ".join(said)) == told


def test_a_finished_run_is_reused_whole(finished):
    root, before = finished
    assert {each.action for each in plan(recipe(), root)} == {"reuse"}
    times = {name: (folder / "done.json").stat().st_mtime_ns for name, folder in before.folders.items()}
    after = run(recipe(), root)
    assert {name: (folder / "done.json").stat().st_mtime_ns for name, folder in after.folders.items()} == times


def test_a_function_that_is_changed_or_what_it_imports_reruns_its_stage(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rewards").mkdir()
    files = {name: tmp_path / "my_rewards" / f"{name}.py" for name in ("__init__", "rewards", "helper", "beside")}
    for name in ("__init__", "helper", "beside"):
        files[name].write_text("")
    lazily = "    from xml.dom import minidom\n    from sympy.abc import x\n"  # Python's, and an installed one: not even imported
    files["rewards"].write_text(f"import json\nfrom . import helper\ndef good(problem, text):\n{lazily}    return 1.0\n")
    change = recipe("stages.rl.task.grader={kind: function, path: 'my_rewards.rewards:good'}")
    loaded = set(sys.modules)
    found = user_code(change.stages["rl"])
    assert set(found) == {"my_rewards.rewards", "my_rewards", "my_rewards.helper"}
    assert not [name for name in set(sys.modules) - loaded if name.startswith("sympy")]
    assert user_code(change.stages["sft"]) == {}
    for name, others in (("helper", False), ("rewards", False), ("beside", True)):
        files[name].write_text(files[name].read_text() + "\n# changed\n")
        assert (user_code(change.stages["rl"]) == found) == others, name
        found = user_code(change.stages["rl"])


def test_a_changed_setting_reruns_its_stage_and_what_follows_and_says_why(finished):
    root, _ = finished
    planned = {each.name: each for each in plan(recipe("stages.rl.optim.learning_rate=0.1"), root)}
    assert {name: each.action for name, each in planned.items()} == {
        "new": "reuse", "sft": "reuse", "rl": "run", "test": "run", "sft_test": "reuse",
    }  # fmt: skip
    assert planned["rl"].why == "optim.learning_rate None -> 0.1"
    assert planned["test"].why == "stage rl changed"


def test_changed_data_rerun_the_stage_that_reads_them(finished, tmp_path):
    root, _ = finished
    changed = TINY.replace("1 + 2 = 3 and", "1 + 2 = 3 And")
    planned = {each.name: each for each in plan(Recipe.parse(changed, (), "tiny"), root)}
    assert {each.action for each in planned.values()} == {"run"}
    assert "data inline changed" in planned["new"].why


def test_the_same_seed_makes_the_same_model_and_another_seed_another(finished, tmp_path):
    _, before = finished
    again = run(recipe(), tmp_path)
    weights = "model/model.safetensors"
    assert (again.folders["rl"] / weights).read_bytes() == (before.folders["rl"] / weights).read_bytes()
    other = run(recipe("seed=4", "stages.rl.steps=1"), tmp_path)
    assert (other.folders["sft"] / weights).read_bytes() != (before.folders["sft"] / weights).read_bytes()


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match=r"another run is working here \(process \d+\); wait for it"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_a_grader_that_always_fails_stops_the_run_and_nothing_is_learned(finished, tmp_path):
    text = TINY.replace("kind: arithmetic, source", "kind: problems, grader: {kind: function, path: 'operator:truediv'}, source")
    with pytest.raises(RunError, match=r"4 of 4 samples could not be graded \(rollout 1\): operator:truediv raised TypeError"):
        run(Recipe.parse(text, (), "broken"), tmp_path)


def test_a_nan_loss_stops_before_the_update_and_names_the_rows(tmp_path):
    with pytest.raises(RunError, match=r"step [23]: the (loss is nan on inline:\d|gradient of .* is not finite).*no update was made"):
        run(recipe("stages.sft.optim.learning_rate=1e30", "stages.sft.optim.clip=null", "stages.sft.optim.schedule=constant"), tmp_path)
