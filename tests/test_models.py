"""A model that cannot be used rightly is refused with its name, what it lacks, and a remedy."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import DataError, ModelError
from posttrain.models.create import create
from posttrain.models.load import load
from posttrain.models.source import ModelSource, folder_fingerprint

SHAPE = {"hidden_size": 32, "layers": 1, "heads": 2, "key_value_heads": 1, "feed_forward": 48, "context": 64}


@pytest.fixture
def folder(tmp_path):
    create(["1 + 2 = 3 said the cat", "a dog has 5 bones"], 320, SHAPE, 0, tmp_path / "model")
    return tmp_path / "model"


def refusal(source) -> str:
    with pytest.raises(ModelError) as error:
        load(source)
    return str(error.value)


def test_a_folder_that_does_not_exist(tmp_path):
    assert refusal(tmp_path / "nowhere") == f"{tmp_path / 'nowhere'}: no such model folder"
    assert refusal("posttrain:large-base") == "posttrain:large-base: no such model folder"


def test_a_folder_without_config(folder):
    (folder / "config.json").unlink()
    assert "no config.json, so this is no transformers model folder" in refusal(folder)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "a model folder without weights: there is no .safetensors file in it" in refusal(folder)


def test_pickled_weights_are_never_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has only pytorch_model.bin; pickled weights are never loaded; convert it to safetensors first" in refusal(folder)


def test_weights_that_lack_a_tensor(folder):
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the weights lack model.norm.weight (1 missing in all); the file is not whole" in refusal(folder)


def test_cut_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "transformers cannot load this model" in refusal(folder)


def test_code_in_a_model_folder_does_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert "config.json asks for code from its folder (auto_map)" in refusal(folder)


def test_a_tokenizer_of_another_model(folder, tmp_path):
    create(["abcdefghij klmnop qrs tuv wxyz " * 40 + str(list(range(400)))], 420, SHAPE, 0, tmp_path / "larger")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "larger" / name).read_bytes())
    assert "this tokenizer belongs to another model" in refusal(folder)


def test_a_model_is_given_by_path_or_by_stage():
    with pytest.raises(ValueError, match="give either `path`"):
        ModelSource()
    assert ModelSource.model_validate("a/b") == ModelSource(path="a/b")


def test_the_fingerprint_changes_with_any_weight(folder):
    before = folder_fingerprint(folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] += 1e-3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(folder) != before


@pytest.mark.parametrize(("dtype", "stored"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("mixed", torch.float32)])
def test_the_dtype_of_the_weights_is_what_the_recipe_says(folder, dtype, stored):
    lm = load(ModelSource(path=str(folder), dtype=dtype)).lm
    assert {parameter.dtype for parameter in lm.model.parameters()} == {stored}
    assert lm.layout == "tree"


def test_a_chat_template_can_be_replaced(folder, tmp_path):
    (tmp_path / "other.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    loaded = load(ModelSource(path=str(folder), chat_template=str(tmp_path / "other.jinja")))
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


def test_a_row_beyond_the_context_is_refused_before_training(folder, tmp_path):
    from posttrain.pipeline.recipe import Recipe
    from posttrain.pipeline.run import run

    text = f"model: {folder}\nobjective: sft\nsteps: 1\ndata: {{sources: {{kind: inline, items: [{{prompt: a, completion: '{'x1' * 80}'}}]}}}}\n"
    with pytest.raises(DataError, match=r"the longest row has \d+ tokens, but the model's context is 64; set data.max_tokens: 64"):
        run(Recipe.parse(text), tmp_path)
    ask = f"stages: {{e: {{kind: evaluate, model: {folder}, task: {{kind: arithmetic, limit: 2}}}}}}\n"
    with pytest.raises(DataError, match=r"arith_test.jsonl:1: the prompt has \d+ tokens, and with sampling.max_tokens 256 exceeds"):
        run(Recipe.parse(ask, name="ask"), tmp_path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["1000", "16", "16"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, [None, "16", "16"]),
        ({"GOMP_SPINCOUNT": "7", "LRU_CACHE_CAPACITY": "8"}, ["7", "16", "8"]),
    ],
)
def test_threads_do_not_spin_for_long_and_kernels_do_not_pile_up_unless_the_user_says_so(given, expected):
    names = ["GOMP_SPINCOUNT", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"]
    code = f"import posttrain, os, json; print(json.dumps([os.environ.get(name) for name in {names}]))"
    clean = {key: value for key, value in os.environ.items() if key not in {*names, "OMP_WAIT_POLICY"}}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean | given).stdout
    assert json.loads(shown) == expected


def test_a_layout_that_the_model_does_not_take_is_refused(folder):
    from tiny_models import transformer

    from posttrain.models.load import wrap

    with pytest.raises(ModelError, match="does not take layout: tree; use layout: auto, or padded"):
        wrap(transformer("mamba"), ModelSource(path="m", layout="tree"))


def test_lora_on_a_tied_head_is_refused_because_merging_would_change_the_embeddings(folder):
    from posttrain.errors import RecipeError
    from posttrain.tuners import LoRA

    with pytest.raises(RecipeError, match="lm_head shares its weights with the embeddings"):
        LoRA(targets=["lm_head"]).install(load(folder).lm.model)


def test_a_chat_template_is_part_of_what_decides_a_stage(folder, tmp_path):
    from posttrain.pipeline.recipe import Recipe
    from posttrain.pipeline.run import plan

    template = tmp_path / "t.jinja"
    text = f"stages: {{e: {{kind: evaluate, task: arithmetic, model: {{path: {folder}, chat_template: {template}}}}}}}\n"
    with pytest.raises(ModelError, match=r"t.jinja: no such file"):
        plan(Recipe.parse(text), tmp_path)
    keys = set()
    for content in ("A", "B"):
        template.write_text(content)
        keys |= {plan(Recipe.parse(text), tmp_path)[0].key}
    assert len(keys) == 2


def test_a_device_that_is_not_there_is_refused(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "device 'cuda' cannot be used" in refusal(ModelSource(path=str(folder), device="cuda"))


def test_a_diverged_policy_is_named_when_it_is_sampled_from(folder):
    from posttrain.errors import RunError
    from posttrain.sampling import Sampling
    from posttrain.sampling.draw import draw

    with pytest.raises(RunError, match="the policy's logits are not finite: its weights have diverged"):
        draw(torch.full((2, 5), torch.nan), torch.tensor([0.1, 0.9], dtype=torch.float64), Sampling())
