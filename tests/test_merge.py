"""Adapters folded into models, several as one, and adapters for peft: what is written says what was said before it was merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_encoders
import torch
from adapters import IDS, adapter, base, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import transformer
from tiny_runs import base as run_base
from tiny_runs import settings
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import posttrain
from posttrain.compress import export as exporting
from posttrain.compress.readback import staged
from posttrain.data.render import Template
from posttrain.errors import InputError, ModelError, RecipeError, RunError
from posttrain.models import delta, delta_file
from posttrain.models.load import load_scalar as load_plain_scalar
from posttrain.models.source import ModelSource
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import run
from posttrain.tuners import Tuner
from posttrain.tuners.folder import save_adapter
from posttrain.tuners.injected import layers_of
from posttrain.tuners.load import load, load_scalar
from posttrain.tuners.mix import Mix, together

ONE = torch.tensor([[4.0, -1.0, 3.0], [2.0, 0.5, 0.0]], dtype=torch.float64)
OTHER = torch.tensor([[-3.0, 2.0, 5.0], [1.0, -6.0, 0.0]], dtype=torch.float64)
FOLDED: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("lora", {"rank": 3, "rslora": True}), "dora": ("lora", {"rank": 3, "dora": True}),
    "pissa": ("lora", {"rank": 2, "init": "pissa"}), "ia3": ("ia3", {}), "bitfit": ("bitfit", {"add": True}),
    "layers": ("layers", {"last": 1}), "head": ("head", {"untie": True}), "lora on gpt2": ("lora", {"rank": 3}),
}  # fmt: skip
APART: dict[str, dict[str, Any]] = {
    "adapter": {"size": 4}, "prompt": {"tokens": 3}, "p_tuning": {"tokens": 3, "at": [0, 1]}, "prefix": {"tokens": 3, "projection": 8}
}  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def two(start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of different ranks on the start; the second leaves some layers alone."""
    folder = tmp_path_factory.mktemp("two")
    return [adapter(start, folder / "one", 5, rank=2), adapter(start, folder / "other", 6, rank=3, targets=["q_proj", "down_proj"])]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each.double() for name, each in load_file(folder / "model.safetensors").items()}


def updates_of(folder: Path) -> dict[str, torch.Tensor]:
    """alpha / rank B A of an adapter folder, by the name of the weight that it is added to."""
    state, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    found = {}
    for name in state:
        if ".lora_A." in name:
            product = state[name.replace("lora_A", "lora_B")].double() @ state[name].double()
            found[name.removeprefix("base_model.model.").replace(".lora_A", "")] = config["lora_alpha"] / config["r"] * product
    return found


# ---- one adapter


@pytest.mark.parametrize("note", FOLDED)
def test_a_merged_model_says_what_the_adapter_said_beside_the_model(note: str, start: Path, tmp_path: Path) -> None:
    kind, fields = FOLDED[note]
    on = base(tmp_path / "base", "gpt2") if note.endswith("gpt2") else start
    folder = adapter(on, tmp_path / "adapter", kind=kind, **fields)
    wanted, before = logits(load(folder, apart=True).lm.model), logits(load(on).lm.model)
    written = posttrain.merge(folder, tmp_path / "out")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert written.difference < 2e-5
    assert abs(written.divergence) < 1e-9
    assert written.bytes == sum(each.stat().st_size for each in (tmp_path / "out").iterdir())


