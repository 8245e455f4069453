"""What a stage leaves is an ordinary folder: transformers and peft load it, and it is the model that was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_models import CONFIGS, transformer
from tiny_runs import OBJECTIVES, REUSED, SUMS, TUNERS, base, parsed, settings, text, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.data.render import Template
from posttrain.errors import RecipeError
from posttrain.models.load import load
from posttrain.models.source import ModelSource
from posttrain.pipeline.run import run
from posttrain.sampling import InProcess, Sampling, sample
from posttrain.text import Message, Problem
from posttrain.training import checkpoint
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.folder import save_adapter

CHAT = [{"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "It is 7."}]
IDS = torch.tensor([[5, 9, 17, 300, 42, 7, 8, 250, 11, 12, 13]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def as_trained(folder: Path, tuner: str) -> Any:
    """The model as training left it, not merged: the base, the tuner, and the weights of the last checkpoint."""
    lm = load(str(base())).lm
    Tuner.model_validate(TUNERS[tuner]["tuner"]).install(lm.model)
    last = checkpoint.steps(folder / "checkpoints")[-1]
    manifest = json.loads((checkpoint.folder_of(folder / "checkpoints", last) / "manifest.json").read_text())
    found = checkpoint.load(checkpoint.folder_of(folder / "checkpoints", last), manifest["owner"])
    parameters = tuned(lm.model)
    assert found.tensors["weights"].keys() == parameters.keys()
    with torch.no_grad():
        for name, value in found.tensors["weights"].items():
            parameters[name].copy_(value)
    return lm.model


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_stages_model_is_the_trained_one_for_transformers(objective: str, tuner: str, tmp_path: Path) -> None:
    folder = train(text(objective, tuner, steps=3, optim={"learning_rate": 0.05}), tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = logits(AutoModelForCausalLM.from_pretrained(base()))
    trained = logits(as_trained(folder, tuner))
    assert (trained - before).abs().max() > 0.01, "training moved the model"
    torch.testing.assert_close(logits(exported), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(load(folder / "model").lm.model), trained, rtol=0, atol=1e-5)
    assert (folder / "adapter").exists() == (tuner == "lora")


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_a_lora_stages_adapter_on_its_base_is_the_merged_model(objective: str, tmp_path: Path) -> None:
    folder = train(text(objective, "lora", steps=3, optim={"learning_rate": 0.05}), tmp_path)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base()), folder / "adapter")
    merged = logits(AutoModelForCausalLM.from_pretrained(folder / "model"))
    torch.testing.assert_close(logits(adapted), merged, rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert (logits(adapted) - merged).abs().max() > 0.01, "without the adapter it is the base"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["inference_mode"]) == (str(base()), 4, True)
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "mamba"])
def test_an_adapter_of_any_architecture_loads_in_peft_with_the_merged_models_logits(
    name: str, rslora: bool, tmp_path: Path
) -> None:
    model = transformer(name)
    model.save_pretrained(tmp_path / "base")
    tuner = Tuner.model_validate({"kind": "lora", "rank": 4, "alpha": 8.0, "rslora": rslora})
    tuner.install(model)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned(model).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    ids, before = IDS % 97, logits(transformer(name), IDS % 97)
    trained = logits(model, ids)
    save_adapter(tuner, model, tmp_path / "adapter", ModelSource(path=str(tmp_path / "base")))
    tuner.merge(model)
    model.save_pretrained(tmp_path / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert (trained - before).abs().max() > 0.01
    for other in (logits(adapted, ids), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids)):
        torch.testing.assert_close(other, trained, rtol=0, atol=1e-5 * float(trained.abs().max().clamp(min=1)))


def test_an_architecture_for_which_peft_has_no_lora_is_refused_in_plain_words() -> None:
    with pytest.raises(RecipeError, match=r"tuner.*out_proj"):
        Tuner.model_validate({"kind": "lora"}).install(transformer("mamba"))


def test_an_adapter_is_the_same_file_in_every_process(tmp_path: Path) -> None:
    """Sets of strings have another order in every process; what is written must not."""
    folder = train(text("sft", "lora", steps=1), tmp_path)
    names = json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)


def test_tokenizer_and_chat_template_come_with_the_model(tmp_path: Path) -> None:
    folder = train(text("sft", "lora", steps=1), tmp_path)
    before, after = AutoTokenizer.from_pretrained(base()), AutoTokenizer.from_pretrained(folder / "model")
    words = "What is 12 + 30? caf\u00e9 \U0001f600<|end_of_turn|><|end_of_text|>"
    assert after(words)["input_ids"] == before(words)["input_ids"]
    for ask in (True, False):
        rendered = after.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=ask)
        assert rendered == before.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=ask)
    assert "<|user|>What is 3 + 4?<|end_of_turn|><|assistant|>It is 7.<|end_of_turn|>" in rendered
    assert (after.eos_token_id, after.pad_token_id, len(after)) == (before.eos_token_id, before.pad_token_id, len(before))


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("mixed", "F32"), ("bfloat16", "BF16"), ("float64", "F64")])
@pytest.mark.parametrize("tuner", TUNERS)
def test_the_models_precision_is_kept(dtype: str, stored: str, tuner: str, tmp_path: Path) -> None:
    model = {"path": str(base()), "dtype": dtype}
    folder = train(text("sft", tuner, steps=2, model=model, optim={"learning_rate": 0.05}), tmp_path)
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert kinds == {stored}
    expected = {"F32": torch.float32, "BF16": torch.bfloat16, "F64": torch.float64}[stored]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert (logits(loaded) - logits(AutoModelForCausalLM.from_pretrained(base()))).abs().max() > 0.01


@pytest.mark.parametrize("tuner", TUNERS)
def test_a_folder_holds_only_safetensors_json_templates_and_text(tuner: str, tmp_path: Path) -> None:
    folder = train(text("grpo", tuner, steps=1), tmp_path)
    for name in ("model", *(["adapter"] if tuner == "lora" else [])):
        files = list((folder / name).iterdir())
        assert {each.suffix for each in files} <= {".safetensors", ".json", ".jinja", ".txt", ".md"}
        assert sum(each.suffix == ".safetensors" for each in files) == 1
    config = json.loads((folder / "model" / "config.json").read_text())
    assert "posttrain" not in json.dumps(config), "no setting of ours, such as the attention, is left in the config"
    assert not any("auto_map" in key for key in config)


def test_a_model_of_a_stage_is_what_the_next_stage_starts_from(tmp_path: Path) -> None:
    """With a learning rate that does nothing, the second stage's model is the first one's, bit for bit."""
    first = settings("sft", "lora", steps=3, optim={"learning_rate": 0.05})
    still = settings("grpo", **{**REUSED, "model": {"stage": "first"}, "steps": 1, "optim": {"learning_rate": 1e-30}})
    result = run(parsed(json.dumps({"stages": {"first": first, "second": still}})), tmp_path)
    one, two = (AutoModelForCausalLM.from_pretrained(result.model(name)).state_dict() for name in ("first", "second"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_created_model_is_an_ordinary_folder_too(tmp_path: Path) -> None:
    rows = {"sources": {"kind": "inline", "items": [{"text": f"{a} + {b} = {a + b}. " * 3} for a, b in SUMS]}}
    shape = {"hidden_size": 32, "layers": 2, "heads": 4, "key_value_heads": 2, "feed_forward": 48, "context": 64}
    made = {"kind": "create", "data": rows, "vocabulary": 300, "architecture": shape}
    folder = run(parsed(json.dumps({"stages": {"new": made}})), tmp_path).model("new")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model, IDS % 300), logits(load(folder).lm.model, IDS % 300))
    assert tokenizer.decode(tokenizer("12 + 3")["input_ids"]) == "12 + 3"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned to answer and to end its turns."""
    turns = [[{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"{a + b}"}] for a, b in SUMS]
    rows = {"sources": {"kind": "inline", "items": [{"messages": each} for each in turns]}}
    recipe = text("sft", data=rows, steps=60, batch={"rows": 12}, optim={"learning_rate": 0.02}, checkpoint={"every": 1000})
    return train(recipe, tmp_path_factory.mktemp("fitted")) / "model"


