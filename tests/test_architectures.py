"""Tuners, and what makes models smaller, on other models than one stack of linear layers: mixtures of experts, multimodal ones."""

import json

import pytest
import torch
from adapters import adapter, base
from peft.tuners.lora import ParamWrapper
from tiny_models import make, transformer
from tiny_runs import DATA, RAW
from tuned_models import CASES, Case, installed, move

import posttrain
from posttrain.batch import Sequences
from posttrain.compress.blocks import blocks_of
from posttrain.errors import ModelError, RecipeError
from posttrain.models.linears import left_out
from posttrain.models.senses import beyond_text
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import Listener, run
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.injected import layers_of
from posttrain.tuners.load import load

SEQS = Sequences.of([([5, 9, 40, 3, 61, 71, 8, 2, 66], [False] + [True] * 8)])
SFT = {"objective": "sft", "data": DATA, "steps": 3, "batch": {"rows": 2}}
MIXTURES = pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
TOWERS = ["model.vision_tower", "model.multi_modal_projector"]


def said(lm):
    with torch.no_grad():
        return lm.logprobs(SEQS)


def stages(tmp_path, listener=None, **given):
    """The folders of a recipe's stages."""
    return run(Recipe.parse(json.dumps({"stages": given}), name="tiny"), tmp_path / "runs", listener).folders


# ---- mixtures of experts


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_lora_learns_on_the_experts_and_is_folded_into_them(name):
    lm = make(name)
    tuner = Tuner.lookup("lora")(rank=3)
    tuner.install(lm.model)
    wrapped = {layer.parameter_name for layer in layers_of(lm.model).values() if isinstance(layer, ParamWrapper)}
    assert wrapped == {"gate_up_proj", "down_proj", "weight"}, "of experts, and of what sends tokens to them"
    before = said(lm)
    move(lm)
    learned = said(lm)
    assert (learned - before).abs().max() > 0.1
    with tuner.switched_off(lm.model):
        torch.testing.assert_close(said(lm), before, rtol=0, atol=1e-6)
    tuner.merge(lm.model)
    assert not layers_of(lm.model)
    torch.testing.assert_close(said(lm), learned, rtol=0, atol=1e-4)


def test_a_stage_on_a_mixture_leaves_its_model_and_an_adapter_that_says_the_same(tmp_path):
    start = base(tmp_path / "base", "mixtral")
    folders = stages(tmp_path, tuned={"model": str(start), "tuner": {"kind": "lora", "rank": 2}, **SFT})
    model, beside, alone = (load(each).lm for each in (folders["tuned"] / "model", folders["tuned"] / "adapter", start))
    torch.testing.assert_close(said(model), said(beside), rtol=0, atol=1e-5)
    assert (said(model) - said(alone)).abs().max() > 1e-3


def test_several_loras_on_experts_are_merged_into_weights_and_not_into_one_lora(tmp_path):
    start = base(tmp_path / "base", "mixtral")
    two = [adapter(start, tmp_path / f"lora{seed}", seed, rank=2) for seed in (1, 2)]
    told = posttrain.merge(two, tmp_path / "both", weights=[1.0, 0.0])
    assert told.difference < 1e-4
    torch.testing.assert_close(said(load(tmp_path / "both").lm), said(load(two[0]).lm), rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match="change the experts of a mixture"):
        posttrain.merge(two, tmp_path / "one", weights=[0.5, 0.5], adapter=True)


@MIXTURES
@pytest.mark.parametrize("settings", [{"kind": "adapter"}, {"kind": "adapter", "variant": "pfeiffer"}, {"kind": "ia3"}], ids=str)
def test_what_needs_one_feed_forward_layer_a_block_is_refused_on_a_mixture(name, settings):
    with pytest.raises(RecipeError, match=r"is a mixture of experts.*take another tuner, such as lora"):
        Tuner.model_validate(settings).install(transformer(name))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_a_beginning_in_the_weights_of_a_layer_needs_layers(init):
    with pytest.raises(RecipeError, match=rf"tuner.init: {init} begins with the weights of a layer, and a mixture's experts"):
        Tuner.lookup("lora")(rank=2, init=init).install(transformer("mixtral"))
    lm = make("mixtral")
    tuner, before = Tuner.lookup("lora")(rank=2, init=init, targets=["q_proj", "v_proj"]), said(lm)
    tuner.install(lm.model)
    torch.testing.assert_close(said(lm), before, rtol=0, atol=1e-4)


