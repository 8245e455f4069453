"""`vary` in a recipe: one stage for each value of a setting, and with it those that use it."""

import pytest

from posttrain.errors import RecipeError
from posttrain.pipeline.recipe import Recipe

DPO = """
stages:
  sft: {model: posttrain:tiny-base, objective: sft, data: rows.jsonl, epochs: 1}
  dpo:
    vary: {objective.beta: [0.1, 0.3]}
    model: {stage: sft}
    objective: dpo
    data: pairs.jsonl
    epochs: 1
  dpo_test: &test {kind: evaluate, model: {stage: dpo}, task: arithmetic, kl_to: {stage: sft}}
  sft_test: {<<: *test, model: {stage: sft}}
"""


def test_a_stage_runs_once_for_each_value_and_so_does_what_uses_it():
    recipe = Recipe.parse(DPO)
    assert list(recipe.stages) == ["sft", "dpo-0.1", "dpo-0.3", "dpo_test-0.1", "dpo_test-0.3", "sft_test"]
    assert [recipe.stages[f"dpo-{beta}"].objective.beta for beta in (0.1, 0.3)] == [0.1, 0.3]
    for beta in (0.1, 0.3):
        test = recipe.stages[f"dpo_test-{beta}"]
        assert (test.model.stage, test.kl_to.stage) == (f"dpo-{beta}", "sft")


def test_kinds_of_a_component_vary_by_their_kind_or_by_names_that_are_given():
    recipe = Recipe.parse(DPO.replace("objective.beta: [0.1, 0.3]", "tuner: [full, {kind: lora, rank: 4}, ia3]"))
    assert [name for name in recipe.stages if name.startswith("dpo-")] == ["dpo-full", "dpo-lora", "dpo-ia3"]
    assert recipe.stages["dpo-lora"].tuner.rank == 4
    recipe = Recipe.parse(DPO.replace("objective.beta: [0.1, 0.3]", "tuner: {small: {kind: lora, rank: 2}, large: {kind: lora, rank: 64}}"))
    assert [recipe.stages[f"dpo-{name}"].tuner.rank for name in ("small", "large")] == [2, 64]
    assert recipe.stages["dpo_test-large"].model.stage == "dpo-large"


def test_an_override_reaches_every_copy():
    recipe = Recipe.parse(DPO, ["stages.dpo.epochs=2", "stages.dpo.vary={objective.label_smoothing: [0.0, 0.1, 0.2]}"])
    assert [name for name in recipe.stages if name.startswith("dpo-")] == ["dpo-0.0", "dpo-0.1", "dpo-0.2"]
    assert {recipe.stages[f"dpo-{value}"].epochs for value in ("0.0", "0.1", "0.2")} == {2.0}


def test_what_is_wrong_in_a_copy_is_said_with_the_line_of_the_stage():
    with pytest.raises(RecipeError, match=r"recipe:5: stages\.dpo-0\.9\.objective\.label_smoothing: .*less than 0\.5"):
        Recipe.parse(DPO.replace("objective.beta: [0.1, 0.3]", "objective.label_smoothing: [0.1, 0.9]"))
    with pytest.raises(RecipeError, match=r"recipe:8: stages\.dpo-0\.1\.data\.sorces: no such setting"):
        Recipe.parse(DPO.replace("data: pairs.jsonl", "data: {sorces: x}"))


@pytest.mark.parametrize(
    "vary",
    ["[0.1, 0.3]", "{objective.beta: 0.1}", "{objective.beta: []}", "{objective.beta: [0.1, 0.1]}", "{a: [1], b: [2]}", "{model: [{path: x}]}", "{a: {'x y': 1, x_y: 2}}"],
)
def test_a_vary_that_is_not_one_setting_with_different_values_is_refused(vary):
    with pytest.raises(RecipeError, match=r"recipe:5: stages\.dpo\.vary: give one setting and a list of different plain values or kinds"):
        Recipe.parse(DPO.replace("{objective.beta: [0.1, 0.3]}", vary))


def test_two_settings_are_not_varied_at_once():
    both = DPO.replace("{kind: evaluate, model: {stage: dpo}", "{kind: evaluate, vary: {evaluation.samples: [4, 8]}, model: {stage: dpo}")
    with pytest.raises(RecipeError, match=r"stages\.dpo_test: uses what varies already \(dpo\); vary one setting at a time"):
        Recipe.parse(both)


def test_a_copys_name_that_is_taken_is_refused():
    with pytest.raises(RecipeError, match=r"there is a stage 'dpo-0\.1' already; rename one"):
        Recipe.parse(DPO + "  dpo-0.1: {kind: evaluate, model: posttrain:tiny-base, task: arithmetic}\n")