def test_generate_of_transformers_writes_what_our_greedy_sampler_writes(fitted: Path) -> None:
    """With no more said than the prompt and a length: the folder itself knows where a turn ends."""
    loaded, model = load(fitted), AutoModelForCausalLM.from_pretrained(fitted)
    template = Template(loaded.tokenizer)
    problems = [Problem(f"{a}{b}", (Message("user", f"What is {a} + {b}?"),)) for a, b in [*SUMS, (9, 9), (12, 5)]]
    ours = sample(InProcess(), loaded.lm, template, problems, 1, Sampling(max_tokens=20, temperature=0.0), seed=0)
    assert sum(one.tokens[-1] == template.end_id for one in ours) > len(ours) / 2, "it has learned to end its turns"
    for problem, one in zip(problems, ours, strict=True):
        prompt = template.prompt(problem.prompt)
        chat = [{"role": "user", "content": problem.prompt[0].content}]
        rendered = loaded.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert list(rendered) == prompt
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert tuple(theirs[0].tolist()) == one.tokens


def test_an_exported_model_generates_with_its_cache(fitted: Path) -> None:
    """Training turns the cache off; that must not reach those who use the model."""
    assert json.loads((fitted / "config.json").read_text()).get("use_cache", True) is True


def test_a_layout_or_device_of_training_does_not_reach_the_folder(tmp_path: Path) -> None:
    plain = train(text("sft", steps=1, model=str(base())), tmp_path / "plain") / "model" / "config.json"
    source = {"path": str(base()), "layout": "padded", "gradient_checkpointing": True}
    other = train(text("sft", steps=1, model=source), tmp_path / "other") / "model" / "config.json"
    assert plain.read_text() == other.read_text()
    assert ModelSource(path=str(base())).fingerprint() != ModelSource(path=str(plain.parent)).fingerprint()