def test_that_experts_stay_as_they_are_is_said_by_all_that_make_layers_smaller(tmp_path):
    start, heard = base(tmp_path / "base", "mixtral"), []
    told = left_out(transformer("mixtral", vocab_size=408))
    share = 2 * 4 * 3 * 32 * 48 / sum(each.numel() for each in load(start).lm.model.parameters())
    assert told == [f"the experts of this mixture, {share:.0%} of its weights, stay as they are: they are in no linear layer"]
    given = {
        "small": {"kind": "quantize", "group": 16, "model": str(start)}, "thin": {"kind": "prune", "method": "magnitude", "model": str(start)},
        "tuned": {"model": {"path": str(start), "quantize": "nf4"}, "tuner": {"kind": "lora", "rank": 2}, **SFT},
    }  # fmt: skip
    stages(tmp_path, Listener(say=heard.append), **given)
    assert sum(told[0] in line for line in heard) == 3
    assert left_out(transformer("llama")) == []


# ---- multimodal models


def test_the_parts_that_do_not_read_text_are_known():
    assert beyond_text(transformer("gemma3_sees")) == TOWERS
    assert beyond_text(transformer("gemma3")) == beyond_text(transformer("llama")) == []


@pytest.mark.parametrize("case", [*(case for case in CASES if case.kind != "delta_scale"), Case("full", len)], ids=str)
def test_every_tuner_tunes_what_reads_text_and_each_part_of_it_gets_a_gradient(case):
    lm = make("gemma3_sees")
    installed(case, lm, "gemma3")
    names = tuned(lm.model)
    assert not [name for name in names if name.startswith(tuple(TOWERS))]
    move(lm, by=1e-3)  # where something begins with 0, what stands before it has no gradient
    lm.logprobs(SEQS).sum().backward()
    assert not [name for name, each in names.items() if each.grad is None]


def test_the_last_block_is_that_of_the_text_however_deep_the_tower():
    model = transformer("gemma3_sees")
    Tuner.lookup("layers")(last=1).install(model)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in tuned(model) if ".layers." in name} == {1}
    with pytest.raises(RecipeError, match="has 2 blocks"):
        Tuner.lookup("layers")(last=3).install(transformer("gemma3_sees"))


SMALLER = [{"kind": "prune", "method": "wanda", "data": RAW}, {"kind": "quantize", "group": 8}]


@pytest.mark.parametrize("settings", SMALLER, ids=lambda case: case["kind"])
def test_what_makes_models_smaller_leaves_the_towers_alone(settings, tmp_path):
    assert not [path for block in blocks_of(transformer("gemma3_sees")) for path in block.layers if path.startswith(tuple(TOWERS))]
    start = base(tmp_path / "base", "gemma3_sees")
    folders = stages(tmp_path, small={"model": str(start), **settings})
    before, after = load(start).lm.model, load(folders["small"] / "model").lm.model
    other = dict(before.named_parameters())
    for name, each in after.named_parameters():
        if name.startswith(tuple(TOWERS)):
            torch.testing.assert_close(each, other[name], rtol=0, atol=0)


# ---- a feed-forward layer without a module


def test_a_parallel_adapter_never_stands_around_a_whole_block():
    with pytest.raises(RecipeError, match=r"tuner.variant: parallel .* OPTForCausalLM has no module for"):
        Tuner.lookup("adapter")(variant="parallel").install(transformer("opt"))
    model = transformer("opt")
    Tuner.lookup("adapter")(size=4).install(model)
    assert {name.split(".")[-3] for name in tuned(model) if ".adapter." in name} == {"out_proj", "fc2"}