def test_adapters_on_adapters_are_folded_all_the_way_down(start: Path, tmp_path: Path) -> None:
    first = adapter(start, tmp_path / "first", 3, rank=2)
    second = adapter(first, tmp_path / "second", 4, "ia3")
    wanted = logits(load(second).lm.model)
    posttrain.merge(second, tmp_path / "out")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted, rtol=0, atol=1e-5)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_chat_template_and_the_stop_tokens_are_those_that_were_learned(start: Path, tmp_path: Path) -> None:
    folder = adapter(start, tmp_path / "adapter", rank=2)
    changed = "{{ '<|im_start|>' }}learned" + AutoTokenizer.from_pretrained(start).chat_template
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = changed
    tokenizer.save_pretrained(folder)
    written = posttrain.merge(folder, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    ends = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert found.chat_template == changed
    assert written.chat_template
    assert set(Template(found).stop_ids) == {found.convert_tokens_to_ids("<|im_end|>"), found.eos_token_id}
    assert set(Template(found).stop_ids) <= set(ends) == set(written.stop_ids)


def test_a_folder_has_the_precision_that_is_asked_for_and_by_default_that_of_the_model_below(start: Path, tmp_path: Path) -> None:
    half = transformer("llama", vocab_size=408).to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(start).save_pretrained(tmp_path / "half")
    folder = adapter(tmp_path / "half", tmp_path / "adapter", rank=2)
    written = posttrain.merge(folder, tmp_path / "out")
    assert written.dtype == "bfloat16"
    wanted, found = load(folder).lm.model.state_dict(), load_file(tmp_path / "out" / "model.safetensors")
    for name, each in found.items():
        assert torch.equal(each, wanted[name].to(torch.bfloat16)), f"{name} is rounded once, from float32"
    assert 1e-4 < written.difference < 1
    assert 0 < written.divergence < 1e-2
    assert posttrain.merge(folder, tmp_path / "whole", dtype="float32").difference < 2e-5


def test_a_reward_models_adapter_is_merged_with_its_score(start: Path, tmp_path: Path) -> None:
    source = ModelSource(path=str(start))
    torch.manual_seed(0)
    loaded = load_scalar(source, lambda weight: torch.nn.init.normal_(weight, std=0.1))  # scores of about 1, as the bound is absolute
    tuner = Tuner.lookup("lora")(rank=2)
    tuner.install(loaded.lm.model)
    with torch.no_grad():
        for name, each in loaded.lm.model.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.1)
    loaded.lm.model.config.reward_shift = 0.25
    save_adapter(tuner, loaded.lm.model, tmp_path / "adapter", source)
    written = posttrain.merge(tmp_path / "adapter", tmp_path / "out")
    assert written.difference < 2e-5
    assert load_plain_scalar(tmp_path / "out").lm.shift == 0.25
    plain = load_plain_scalar(tmp_path / "out").lm.head.weight
    assert torch.equal(plain, loaded.lm.head.weight)
    posttrain.export(tmp_path / "adapter", tmp_path / "peft", "peft")
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    ids = IDS[:, :9]  # without control tokens, with one of which transformers would pad
    found = PeftModel.from_pretrained(model, tmp_path / "peft").eval()(input_ids=ids).logits
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    torch.testing.assert_close(found, again, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", APART)
def test_what_is_no_part_of_any_weight_is_refused_with_what_to_do(start: Path, kind: str, tmp_path: Path) -> None:
    folder = adapter(start, tmp_path / "adapter", kind=kind, **APART[kind])
    with pytest.raises(ModelError, match=rf"tuner {kind} .* cannot be merged; use the adapter folder as a model as it is"):
        posttrain.merge(folder, tmp_path / "out")
    above = adapter(folder, tmp_path / "above", rank=2)
    with pytest.raises(ModelError, match=rf"tuner {kind} .* cannot be merged"):
        posttrain.merge(above, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- several


def test_a_linear_merge_is_the_weighted_sum_of_the_updates(start: Path, two: list[Path], tmp_path: Path) -> None:
    written = posttrain.merge(two, tmp_path / "out", weights=[0.7, -0.3])
    found, wanted = weights_of(tmp_path / "out"), weights_of(start)
    for folder, weight in zip(two, (0.7, -0.3), strict=True):
        for name, update in updates_of(folder).items():
            wanted[name] = wanted[name] + weight * update
    assert found.keys() == wanted.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, wanted[name], rtol=0, atol=1e-6)
    assert written.difference < 5e-5, "from the adapters side by side, folded into nothing"


def test_ties_keeps_the_largest_elects_signs_and_averages_those_that_agree() -> None:
    """Worked by hand: of six values each keeps three, 4 3 2 and 5 -6 -3; their sums are 1 at the first place, 8, 2 and -6."""
    wanted = torch.tensor([[4.0, 0.0, (3 + 0.5 * 5) / 2], [2.0, -3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(together([ONE, OTHER], [1.0, 0.5], "ties", 0.5), wanted)
    pruned = torch.tensor([[4 - 1.5, 0.0, 3 + 2.5], [2.0, -3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(together([ONE, OTHER], [1.0, 0.5], "magnitude_prune", 0.5), pruned)


def test_dare_keeps_any_and_scales_them_up_so_that_the_mean_stays() -> None:
    draws = torch.stack([together([ONE, OTHER], [1.0, 0.5], "dare_linear", 0.25, seed) for seed in range(400)])
    allowed = torch.stack([0 * ONE, 4 * ONE, 2 * OTHER, 4 * ONE + 2 * OTHER])
    assert (draws[:, None] - allowed).abs().amin(1).max() < 1e-12
    deviation = (3 * (ONE**2 + (0.5 * OTHER) ** 2)).sqrt()  # of one draw: a value v is 4 v with probability 1/4
    assert ((draws.mean(0) - (ONE + 0.5 * OTHER)).abs() <= 4 * deviation / 400**0.5 + 1e-12).all()
    assert torch.equal(together([ONE, OTHER], [1, 1], "dare_ties", 0.5, 3), together([ONE, OTHER], [1, 1], "dare_ties", 0.5, 3))


def test_all_that_is_kept_is_the_sum_where_signs_are_not_elected() -> None:
    linear = together([ONE, OTHER], [0.7, 0.3], "linear", None)
    torch.testing.assert_close(linear, 0.7 * ONE + 0.3 * OTHER)
    for method in ("dare_linear", "magnitude_prune"):
        torch.testing.assert_close(together([ONE, OTHER], [0.7, 0.3], method, 1.0), linear)  # type: ignore[arg-type]
    elected = torch.tensor([[0.7 * 4, 0.3 * 2, (0.7 * 3 + 0.3 * 5) / 2], [(1.4 + 0.3) / 2, 0.3 * -6, 0]], dtype=torch.float64)
    torch.testing.assert_close(together([ONE, OTHER], [0.7, 0.3], "ties", 1.0), elected)
    torch.testing.assert_close(together([ONE, OTHER], [0.7, 0.3], "dare_ties", 1.0), elected)


@pytest.mark.parametrize(("method", "theirs"), [("linear", "cat"), ("ties", "ties_svd"), ("magnitude_prune", "magnitude_prune_svd")])
def test_it_is_what_peft_makes_of_the_updates(start: Path, tmp_path: Path, method: Any, theirs: str) -> None:
    parts = [adapter(start, tmp_path / f"{seed}", seed, rank=2, targets=["q_proj", "o_proj"]) for seed in (1, 2)]
    density = None if method == "linear" else 0.3
    posttrain.merge(parts, tmp_path / "out", weights=[0.7, 0.4], method=method, density=density)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), parts[0], adapter_name="a")
    model.load_adapter(parts[1], "b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type=theirs, svd_rank=32, density=density)
    model.set_adapter("both")
    wanted = logits(model.merge_and_unload())
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), wanted, rtol=0, atol=5e-5)


def test_dare_draws_by_seed_and_layer_alone(two: list[Path]) -> None:
    sources = [ModelSource(path=str(each)) for each in two]
    mixes = [Mix(sources, [1, 1], "dare_linear", 0.5, seed) for seed in (0, 0, 1)]
    layers = layers_of(mixes[0].load().lm.model)
    first, again, other = ({path: mix.update(path, layers[path]) for path in order} for mix, order in zip(mixes, (layers, reversed(layers), layers), strict=True))
    assert all(torch.equal(first[path], again[path]) for path in first)
    place, below = "model.layers.1.self_attn.q_proj", "model.layers.0.self_attn.q_proj"
    assert not torch.equal(first[place], other[place])
    assert not torch.equal(first[place] == 0, first[below] == 0)
    assert 0.2 < (first[place] == 0).double().mean() < 0.3, "a quarter is dropped from both"


def test_one_adapter_of_several_has_their_rank_and_loads_in_peft(start: Path, two: list[Path], tmp_path: Path) -> None:
    written = posttrain.merge(two, tmp_path / "adapter", weights=[0.7, 0.3], adapter=True)
    posttrain.merge(two, tmp_path / "model", weights=[0.7, 0.3])
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path / "adapter"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits(load(tmp_path / "adapter").lm.model), wanted, rtol=0, atol=2e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 5
    assert written.cut == 0

    smaller = posttrain.merge(two, tmp_path / "smaller", weights=[0.7, 0.3], adapter=True, rank=2)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    cut = {name: updates_of(tmp_path / "smaller")[name] for name in names}
    whole = {name: 0.7 * updates_of(two[0])[name] + 0.3 * updates_of(two[1])[name] for name in names}
    for name in names:
        left, sizes, right = torch.linalg.svd(whole[name])
        torch.testing.assert_close(cut[name], left[:, :2] * sizes[:2] @ right[:2], rtol=0, atol=1e-5)
    assert 0.01 < smaller.cut < 0.5
    assert smaller.difference > 0.1
    sparse = Mix([ModelSource(path=str(each)) for each in two], [1, 1], "ties", 0.4)
    assert abs(sparse.as_lora(sparse.load().lm.model, 48)[1]) < 1e-6, "of full rank nothing is cut off"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "merged by weight: give one for each"),
    ({"weights": [1]}, "weights 1: give one for each of the 2 adapters"),
    ({"weights": [1, float("nan")]}, "nan: is no finite number"),
    ({"weights": [1, 1], "method": "ties"}, "give density"),
    ({"weights": [1, 1], "density": 0.5}, "linear keeps all"),
    ({"weights": [1, 1], "method": "ties", "density": 0.0}, "above 0, and at most 1"),
    ({"weights": [1, 1], "method": "ties", "density": 1.5}, "above 0, and at most 1"),
    ({"weights": [1, 1], "rank": 4}, "rank is of an adapter"),
    ({"weights": [1, 1], "adapter": True, "dtype": "float16"}, "an adapter is float32"),
    ({"weights": [1, 1], "dtype": "int8"}, "a folder holds one of float32, bfloat16, float16"),
]


@pytest.mark.parametrize(("asked", "said"), REFUSED)
def test_settings_that_do_not_go_together_are_refused(two: list[Path], asked: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        posttrain.merge(two, tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


def test_adapters_that_do_not_add_up_are_refused(start: Path, two: list[Path], tmp_path: Path) -> None:
    elsewhere = base(tmp_path / "elsewhere", seed=7)
    both = {"weights": [1, 1], "out": tmp_path / "out"}
    with pytest.raises(ModelError, match="stand on different models"):
        posttrain.merge([two[0], adapter(elsewhere, tmp_path / "a", rank=2)], **both)
    with pytest.raises(ModelError, match="made on another model than"):
        posttrain.merge([two[0], tmp_path / "a"], **both, base=start)
    with pytest.raises(ModelError, match="is of tuner ia3, and only what lora learns adds up"):
        posttrain.merge([two[0], adapter(start, tmp_path / "b", kind="ia3")], **both)
    with pytest.raises(ModelError, match="is a DoRA"):
        posttrain.merge([two[0], adapter(start, tmp_path / "c", rank=2, dora=True)], **both)
    with pytest.raises(ModelError, match=r"tuner prompt .* cannot be merged"):
        posttrain.merge([two[0], adapter(start, tmp_path / "d", kind="prompt", tokens=2)], **both)
    with pytest.raises(ModelError, match="is no adapter folder"):
        posttrain.merge([two[0], start], **both)
    with pytest.raises(InputError, match="there is nothing to merge; `posttrain export` writes models"):
        posttrain.merge(start, tmp_path / "out")
    with pytest.raises(InputError, match="nothing: no such folder"):
        posttrain.merge("nothing", tmp_path / "out")
    with pytest.raises(InputError, match="are of several adapters"):
        posttrain.merge(two[0], tmp_path / "out", method="ties", density=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_peft_began_in_the_weights_is_merged_alone_and_never_mixed(start: Path, two: list[Path], tmp_path: Path, init: Any) -> None:
    """Its B A is no difference from the base: that of such an adapter which has learned nothing is not 0."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        get_peft_model(AutoModelForCausalLM.from_pretrained(start), config).save_pretrained(tmp_path / "begun")
    with pytest.raises(ModelError, match=rf"begins in the weights of the model below \({init}\)"):
        posttrain.merge([two[0], tmp_path / "begun"], tmp_path / "out", weights=[1, 1], base=start)
    posttrain.merge(tmp_path / "begun", tmp_path / "out", base=start)
    torch.testing.assert_close(logits(load(tmp_path / "out").lm.model), logits(load(start).lm.model), rtol=0, atol=1e-4)


def test_a_reward_models_adapter_is_not_mixed(start: Path, two: list[Path], tmp_path: Path) -> None:
    loaded = load_scalar(ModelSource(path=str(start)), torch.nn.init.normal_)
    tuner = Tuner.lookup("lora")(rank=2)
    tuner.install(loaded.lm.model)
    save_adapter(tuner, loaded.lm.model, tmp_path / "adapter", ModelSource(path=str(start)))
    with pytest.raises(ModelError, match="is the adapter of a model that scores"):
        posttrain.merge([two[0], tmp_path / "adapter"], tmp_path / "out", weights=[1, 1])


def test_different_chat_templates_are_not_mixed_without_a_word(start: Path, two: list[Path], tmp_path: Path) -> None:
    third = adapter(start, tmp_path / "third", rank=2)
    tokenizer = AutoTokenizer.from_pretrained(third)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(third)
    with pytest.raises(ModelError, match="different chat templates; name the one to keep with chat_template"):
        posttrain.merge([two[0], third], tmp_path / "out", weights=[1, 1])
    (tmp_path / "kept.jinja").write_text(tokenizer.chat_template)
    posttrain.merge([two[0], third], tmp_path / "out", weights=[1, 1], chat_template=tmp_path / "kept.jinja")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


# ---- on quantised weights


def test_what_was_learned_on_codes_is_folded_into_what_they_stand_for(tmp_path: Path) -> None:
    """GPT-2's matrices lie transposed, but for where they are codes; and two adapters stand on them, one on the other."""
    lora = adapter(base(tmp_path / "gpt2", "gpt2"), tmp_path / "lora", 1, quantize="nf4", rank=2)
    folder = adapter(lora, tmp_path / "both", 2, "ia3")
    with pytest.raises(ModelError, match=r"learned on .* quantised to nf4.*--dequantize folds it.*--base MODEL"):
        posttrain.merge(folder, tmp_path / "out")
    told = posttrain.merge(folder, tmp_path / "out", dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(found), logits(load(folder).lm.model), rtol=0, atol=2e-5)
    assert told.difference < 5e-5
    assert not hasattr(found.config, "quantization_config")


def test_a_base_that_is_named_takes_them_as_it_is(start: Path, tmp_path: Path) -> None:
    folder = adapter(start, tmp_path / "adapter", 1, quantize="nf4", rank=2)
    told = posttrain.merge(folder, tmp_path / "out", base=start)
    wanted = weights_of(start)
    for name, update in updates_of(folder).items():
        wanted[name] = wanted[name] + update
    for name, each in weights_of(tmp_path / "out").items():
        torch.testing.assert_close(each, wanted[name], rtol=0, atol=1e-6)
    assert told.difference > 0.1, "it is another function, and says so"
    assert told.divergence > 1e-4
    both = adapter(folder, tmp_path / "both", 2, "ia3")  # in the same layers, one around the other
    posttrain.merge(both, tmp_path / "scaled", dequantize=True)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")
    torch.testing.assert_close(logits(found), logits(load(both).lm.model), rtol=0, atol=2e-5)


def test_adapters_on_codes_are_mixed_on_them_or_on_what_they_stand_for(start: Path, tmp_path: Path) -> None:
    parts = [adapter(start, tmp_path / f"{seed}", seed, quantize="nf4", rank=2) for seed in (1, 2)]
    with pytest.raises(ModelError, match="--dequantize folds it"):
        posttrain.merge(parts, tmp_path / "out", weights=[0.7, 0.3])
    posttrain.merge(parts, tmp_path / "model", weights=[0.7, 0.3], dequantize=True)
    posttrain.merge(parts, tmp_path / "adapter", weights=[0.7, 0.3], adapter=True)
    wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(logits(load(tmp_path / "adapter").lm.model), wanted, rtol=0, atol=2e-5)
    written = posttrain.export(parts[0], tmp_path / "peft", "peft")
    assert written.difference < 2e-5, "peft is asked on the same codes"


# ---- what is checked, and what is left where a check fails


def test_what_fails_its_check_leaves_nothing(start: Path, two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(model: Any, tokenizer: Any, folder: Path) -> None:
        with torch.no_grad():
            model.model.norm.weight[3] += 0.01
        save(model, tokenizer, folder)

    save = exporting.save
    monkeypatch.setattr(exporting, "save", spoiled)
    with pytest.raises(RunError, match=r"its logits are up to .* from those that it should give; nothing is left there"):
        posttrain.merge(two[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())

    def deaf(model: Any, tokenizer: Any, folder: Path) -> None:
        model.generation_config.eos_token_id = 1
        save(model, tokenizer, folder)

    monkeypatch.setattr(exporting, "save", deaf)
    with pytest.raises(RunError, match=r"of the tokens .* that end an answer it has"):
        posttrain.merge(two[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten_and_an_empty_folder_is_taken(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    posttrain.merge(two[0], tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]
    with pytest.raises(InputError, match="is there already"):
        posttrain.merge(two[0], tmp_path / "out")
    with pytest.raises(FileNotFoundError), staged(tmp_path / "other") as stage:
        (stage / "no" / "such").write_text("")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out"]


# ---- for peft


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "prefix"])
def test_a_peft_folder_says_the_same_in_peft(start: Path, kind: str, tmp_path: Path) -> None:
    folder = adapter(start, tmp_path / "adapter", kind=kind, **{"lora": {"rank": 2}, "ia3": {}}.get(kind, APART.get(kind)))
    written = posttrain.export(folder, tmp_path / "out", "peft")
    assert written.difference < 2e-5
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path / "out")
    moved = logits(model)[-IDS.shape[1] :] - logits(AutoModelForCausalLM.from_pretrained(start))
    assert moved.abs().max() > 0.01
    assert not (tmp_path / "out" / "posttrain_adapter.json").exists()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(start)
    assert (load(tmp_path / "out").tokenizer.chat_template is not None) == written.chat_template


def test_what_peft_cannot_read_is_refused(start: Path, two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is no adapter folder, so there is nothing for peft"):
        posttrain.export(start, tmp_path / "out", "peft")
    with pytest.raises(ModelError, match=r"peft has no tuner bitfit, .* or format folder"):
        posttrain.export(adapter(start, tmp_path / "a", kind="bitfit", add=True), tmp_path / "out", "peft")
    with pytest.raises(ModelError, match="stands on another adapter, which peft would leave out; merge that one first"):
        posttrain.export(adapter(two[0], tmp_path / "b", rank=2), tmp_path / "out", "peft")
    within = adapter(start, tmp_path / "c", kind="p_tuning", tokens=3, at=[0, 1])
    with pytest.raises(ModelError, match=r"no tuner p_tuning, or none with these settings; use the folder as it is$"):
        posttrain.export(within, tmp_path / "out", "peft")
    with pytest.raises(InputError, match="written as it was learned"):
        posttrain.export(two[0], tmp_path / "out", "peft", dtype="float16")
    with pytest.raises(InputError, match="take one of folder, peft, bitdelta, gguf"):
        posttrain.export(two[0], tmp_path / "out", "onnx")


# ---- deltas


def test_a_delta_is_one_file_or_folded_in(start: Path, tmp_path: Path) -> None:
    fine = base(tmp_path / "fine", seed=0)
    model = AutoModelForCausalLM.from_pretrained(fine)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(0.02 * torch.randn(each.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(fine)
    folder = adapter(start, tmp_path / "delta", kind="delta_scale", of={"path": str(fine)})
    wanted = logits(load(folder).lm.model)
    told = posttrain.export(folder, tmp_path / "out.bitdelta", "bitdelta")
    assert told.difference == 0
    (one, alone), (other, within) = delta_file.read(tmp_path / "out.bitdelta"), delta_file.read(folder)
    assert one == other | {"chat_template": load(start).tokenizer.chat_template, "eos_token": load(start).tokenizer.eos_token}
    assert alone.keys() == within.keys()
    assert all(torch.equal(alone[name], within[name]) for name in alone)
    lm = load(start).lm
    delta_file.add_file(lm.model, tmp_path / "out.bitdelta", "out", ModelSource(path=str(start)))
    delta.switch(lm.model, "out")
    assert torch.equal(logits(lm.model), wanted)
    posttrain.merge(folder, tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
    assert (wanted - logits(load(start).lm.model)).abs().max() > 0.01
    above = adapter(folder, tmp_path / "above", 2, rank=2)
    posttrain.merge(above, tmp_path / "both")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "both"))
    torch.testing.assert_close(found, logits(load(above).lm.model), rtol=0, atol=2e-5)
    with pytest.raises(ModelError, match="is no delta; make one"):
        posttrain.export(start, tmp_path / "no.bitdelta", "bitdelta")
    with pytest.raises(InputError, match=r"name it with .bitdelta"):
        posttrain.export(folder, tmp_path / "no", "bitdelta")


def test_a_classifiers_adapter_is_refused(start: Path, tmp_path: Path) -> None:
    folder = adapter(start, tmp_path / "adapter", rank=2)
    state = load_file(folder / "adapter_model.safetensors") | {"base_model.model.score.weight": torch.ones(3, 32)}
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="is a classifier"):
        posttrain.merge(folder, tmp_path / "out")


def test_a_model_that_gives_a_number_is_no_reward_model(start: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, problem_type="regression")
    model.save_pretrained(tmp_path / "number")
    AutoTokenizer.from_pretrained(start).save_pretrained(tmp_path / "number")
    with pytest.raises(ModelError, match="is a classifier, and only language and reward models are merged and exported"):
        posttrain.export(tmp_path / "number", tmp_path / "out")
    with pytest.raises(ModelError, match="number: scores or classifies, and does not write; name a language model"):
        load(tmp_path / "number")


def test_an_encoder_that_classifies_is_no_language_model_with_weights_missing(tmp_path: Path) -> None:
    tiny_encoders.transformer("bert").save_pretrained(tmp_path / "bert")
    tiny_encoders.tokenizer("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="bert: scores or classifies, and does not write"):
        load(tmp_path / "bert")


# ---- in a recipe


def stages(**merge: Any) -> str:
    fields = {"model": str(run_base()), "objective": "sft", "tuner": {"kind": "lora", "rank": 2}, "optim": {"learning_rate": 0.02}}
    trained = {**settings("sft", "lora", steps=2), **fields}
    merged = {"kind": "merge", "adapters": [{"model": {"stage": "a"}, "weight": 0.6}, {"model": {"stage": "b"}, "weight": 0.6}]}
    return json.dumps({"stages": {"a": trained, "b": {**trained, "steps": 3}, "both": merged | merge}})


def test_a_recipe_merges_the_adapters_of_its_stages(tmp_path: Path) -> None:
    recipe = Recipe.parse(stages())
    result = run(recipe, tmp_path)
    wanted = weights_of(Path(run_base()))
    for name in ("a", "b"):
        for place, update in updates_of(result.folders[name] / "adapter").items():
            wanted[place] = wanted[place] + 0.6 * update
    for name, each in weights_of(result.model("both")).items():
        torch.testing.assert_close(each, wanted[name], rtol=0, atol=1e-6)
    assert result.stages["both"]["written"]["difference"] < 5e-5


def test_a_stage_without_an_adapter_gives_nothing_to_merge(tmp_path: Path) -> None:
    trained = {**settings("sft", "full", steps=2), "model": str(run_base()), "objective": "sft", "tuner": "full"}
    given = {"a": trained, "one": {"kind": "merge", "adapters": [{"model": {"stage": "a"}}]}}
    with pytest.raises(ModelError, match=r"is a whole model and no adapter \(of tuner full\?\), so there is nothing to merge"):
        run(Recipe.parse(json.dumps({"stages": given})), tmp_path)


def test_a_merge_stage_is_refused_before_anything_runs() -> None:
    alone = [{"model": {"stage": "a"}}]
    for change, said in (
        ({"method": "ties"}, "give density"),
        ({"method": "mean"}, "linear"),
        ({"density": 2.0, "method": "ties"}, "less than or equal to 1"),
        ({"adapters": [*alone, *alone]}, "give each one, such as weight: 0.5"),
        ({"adapters": alone, "method": "ties", "density": 0.5}, "are of several adapters"),
    ):
        with pytest.raises(RecipeError, match=said):
            Recipe.parse(stages(**change))
    assert Mix([], []).check_settings() is None
