"""NF4: the codes are bitsandbytes', a layer of codes is the dense layer of their values, and tuners learn on it (QLoRA)."""

import json
import statistics
from itertools import product

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from test_tuners import SEQS, said, said_by
from tiny_models import transformer
from tiny_runs import base, settings, text, train
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from tuned_models import ARCHITECTURES, CASES, installed, move

from posttrain.batch import Sequences
from posttrain.errors import ModelError, RecipeError
from posttrain.models import nf4
from posttrain.models.linears import below_head
from posttrain.models.load import load, save
from posttrain.models.quantized import NF4, quantized
from posttrain.models.quantizer import mark
from posttrain.models.source import ModelSource
from posttrain.pipeline.recipe import Recipe
from posttrain.sampling import Sampling
from posttrain.sampling.engine import Engine, Request
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.folder import load_adapter, save_adapter
from posttrain.tuners.injected import fold
from posttrain.tuners.load import load as load_with_adapters

SHAPES = [(64, 64), (7, 13), (333, 77), (512, 300)]
AT_HOME = torch.device("cpu")
ids = [0, 5, 40, 300]


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["bitsandbytes", "ours"])
def by(request, monkeypatch):
    """Each way of computing codes and values."""
    if request.param == "ours":
        monkeypatch.setattr(nf4, "has_bitsandbytes", lambda: False)
    return request.param


# ---- codes


def test_the_16_values_are_the_quantiles_that_the_paper_derives_them_from():
    quantile, offset = statistics.NormalDist().inv_cdf, 1 - (1 / 30 + 1 / 32) / 2
    above = [quantile(offset + (0.5 - offset) * index / 8) for index in range(8)]
    below = [-quantile(offset + (0.5 - offset) * index / 7) for index in range(7)]
    found = sorted(each / max(above) for each in [*below, 0.0, *above])
    torch.testing.assert_close(torch.tensor(nf4.VALUES), torch.tensor(found), rtol=0, atol=2e-7)


