"""A wrong recipe is refused before anything heavy is imported, with the line, the setting and a remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import yaml
from posttrain.component import Component
from posttrain.errors import RecipeError
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.schema import catalogue, families, json_schema

SFT = """\
model: {path: some/model}
objective: sft
data:
  sources: {kind: inline, items: [{prompt: a, completion: b}]}
epochs: 1
"""
GRPO = """\
model: some/model
objective: {kind: grpo, kl: 0.1}
task: arithmetic
steps: 3
"""


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        Recipe.parse(text, overrides, "r.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SFT.replace("epochs", "epocs"), "r.yaml:5: epocs: no such setting; did you mean 'epochs'?"),
        (SFT.replace("sft", "sfft"), "r.yaml:2: objective: unknown objective 'sfft'; did you mean 'sft'?"),
        (SFT.replace("sources:", "surces:"), "r.yaml:4: data.surces: no such setting; did you mean 'sources'?"),
        (SFT.replace("epochs: 1", "epochs: -1"), "r.yaml:5: epochs: input should be greater than 0, found -1"),
        (SFT.replace("epochs: 1", "epochs: many"), "r.yaml:5: epochs: input should be a valid number"),
        (SFT.replace("epochs: 1", ""), "say how long to train with exactly one of steps, epochs, seconds (here: none)"),
        (SFT + "steps: 4\n", "say how long to train with exactly one of steps, epochs, seconds (here: steps, epochs)"),
        (SFT + "task: arithmetic\n", "objective sft learns from `data` and does not sample; remove the section `task`"),
        (SFT + "tuner: {kind: lora, rank: 0}\n", "r.yaml:6: tuner.rank: input should be greater than 0, found 0"),
        (SFT + "tuner: {rank: 4}\n", "r.yaml:6: tuner.rank: no such setting"),
        (SFT + "validation: {best: nll}\n", "validation.best: 'nll' is not measured; nothing is measured"),
        (SFT + "seconds: 5\n".replace("seconds", "seconds"), "exactly one of steps, epochs, seconds (here: epochs, seconds)"),
        (SFT.replace("epochs: 1", "seconds: 5"), "a run of a given time has no known end: set optim.schedule: constant"),
        (SFT.replace("data:", "other:"), "r.yaml:3: other: no such setting"),
        (GRPO.replace("task: arithmetic\n", ""), "objective grpo samples its own answers: it needs `task`"),
        (GRPO.replace("steps: 3", "epochs: 3"), "objective grpo samples without end: give `steps`, not epochs"),
        (GRPO + "rollout: {sampling: {top_k: 5}}\n", "top_k, top_p and min_p are for evaluation"),
        (GRPO + "rollout: {sampling: {temperature: 0}}\n", "0 always gives the same answer"),
        (GRPO.replace("some/model", "{stage: sft}"), "uses stage 'sft', which does not exist"),
        (GRPO + "model: again\n", "r.yaml:5: column 1: the key 'model' stands twice in one section"),
        ("stages: {a: {kind: evaluate, model: m}}\n", "stages.a.task: is missing"),
        ("stages: {a: {kind: evaluat}}\n", "unknown stage 'evaluat'; did you mean 'evaluate'?"),
        (GRPO + "batch: {rows: 7}\n", "batch.rows: objective grpo is sized by `rollout`"),
        (
            SFT + "validation: {task: arithmetic, evaluation: {samples: 0, greedy: false}}\n",
            "nothing is evaluated: set samples, greedy",
        ),
        (
            "stages: {e: {kind: evaluate, model: m, task: arithmetic}, t: {kind: evaluate, model: {stage: e}, task: arithmetic}}\n",
            "stage 't' wants the model of stage 'e', but a stage of kind evaluate makes none",
        ),
        ("a: [1\n", "not valid YAML"),
        ("- a\n", "r.yaml:1: a recipe is a mapping"),
        ("a: !!python/object:os.system x\n", "is not allowed in a recipe"),
        ("objective: nowhere_at_all:Loss\nmodel: m\n", "cannot import 'nowhere_at_all'"),
        ("objective: posttrain.draws:key\nmodel: m\n", "'posttrain.draws:key' is not a objective"),
    ],
)
def test_a_wrong_recipe_is_refused_by_line_with_a_remedy(text, message):
    assert message in refusal(text)


def test_every_fault_of_a_recipe_is_said_at_once():
    lines = refusal(SFT.replace("epochs", "epocs") + "tuner: loora\n").splitlines()
    assert len(lines) == 2
    assert "epocs" in lines[0] + lines[1]
    assert "did you mean 'lora'" in lines[0] + lines[1]


def test_a_circle_of_stages_is_named():
    text = "stages:\n  a: {kind: evaluate, model: {stage: b}, task: arithmetic}\n  b: {model: {stage: a}, objective: grpo, task: arithmetic, steps: 1}\n"
    assert "the stages a -> b -> a use each other in a circle" in refusal(text)


def test_an_override_reaches_the_setting_and_its_fault_names_the_command_line():
    assert Recipe.parse(SFT, ["optim.learning_rate=1e-4"]).stages["train"].optim.learning_rate == 1e-4
    assert Recipe.parse(SFT, ["tuner=lora", "tuner.rank=3"]).stages["train"].tuner.rank == 3
    assert "command line `optim.learning_rat=1`: optim.learning_rat: no such setting" in refusal(SFT, "optim.learning_rat=1")
    assert "is not `key=value`" in refusal(SFT, "optim")


def test_an_override_below_a_plain_string_keeps_what_the_string_meant():
    text = SFT.replace("{path: some/model}", "some/model").replace(
        "{kind: inline, items: [{prompt: a, completion: b}]}", "f.jsonl"
    )
    stage = Recipe.parse(text, ["model.dtype=mixed", "data.sources.rows=0:5"]).stages["train"]
    assert (stage.model.path, stage.model.dtype) == ("some/model", "mixed")
    assert (stage.data.sources[0].path, stage.data.sources[0].rows) == ("f.jsonl", "0:5")
    for data, below in (("f.jsonl", "sources.rows"), ("[f.jsonl, g.jsonl]", "sources.0.rows"), ("[f.jsonl, g.jsonl]", "0.rows")):
        plain = f"model: some/model\nobjective: sft\nepochs: 1\ndata: {data}\n"
        settings = [f"data.{below}=0:5", *([] if below == "0.rows" else ["data.max_tokens=512"])]
        stage = Recipe.parse(plain, settings).stages["train"]
        assert (stage.data.sources[0].path, stage.data.sources[0].rows) == ("f.jsonl", "0:5"), data
        assert stage.data.max_tokens == (1024 if below == "0.rows" else 512)


def test_a_held_out_loss_can_be_measured_beside_sampling(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    text = GRPO.replace("some/model", "org/name") + f"validation: {{data: {{sources: {tmp_path}/rows.jsonl}}, best: nll}}\n"
    Recipe.parse(text).check()


def test_an_alias_bomb_is_refused():
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    assert "a recipe is never that large" in refusal("a0: &a0 [1, 1]\n" + levels)


def test_text_without_a_dot_is_a_number_where_it_looks_like_one():
    assert yaml.parse("a: 1e-4\nb: '1e-4'\nc: 1e\n", "f").value == {"a": 1e-4, "b": "1e-4", "c": "1e"}


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[1].glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_survives_being_written_and_read_again(recipe):
    loaded = Recipe.load(recipe)
    again = Recipe.model_validate(loaded.model_dump(mode="json"))
    assert again.model_dump(mode="json") == loaded.model_dump(mode="json")
    assert again == loaded


def test_judging_a_recipe_loads_no_torch(tmp_path):
    (tmp_path / "bad.yaml").write_text(SFT.replace("epochs", "epocs"))
    code = (
        "import sys; sys.argv = ['posttrain', 'run', 'bad.yaml']\n"
        "from posttrain.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: print(stop.code, *sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.split() == ["2"]
    assert "bad.yaml:5: epocs" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_catalogue_describes_every_field_of_every_kind():
    for family, kinds in catalogue().items():
        for kind, facts in kinds.items():
            assert facts["about"], f"{family} {kind} has no docstring"
            for name, field in facts["fields"].items():
                assert field["about"], f"{family} {kind}.{name} has no meaning"
                assert "default" in field or field["required"]


def test_the_schema_accepts_what_the_recipe_accepts_and_names_every_kind():
    schema = json_schema()
    json.dumps(schema)
    for family in families().values():
        for kind in family.kinds:
            if ":" not in kind:
                assert schema["$defs"][f"{family.__name__}.{kind}"]["properties"]["kind"]["const"] == kind
    references = set()

    def look(value):
        if isinstance(value, dict):
            references.update([value["$ref"]] if "$ref" in value else [])
            [look(each) for each in value.values()]
        elif isinstance(value, list):
            [look(each) for each in value]

    look(schema)
    assert references
    assert all(reference.removeprefix("#/$defs/") in schema["$defs"] for reference in references)


def test_a_kind_of_ones_own_is_found_beside_the_recipe(tmp_path):
    (tmp_path / "my_losses_abc.py").write_text(
        "from posttrain.objectives import SFT\nclass Mine(SFT):\n    '''Mine.'''\n    power: float = 2.0\n    '''p'''\n"
    )
    (tmp_path / "r.yaml").write_text(SFT.replace("objective: sft", "objective: {kind: 'my_losses_abc:Mine', power: 3}"))
    objective = Recipe.load(tmp_path / "r.yaml").stages["train"].objective
    assert objective.power == 3.0
    assert objective.model_dump() == {"kind": "my_losses_abc:Mine", "power": 3.0}


def test_two_kinds_of_one_name_are_refused():
    class Fruit(Component):
        """A family."""

    class Apple(Fruit, kind="apple"):
        """A kind."""

    with pytest.raises(TypeError, match="the kind 'apple' is already Apple"):

        class Other(Fruit, kind="apple"):
            """Another."""

    assert Fruit.lookup("apple") is Apple