def test_codes_stand_two_a_byte_with_the_first_in_the_high_half(by):
    codes, largest = nf4.quantize(torch.tensor([0.1, -0.5, 0.25, 1.0]))
    assert codes.tolist() == [0x82, 0xAF]
    assert largest.tolist() == [1.0]
    found = nf4.dequantize(codes, largest, torch.Size((4,)))
    torch.testing.assert_close(found, torch.tensor([0.0795803, -0.5250731, 0.2461123, 1.0]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_values_are_those_of_bitsandbytes_bit_for_bit(shape, by):
    import bitsandbytes.functional as theirs

    weight = 0.02 * drawn(*shape)
    codes, largest = nf4.quantize(weight)
    packed, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    assert torch.equal(codes, packed[:, 0])
    assert torch.equal(largest, state.absmax)
    assert torch.equal(nf4.dequantize(codes, largest, weight.shape), theirs.dequantize_4bit(packed, state))


def test_magnitudes_in_8_bits_are_those_of_bitsandbytes_but_where_its_cpu_kernel_misses_the_nearest():
    import bitsandbytes.functional as theirs

    weight = 0.02 * drawn(512, 1024)
    _, largest = nf4.quantize(weight)
    codes, outer, mean = nf4.quantize_magnitudes(largest)
    _, state = theirs.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    values = nf4.dynamic_map(AT_HOME)
    assert torch.equal(values, state.state2.code)
    assert torch.equal(values, theirs.create_dynamic_map())
    assert torch.equal(outer, state.state2.absmax)
    assert mean == state.offset
    scaled = ((largest - mean).view(-1, 256) / outer[:, None]).view(-1)
    distances = (scaled[:, None] - values).abs()
    assert bool((distances.gather(1, codes.long()[:, None])[:, 0] <= distances.amin(1) + 1e-7).all()), "the nearest, always"
    other = (codes != state.absmax).float().mean()
    assert other < 5e-3
    torch.testing.assert_close(nf4.dequantize_magnitudes(codes, outer, mean), largest, rtol=0, atol=float(outer.max()) * 0.008)


def test_every_weight_becomes_the_nearest_value_and_none_is_further_off_than_half_the_widest_gap(by):
    weight = drawn(100_000)
    codes, largest = nf4.quantize(weight)
    found = nf4.dequantize(codes, largest, weight.shape)
    scale = largest.repeat_interleave(64)[: len(weight)]
    nearest = (weight[:, None] / scale[:, None] - torch.tensor(nf4.VALUES)).abs().amin(1) * scale
    torch.testing.assert_close((found - weight).abs(), nearest, rtol=0, atol=1e-6)
    assert bool(((found - weight).abs() <= scale * 0.1519 + 1e-6).all())
    assert float(((found - weight) ** 2).mean()) == pytest.approx(0.00844, abs=2e-4)


def test_a_block_of_zeros_stays_zeros(by):
    codes, largest = nf4.quantize(torch.zeros(64, 2))
    assert not nf4.dequantize(codes, largest, torch.Size((64, 2))).any()


def test_a_weight_takes_4_bits_and_its_share_of_the_magnitudes():
    weight = drawn(512, 1024)
    assert 8 * NF4.of(weight, None, double=False).nbytes / weight.numel() == 4.5
    assert 8 * NF4.of(weight, None, double=True).nbytes / weight.numel() == pytest.approx(4.126953, abs=1e-4)


# ---- the layer


@pytest.mark.parametrize("double", [False, True])
def test_a_layer_of_codes_is_the_dense_layer_of_their_values(double):
    bias = nn.Parameter(drawn(48, dtype=torch.float64, seed=2))
    layer = NF4.of(drawn(48, 64), bias, double)
    dense = nn.Linear(64, 48, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.dense())
        dense.bias.copy_(bias)
    grads = []
    for each in (layer, dense):
        rows = drawn(3, 5, 64, dtype=torch.float64, seed=1).requires_grad_()
        out = each(rows)
        (out**2).sum().backward()
        grads.append((out.detach(), rows.grad, each.bias.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_nothing_dense_is_kept_for_the_backward():
    layer, kept = NF4.of(drawn(64, 64), None, double=False), []
    rows = drawn(2, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(rows).sum().backward()
    assert not kept
    assert rows.grad is not None


def folder_of(name, tmp_path):
    transformer(name).save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(base()).save_pretrained(tmp_path / name)
    (tmp_path / name / "tokenizer.json").write_text(small_tokenizer(tmp_path / name), encoding="utf-8")
    return tmp_path / name


def small_tokenizer(folder):
    """The tokenizer's file with no more tokens than the tiny models have."""
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    found["model"]["vocab"] = {token: index for token, index in found["model"]["vocab"].items() if index < 97}
    found["model"]["merges"] = []
    return json.dumps(found)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("bases")
    return {name: folder_of(name, home) for name in ARCHITECTURES}


def coded(folders, name, **changes):
    return load(ModelSource(path=str(folders[name]), quantize="nf4", **changes)).lm


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_layers_below_the_head_are_read_as_codes_and_nothing_else(name, folders):
    lm, plain = coded(folders, name), load(ModelSource(path=str(folders[name]))).lm
    places = below_head(plain.model)
    assert set(quantized(lm.model)) == set(places)
    assert len(places) == 8 if name == "gpt2" else 14
    others = {key: each for key, each in plain.model.named_parameters() if key.removesuffix(".weight") not in places}
    assert all(torch.equal(each, others[key]) for key, each in lm.model.named_parameters())
    assert len(others) == len(list(lm.model.named_parameters()))
    with torch.no_grad():
        for path, layer in places.items():
            dense = quantized(lm.model)[path].dense()
            layer.weight.copy_(dense.t() if name == "gpt2" else dense)
    torch.testing.assert_close(said(lm), said(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_it_computes_in_bfloat16_where_it_is_asked_to(dtype, folders):
    wide, half = said(coded(folders, "llama")), said(coded(folders, "llama", dtype=dtype))
    assert 0 < (wide - half).abs().max() < 0.2


# ---- folders


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folder_of_codes_is_read_again_and_by_transformers(name, double, folders, tmp_path):
    lm = coded(folders, name, double=double)
    mark(lm.model)
    save(lm.model, AutoTokenizer.from_pretrained(folders[name]), tmp_path)
    source = ModelSource(path=str(tmp_path))
    assert source.is_quantized()
    again = load(source).lm
    assert torch.equal(said(again), said(lm))
    if name == "llama":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        torch.testing.assert_close(said_by(theirs), said(lm), rtol=0, atol=1e-5)
    with safe_open(next(tmp_path.glob("*.safetensors")), "pt") as file:
        assert any(key.endswith("weight.quant_state.bitsandbytes__nf4") for key in file.keys())  # noqa: SIM118


def test_what_bitsandbytes_has_stored_is_read(folders, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folders["qwen3"], quantization_config=config)
    theirs.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["qwen3"]).save_pretrained(tmp_path)
    torch.testing.assert_close(said(load(str(tmp_path)).lm), said_by(theirs), rtol=0, atol=1e-5)


# ---- tuners on it


FITTING = [case for case in CASES if case.kind != "delta_scale" and not case.tuner("llama").changes_weights]


@pytest.mark.parametrize("case", FITTING, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_tuner_on_codes_learns_is_stored_and_comes_back(case, name, folders, tmp_path):
    lm, source = coded(folders, name), ModelSource(path=str(folders[name]), quantize="nf4")
    before = said(lm)
    tuner = installed(case, lm, name)
    loss, _ = lm.weighted_sum(SEQS, -torch.ones(SEQS.trained))
    loss.backward()
    assert all(each.grad is not None for each in tuned(lm.model).values())
    move(lm)
    wanted = said(lm)
    assert (wanted - before).abs().max() > 1e-3
    if tuner.reversible:
        with tuner.switched_off(lm.model):
            assert torch.equal(said(lm), before), "the reference is the base as it is computed: of codes"
    save_adapter(tuner, lm.model, tmp_path, source)
    assert json.loads((tmp_path / "posttrain_adapter.json").read_text())["quantize"] == "nf4"
    again = coded(folders, name)
    load_adapter(again.model, tmp_path, source)
    torch.testing.assert_close(said(again), wanted, rtol=0, atol=1e-5)


def test_peft_reads_such_an_adapter_on_the_base_as_bitsandbytes_has_it(folders, tmp_path):
    lm = coded(folders, "llama")
    tuner = Tuner.lookup("lora")(rank=3)
    tuner.install(lm.model)
    move(lm)
    save_adapter(tuner, lm.model, tmp_path, ModelSource(path=str(folders["llama"]), quantize="nf4"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folders["llama"], quantization_config=config)
    torch.testing.assert_close(said_by(PeftModel.from_pretrained(theirs, tmp_path).eval()), said(lm), rtol=0, atol=2e-5)


def test_what_is_sampled_from_codes_has_the_probabilities_that_training_gives_it(folders):
    lm = coded(folders, "llama")
    Tuner.lookup("lora")(rank=3).install(lm.model)
    move(lm)
    engine = Engine(lm, Sampling(max_tokens=9), [1], seed=3)
    engine.add(Request((5, 9, 40, 3), (0,)))
    done = engine.next()
    row = ([*done.request.tokens, *done.tokens], [False] * 4 + [True] * len(done.tokens))
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(done.logp), lm.logprobs(Sequences.of([row])), rtol=0, atol=2e-5)


QLORA = {"model": {"path": None, "quantize": "nf4", "double": True}, "tuner": {"kind": "lora", "rank": 2}}


def qlora(**changes):
    return {**QLORA, "model": {**QLORA["model"], "path": str(base())}, **changes}


def test_a_stage_leaves_an_adapter_that_brings_its_codes_with_it(tmp_path):
    folder = train(text("sft", "full", steps=3, **qlora()), tmp_path)
    assert not (folder / "adapter").exists()
    assert not (folder / "model" / "config.json").exists()
    lm = load_with_adapters(folder / "model").lm
    assert len(quantized(lm.model)) == 14
    assert quantized(lm.model)["model.layers.0.mlp.up_proj.base_layer"].outer is not None, "double, as in training"
    wide = load_with_adapters(ModelSource(path=str(folder / "model"), base=str(base()))).lm
    assert quantized(wide.model), "also where the base is named"


def test_a_resumed_run_on_codes_is_the_same_bit_for_bit(tmp_path):
    import signal

    from posttrain.pipeline.signals import Interrupted

    whole = train(text("grpo", "full", steps=4, **qlora()), tmp_path / "whole")
    halved = text("grpo", "full", steps=4, **qlora())
    with pytest.raises(Interrupted):
        train(halved, tmp_path / "halved", {2: signal.SIGTERM})
    again = train(halved, tmp_path / "halved")
    one, other = (
        (folder / "model" / "adapter_model.safetensors").read_bytes() for folder in (whole, again)
    )
    assert one == other


# ---- what is refused


@pytest.mark.parametrize(
    "tuner", ["full", {"kind": "layers", "last": 1}, {"kind": "lora", "init": "pissa"}, {"kind": "lora", "init": "olora"}], ids=str
)
def test_a_tuner_that_changes_weights_is_refused_before_any_is_read(tuner, tmp_path):
    recipe = Recipe.parse(json.dumps(settings("sft", "full", **qlora(tuner=tuner))))
    with pytest.raises(RecipeError, match=r"stage train: tuner \w+: would change the weights of .*, which are quantised"):
        recipe.check()


def test_folding_into_codes_is_refused_and_never_lost_silently(folders):
    lm = coded(folders, "llama")
    Tuner.lookup("lora")(rank=2).install(lm.model)
    with pytest.raises(ModelError, match="quantised: codes of a few bits cannot take a difference up"):
        fold(lm.model)


def test_double_goes_with_nf4():
    with pytest.raises(ValueError, match="double is of quantize: nf4"):
        ModelSource(path="x/y", double=True)


def test_a_folder_of_codes_is_not_quantised_again_and_other_forms_are_named(folders, tmp_path):
    lm = coded(folders, "llama")
    mark(lm.model)
    save(lm.model, AutoTokenizer.from_pretrained(folders["llama"]), tmp_path)
    with pytest.raises(ModelError, match=r"is quantised already \(bitsandbytes\); remove `quantize`"):
        load(ModelSource(path=str(tmp_path), quantize="nf4"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is quantised by gptq in a form that posttrain does not read"):
        load(str(tmp_path))


@pytest.mark.parametrize(("one", "other"), list(product([None, "nf4"], repeat=2)))
def test_codes_are_other_weights_than_those_that_they_were_made_of(one, other):
    sources = [ModelSource(path=str(base()), quantize=each) for each in (one, other)]
    assert sources[0].same_weights(sources[1]) == (one == other)
