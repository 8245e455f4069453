"""Differences from a base in one bit a weight: their arithmetic, models that hold several, files, and the stage that makes them."""

import copy
import hashlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import fine, make, transformer
from tiny_runs import DATA, RAW, base, inline, settings
from tiny_runs import fine as tuned_base
from torch.nn.functional import linear
from transformers import AutoTokenizer, LlamaConfig, MistralConfig
from transformers.pytorch_utils import Conv1D
from tuned_models import ARCHITECTURES, move

from posttrain import losses
from posttrain.batch import Sequences, Taught
from posttrain.compress.delta import distances, remaining, sizes, sizes_of
from posttrain.errors import ModelError, RecipeError
from posttrain.models import delta, delta_file
from posttrain.models.delta import Delta, LowRank, Signs, packed, unpacked
from posttrain.models.linears import below_head
from posttrain.models.load import wrap
from posttrain.models.roles import Frozen, Roles
from posttrain.models.source import ModelSource
from posttrain.objectives import MatchLogits
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import run
from posttrain.tuners import DeltaScale, tuned
from posttrain.tuners.folder import load_adapter, save_adapter
from posttrain.tuners.load import load, load_tokenizer

F64 = torch.float64
SEQS = Sequences.of(
    [
        ([5, 9, 40, 3, 3, 71, 8, 2, 66, 12, 31], [False] * 4 + [True] * 7),
        ([5, 9, 40, 3, 3, 14, 90], [False] * 5 + [True] * 2),
        ([61, 22, 7], [False, False, True]),
    ]
)
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def said(lm, seqs=SEQS):
    with torch.no_grad():
        return lm.logprobs(seqs)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def loaded(name, seed=5, by=0.02, dtype="float32"):
    """The model of `fine`."""
    lm = make(name, dtype)
    lm.model.load_state_dict(type(lm.model).from_pretrained(fine(name, seed, by)).state_dict())
    return lm


# ---- one matrix


def test_the_worked_example():
    difference = torch.tensor([[0.1, -0.3], [0.2, 0.0]], dtype=F64)
    part = Signs.of(difference)
    assert float(part.scale) == pytest.approx(0.15)
    assert unpacked(part.signs, 2, F64).tolist() == [[1, -1], [1, 1]], "the sign of 0 is 1"
    assert float((difference - part.dense()).square().sum()) == pytest.approx(0.05)


@pytest.mark.parametrize("inputs", [1, 7, 31, 32, 33, 64, 100])
def test_unpacking_is_the_inverse_of_packing_for_every_width(inputs):
    signs = torch.where(random(5, inputs) >= 0, 1.0, -1.0)
    words = packed(signs)
    assert words.shape == (5, math.ceil(inputs / 32))
    assert words.dtype == torch.int32
    for dtype in (torch.float32, torch.bfloat16, F64):
        assert torch.equal(unpacked(words, inputs, dtype), signs.to(dtype))


def test_bit_k_of_word_w_is_that_of_input_32_w_plus_k():
    signs = -torch.ones(1, 70)
    signs[0, [0, 5, 31, 32, 69]] = 1
    first = (1 << 0) + (1 << 5) + (1 << 31)
    assert packed(signs).tolist() == [[first - (1 << 32), 1, 1 << 5]]


def test_the_mean_of_the_absolute_difference_is_the_best_scale_and_what_remains_is_known():
    difference = random(40, 50)
    part = Signs.of(difference)
    signs = unpacked(part.signs, 50, F64)

    def error(scale):
        return float((difference - scale * signs).square().sum())

    best = float(part.scale)
    assert best == pytest.approx(float(difference.abs().mean()), rel=1e-12)
    assert error(best) < min(error(best + 1e-4), error(best - 1e-4))
    assert error(best) == pytest.approx(float(difference.square().sum()) - 2000 * best**2, rel=1e-12)


@pytest.mark.parametrize(("drawn", "share"), [("normal", 1 - 2 / math.pi), ("laplace", 0.5), ("uniform", 0.25)])
def test_what_remains_of_normal_laplace_and_uniform_differences(drawn, share):
    draw = torch.Generator().manual_seed(3)
    uniform = torch.rand(700, 800, generator=draw, dtype=F64) - 0.5
    difference = {
        "normal": torch.randn(700, 800, generator=draw, dtype=F64), "uniform": uniform,
        "laplace": -uniform.sign() * (1 - 2 * uniform.abs()).log(),
    }[drawn]  # fmt: skip
    left = (difference - Signs.of(difference).dense()).square().sum() / difference.square().sum()
    assert float(left) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("inputs", [32, 45])
def test_the_gradients_are_those_of_the_dense_matrix_whatever_is_unpacked_at_a_time(inputs, monkeypatch):
    part = Signs.of(random(9, inputs))
    part.scale.requires_grad_(True)
    states, back = random(2, 3, inputs, seed=1).requires_grad_(True), random(2, 3, 9, seed=2)
    scale, twin = part.scale.detach().clone().requires_grad_(True), states.detach().clone().requires_grad_(True)
    wanted = linear(twin, scale * unpacked(part.signs, inputs, F64))
    wanted.backward(back)
    for at_a_time in (1, 4 * inputs, 1 << 20):
        monkeypatch.setitem(delta.AT_A_TIME, "cpu", at_a_time)
        part.scale.grad = states.grad = None
        found = part(states)
        found.backward(back)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.scale.grad, scale.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(states.grad, twin.grad, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x, s: delta._Signed.apply(x, part.signs, s), (states.flatten(0, 1), part.scale))


def test_no_dense_matrix_waits_for_the_backward():
    part, kept = Signs.of(random(64, 96).float()), []
    part.scale.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        part(torch.randn(3, 96))
    assert {tuple(each.shape) for each in kept} == {(3, 96), (64, 3), ()}, "the input, the packed signs, the scale"


def test_a_low_rank_delta_is_the_truncated_decomposition_at_as_many_bits():
    difference = random(60, 48, seed=4).float()
    left, values, right = torch.linalg.svd(difference)
    part = LowRank.of(difference, 5)
    wanted = left[:, :5] @ values[:5].diag() @ right[:5]
    torch.testing.assert_close(part.dense(), wanted, rtol=2e-3, atol=2e-3)
    states = torch.randn(7, 48)
    torch.testing.assert_close(part(states), linear(states, part.dense()), rtol=1e-4, atol=1e-4)
    wide = LowRank.of(torch.zeros(640, 1280))
    assert wide.up.shape == (640, 640 * 1280 // (16 * (640 + 1280)))
    assert 16 * (wide.up.numel() + wide.down.numel()) <= 640 * 1280
    assert not bool(wide.dense().any())
    assert LowRank.of(torch.zeros(8, 8)).up.shape == (8, 1), "at least 1"


def test_what_is_kept_whole_is_float16_and_bfloat16_only_where_that_overflows():
    assert delta.in_16_bits(torch.tensor([1.001, -65504.0])).dtype == torch.float16
    assert delta.in_16_bits(torch.tensor([70000.0])).dtype == torch.bfloat16
    assert delta.in_16_bits(torch.empty(0)).dtype == torch.float16


# ---- in a model


def dense_twin(name, found):
    """The model with the difference in its weights, written out."""
    model = transformer(name)
    with torch.no_grad():
        for path, part in found.parts.items():
            layer = model.get_submodule(path)
            layer.weight += part.dense().t() if isinstance(layer, Conv1D) else part.dense()
        for key, value in found.whole.items():
            model.get_parameter(key).copy_(value)
    return wrap(model, ModelSource(path="tiny"))


@pytest.mark.parametrize(("name", "form"), [*((name, Signs.of) for name in ARCHITECTURES), ("llama", LowRank.of)])
def test_several_deltas_on_one_base_are_so_many_models_and_none_of_them_is_the_base(name, form):
    lm = make(name)
    plain, marks = said(lm), digest(lm.model)
    alone = {}
    for seed in (5, 6):
        found = Delta.between(lm.model, loaded(name, seed).model, form)
        delta.add(lm.model, found, str(seed))
        alone[str(seed)] = said(dense_twin(name, found))
        single = make(name)
        delta.add(single.model, copy.deepcopy(found), "only")
        delta.switch(single.model, "only")
        alone[f"{seed} exactly"] = said(single)
    assert torch.equal(said(lm), plain), "none is active yet"
    for each in ("5", "6", None, "6", "5", None):
        delta.switch(lm.model, each)
        if each is None:
            assert torch.equal(said(lm), plain)
            assert digest(lm.model) == marks, "the base's bytes"
        else:
            assert torch.equal(said(lm), alone[f"{each} exactly"])
            torch.testing.assert_close(said(lm), alone[each], rtol=0, atol=2e-5)
    assert (alone["5"] - alone["6"]).abs().max() > 1e-3
    with delta.switched(lm.model, "6"):
        assert torch.equal(said(lm), alone["6 exactly"])
    assert torch.equal(said(lm), plain)


def digest(model):
    return {key: hashlib.sha256(each.detach().contiguous().numpy().tobytes()).hexdigest() for key, each in model.named_parameters()}


@architectures
def test_a_model_that_was_not_tuned_has_scales_of_zero_and_the_same_logits(name):
    lm = make(name)
    plain, found = said(lm), Delta.between(lm.model, transformer(name))
    assert all(float(part.scale) == 0 for part in found.parts.values())
    assert not found.whole
    delta.add(lm.model, found, "same")
    delta.switch(lm.model, "same")
    assert torch.equal(said(lm), plain)
    assert set(remaining(lm.model, transformer(name), found).values()) == {None}


@architectures
def test_matrices_are_those_of_the_blocks_and_everything_else_is_whole(name):
    lm = make(name)
    found = Delta.between(lm.model, loaded(name).model)
    count = 4 if name == "gpt2" else 7
    assert len(found.parts) == 2 * count
    rest = {key: each for key, each in lm.model.named_parameters() if key.removesuffix(".weight") not in found.parts}
    assert set(found.whole) == set(rest), "embeddings, norms, biases; a tied head once"
    assert ("lm_head.weight" in found.whole) == (name == "qwen3")
    assert {each.dtype for each in found.whole.values()} == {torch.float16}


@architectures
def test_a_delta_brings_the_base_nearer_to_the_fine_tuned_model(name):
    lm, tuned_one = make(name), loaded(name, by=0.005)
    delta.add(lm.model, Delta.between(lm.model, tuned_one.model), "it")
    found = distances(lm, tuned_one, [None, "it"], SEQS, micro_tokens=12)
    assert found["it"].kl.value < 0.8 * found[None].kl.value
    assert found["it"].logit_gap.value < 0.8 * found[None].logit_gap.value


def test_distances_are_kl_and_mean_squared_difference_written_out():
    lm, tuned_one = make("gpt2", "float64"), loaded("gpt2", dtype="float64")
    delta.add(lm.model, Delta.between(lm.model, tuned_one.model), "it")
    found = distances(lm, tuned_one, ["it", None], SEQS, micro_tokens=12)
    for name in ("it", None):
        with delta.switched(lm.model, name):
            kl = gap = 0.0
            for tokens, train in zip(SEQS.rows(), SEQS.train.split(SEQS.lengths.tolist()), strict=True):
                with torch.no_grad():
                    ours, theirs = (each.model(torch.tensor([tokens])).logits[0] for each in (lm, tuned_one))
                for place in (train.nonzero()[:, 0] - 1).tolist():
                    p, q = theirs[place].softmax(0), ours[place].softmax(0)
                    kl += float((p * (p / q).log()).sum())
                    gap += float((theirs[place] - ours[place]).square().mean())
        assert found[name].kl.value == pytest.approx(kl / SEQS.trained, rel=1e-9)
        assert found[name].logit_gap.value == pytest.approx(gap / SEQS.trained, rel=1e-9)
        assert found[name].kl.count == 3


def test_a_copied_model_switches_by_itself():
    lm = make("llama")
    plain = said(lm)
    delta.add(lm.model, Delta.between(lm.model, loaded("llama").model), "it")
    delta.switch(lm.model, "it")
    other, wanted = copy.deepcopy(lm), said(lm)
    delta.switch(other.model, None)
    assert torch.equal(said(other), plain)
    assert torch.equal(said(lm), wanted)
    delta.switch(other.model, "it")
    assert torch.equal(said(other), wanted)


def test_other_architectures_sizes_and_names_are_refused():
    lm = make("llama")
    with pytest.raises(ModelError, match=r"the fine-tuned model has .*, which the base lacks: it was made from another base"):
        Delta.between(lm.model, transformer("qwen3"))
    with pytest.raises(ModelError, match=r"embed_tokens.weight is \(98, 32\) in the fine-tuned model and \(97, 32\) in the base"):
        Delta.between(lm.model, transformer("llama", vocab_size=98))
    found = Delta.between(lm.model, loaded("llama").model)
    delta.add(lm.model, found, "one")
    with pytest.raises(ModelError, match="has a delta 'one' already"):
        delta.add(lm.model, found, "one")
    with pytest.raises(ModelError, match="no delta 'two'; it has one"):
        delta.switch(lm.model, "two")


# ---- the tuner


def test_going_on_moves_the_scales_of_the_delta_below_and_stores_nothing_else(tmp_path):
    transformer("llama").save_pretrained(tmp_path / "base")
    base_of = ModelSource(path=str(tmp_path / "base"))
    lm, tuner = make("llama"), DeltaScale(of=ModelSource(path=str(fine("llama"))))
    tuner.install(lm.model)
    save_adapter(tuner, lm.model, tmp_path / "one", base_of)
    again = make("llama")
    load_adapter(again.model, tmp_path / "one", base_of)
    assert torch.equal(said(again), said(lm))
    more = DeltaScale()
    more.install(again.model)
    assert set(tuned(again.model)) == set(more.state(again.model)) == {f"{path}.delta.scale" for path in below_head(lm.model)}
    move(again)
    save_adapter(more, again.model, tmp_path / "two", ModelSource(path=str(tmp_path / "one")))
    third = make("llama")
    load_adapter(third.model, tmp_path / "one", base_of)
    load_adapter(third.model, tmp_path / "two", ModelSource(path=str(tmp_path / "one")))
    assert torch.equal(said(third), said(again))
    assert not torch.equal(said(third), said(lm))
    assert (tmp_path / "two" / "adapter_model.safetensors").stat().st_size < (tmp_path / "one" / "adapter_model.safetensors").stat().st_size / 4


def test_what_has_no_delta_or_has_one_already_is_refused():
    with pytest.raises(RecipeError, match="no delta whose scales could move; name a fine-tuned model"):
        DeltaScale().install(make("llama").model)
    lm, tuner = make("llama"), DeltaScale(of=ModelSource(path=str(fine("llama"))))
    tuner.install(lm.model)
    with pytest.raises(RecipeError, match="has a delta in it, and a delta is a difference of weights; leave out `of`"):
        tuner.install(lm.model)
    with pytest.raises(ModelError, match=r"^/.*: is a llama model and not of the base's architecture, gpt2"):
        tuner.install(make("gpt2").model)
    with pytest.raises(ValueError, match="rank is of form: low_rank"):
        DeltaScale(rank=3)


# ---- the objective


def test_matching_logits_is_its_formula_over_tokens_and_vocabulary():
    lm, teacher = make("gemma3", "float64"), loaded("gemma3", dtype="float64")
    batch = MatchLogits().annotate(Taught(SEQS), lm, Roles(teacher=Frozen(teacher)))
    total = float(MatchLogits().loss(lm, batch).terms["logits"].detach())
    wanted = 0.0
    for tokens, train in zip(SEQS.rows(), SEQS.train.split(SEQS.lengths.tolist()), strict=True):
        with torch.no_grad():
            ours, theirs = (each.model(torch.tensor([tokens])).logits[0].double() for each in (lm, teacher))
        wanted += sum(float((theirs[at] - ours[at]).square().mean()) for at in (train.nonzero()[:, 0] - 1).tolist())
    assert total == pytest.approx(wanted, rel=1e-6)
    assert MatchLogits().units(batch) == {"logits": 10}


def test_logits_of_the_whole_vocabulary_exist_a_few_rows_at_a_time(monkeypatch):
    lm, seen = make("llama"), []
    monkeypatch.setattr("posttrain.models.head.rows_at_a_time", lambda *_: 3)
    batch = MatchLogits().annotate(Taught(SEQS), lm, Roles(teacher=Frozen(loaded("llama"))))
    monkeypatch.setattr(losses, "logit_gap", lambda one, other: seen.append(len(one)) or (one - other).square().mean(-1))
    MatchLogits().loss(lm, batch).terms["logits"].backward()
    assert max(seen) == 3
    assert len(seen) == 8, "each chunk once, and once again in the backward"


def test_padded_tables_of_different_sizes_are_compared_where_both_have_tokens():
    lm, teacher = make("llama"), make("llama", vocab_size=112)
    batch = MatchLogits().annotate(Taught(SEQS), lm, Roles(teacher=Frozen(teacher)))
    assert math.isfinite(float(MatchLogits().loss(lm, batch).terms["logits"].detach()))


def test_a_teacher_is_asked_for_and_refused_where_nothing_is_learned_from_it():
    with pytest.raises(RecipeError, match="learns from another model: add `teacher`"):
        Recipe.parse(json.dumps(settings("sft", objective={"kind": "match_logits"})))
    with pytest.raises(RecipeError, match="learns from no other model; remove the section `teacher`"):
        Recipe.parse(json.dumps(settings("sft", teacher=str(base()))))


@pytest.mark.parametrize("data", [DATA, RAW])
def test_a_model_learns_back_what_its_teacher_says_of_answers_and_of_text(data, tmp_path):
    stage = settings("sft", model=str(tuned_base()), objective="match_logits", teacher=str(base()), data=data, optim={"learning_rate": 1e-3})
    folder = run(Recipe.parse(json.dumps(stage), name="tiny"), tmp_path).folders["train"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/logits"] < 0.5 * lines[0]["loss/logits"]


# ---- sizes


@pytest.mark.parametrize(
    ("config", "whole", "stored", "ratio"),
    [
        (LlamaConfig(intermediate_size=11008), 13.477e9, 1.334e9, 10.10),
        (LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40), 26.03e9, 2.242e9, 11.61),
        (
            LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
            137.95e9, 9.608e9, 14.36,
        ),
        (MistralConfig(), 14.48e9, 1.397e9, 10.37),
    ],
    ids=["Llama-2-7B", "13B", "70B", "Mistral-7B"],
)  # fmt: skip
def test_the_sizes_of_known_models(config, whole, stored, ratio):
    found = sizes_of(config)
    assert found.whole == pytest.approx(whole, rel=5e-4)
    assert found.whole_delta == pytest.approx(stored, rel=5e-4)
    assert found.ratio == pytest.approx(ratio, abs=0.005)
    assert 15.99 < found.matrices_ratio < 16


@architectures
def test_the_sizes_of_a_stored_delta_are_those_of_its_tensors(name, tmp_path):
    lm = make(name)
    found = Delta.between(lm.model, loaded(name).model)
    counted = sizes(lm.model, found)
    assert counted == sizes_of(lm.model.config), "everything differs, so the closed form is the delta's size"
    save_file({key: each.contiguous() for key, each in found.tensors().items()}, tmp_path / "it")
    header = 8 + int.from_bytes((tmp_path / "it").read_bytes()[:8], "little")
    assert (tmp_path / "it").stat().st_size == header + counted.whole_delta
    assert counted.whole == 2 * sum(each.numel() for each in lm.model.parameters())


# ---- files


@pytest.fixture
def stored(tmp_path):
    """(a base's source, a delta's file)"""
    transformer("llama").save_pretrained(tmp_path / "base")
    source = ModelSource(path=str(tmp_path / "base"))
    lm, tuner = make("llama"), DeltaScale(of=ModelSource(path=str(fine("llama"))))
    tuner.install(lm.model)
    save_adapter(tuner, lm.model, tmp_path / "folder", source)
    (tmp_path / "a.bitdelta").write_bytes((tmp_path / "folder" / "adapter_model.safetensors").read_bytes())
    return source, tmp_path / "a.bitdelta", said(lm)


def test_a_file_alone_gives_its_base_the_same_model(stored):
    source, file, wanted = stored
    lm = make("llama")
    delta_file.add_file(lm.model, file, "a", source)
    delta_file.add_file(lm.model, file.parent / "folder", "b", source)
    for name in ("a", "b"):
        with delta.switched(lm.model, name):
            assert torch.equal(said(lm), wanted)
    about, _ = delta_file.read(file)
    assert about["form"] == "signs"
    assert about["base"] == source.path
    assert about["weights"] == source.weights()
    assert about["shapes"]["model.layers.0.mlp.down_proj"] == [32, 48]


def test_a_file_that_is_not_whole_of_another_base_or_no_delta_is_refused(stored, tmp_path):
    source, file, _ = stored

    def refusal(path, model="llama", of=source):
        lm = make(model)
        before = said(lm)
        with pytest.raises(ModelError) as caught:
            delta_file.add_file(lm.model, path, "a", of)
        assert torch.equal(said(lm), before)
        assert not delta.held(lm.model).deltas
        return str(caught.value)

    whole = file.read_bytes()
    for end in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:end])
        assert "the file is not whole, or no delta" in refusal(tmp_path / "cut")
    (tmp_path / "noise").write_bytes(bytes(range(256)) * 40)
    assert "no delta" in refusal(tmp_path / "noise")
    save_file({"x": torch.ones(3)}, tmp_path / "foreign")
    assert "is no delta: its header does not say of what" in refusal(tmp_path / "foreign")
    assert "no such file; make one with `posttrain delta FINE BASE`" in refusal(tmp_path / "missing.bitdelta")
    about, tensors = delta_file.read(file)
    save_file(tensors, tmp_path / "newer", metadata={delta_file.KEY: json.dumps(about | {"format": 99})})
    assert "is of format 99" in refusal(tmp_path / "newer")
    transformer("llama", seed=9).save_pretrained(tmp_path / "other")
    assert "made on another model" in refusal(file, of=ModelSource(path=str(tmp_path / "other")))
    for change, message in (
        ({"model.layers.0.mlp.up_proj.delta.signs": None}, "which is no known form"),
        ({"model.layers.0.mlp.up_proj.delta.scale": None}, "holds signs of it, which is no known form"),
        (dict.fromkeys(f"model.layers.0.mlp.up_proj.delta.{part}" for part in ("scale", "signs")), "lacks model.layers.0.mlp.up_proj"),
        ({"model.layers.0.mlp.up_proj.delta.signs": torch.zeros(48, 2, dtype=torch.int32)}, "of another shape in the delta"),
        ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight is (3,) in the delta and (32,) in the base"),
        ({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}, "which this base has no place for"),
    ):
        changed = {key: each for key, each in (tensors | change).items() if each is not None}
        save_file(changed, tmp_path / "changed", metadata={delta_file.KEY: json.dumps(about)})
        assert message in refusal(tmp_path / "changed")
    narrow = {**about["shapes"], "model.layers.0.mlp.down_proj": [32, 40]}
    save_file(tensors, tmp_path / "narrow", metadata={delta_file.KEY: json.dumps(about | {"shapes": narrow})})
    assert "is 32 x 48 in" in refusal(tmp_path / "narrow")


# ---- the stage


def stage(tmp_path, **changes):
    found = {"kind": "delta", "model": str(tuned_base()), "base": str(base()), **changes}
    return Recipe.parse(json.dumps({"stages": {"delta": found}}), name="tiny")


def test_the_stage_distils_measures_and_leaves_a_folder_that_loads(tmp_path):
    recipe = stage(tmp_path, data=RAW, steps=12, optim={"learning_rate": 1e-3}, measure=inline({"text": "3 + 2 = 5 and"}, {"text": "cat 7"}))
    result = run(recipe, tmp_path)
    record = result.stages["delta"]
    metrics = {name: each["value"] for name, each in record["metrics"].items()}
    assert metrics["logit_gap"] < metrics["logit_gap_start"] < metrics["logit_gap_base"]
    assert 0 < metrics["fine_kl"] < metrics["fine_kl_base"]
    assert record["parameters"] == 14
    assert record["sizes"]["matrices_ratio"] == pytest.approx(14.6, abs=0.01), "of inputs of 32 and 48: half a word is empty"
    assert record["sizes"]["file_bytes"] > record["sizes"]["delta_bytes"]
    assert record["remaining"]["mean"] == pytest.approx(1 - 2 / math.pi, abs=0.03), "it was moved by normal draws"
    folder = result.model("delta")
    assert not (folder / "config.json").exists()
    lm, tuned_one = load(folder).lm, load(tuned_base()).lm
    tokens = Sequences.of([([5, 9, 17, 300, 42], [False, True, True, True, True])])
    gaps = [(said(each, tokens) - said(tuned_one, tokens)).abs().mean() for each in (lm, load(base()).lm)]
    assert gaps[0] < gaps[1]
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())
    assert summary["stages"]["delta"]["metrics"]["fine_kl"] == record["metrics"]["fine_kl"]


def test_a_delta_speaks_with_the_template_of_its_fine_tuned_model(tmp_path, monkeypatch):
    """Conversations are rendered with it, which the base could not, and it is in the stage's folder and in the file alone."""
    theirs = load(base()).tokenizer.chat_template.replace("message['role'] + '|>'", "message['role'] + '|> '")
    for name, place, template in (("fine", tuned_base(), theirs), ("base", base(), None)):
        shutil.copytree(place, tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        tokenizer.chat_template, tokenizer.eos_token = template, "<|end_of_turn|>" if name == "fine" else "<|end_of_text|>"
        (tmp_path / name / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(tmp_path / name)
    chat = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    talk = inline({"messages": chat}, {"messages": chat})
    for note, changes in {"distilled": {"data": talk, "steps": 2}, "as it begins": {"measure": talk}}.items():
        recipe = stage(tmp_path, model=str(tmp_path / "fine"), base=str(tmp_path / "base"), **changes)
        folder = run(recipe, tmp_path / note).model("delta")
        assert load(folder).tokenizer.chat_template == theirs
        delta_file.write_alone(folder, load_tokenizer(ModelSource(path=str(folder))), tmp_path / note / "alone")
        below = load(tmp_path / "base").tokenizer
        for place in (folder, tmp_path / note / "alone"):
            tokenizer = delta_file.tokenizer_with(place, below)
            assert (tokenizer.chat_template, tokenizer.eos_token) == (theirs, "<|end_of_turn|>")
        assert (below.chat_template, below.eos_token) == (None, "<|end_of_text|>"), "the base's own is not touched"
    kept = tmp_path / "kept.jinja"
    kept.write_text(theirs.replace("'|> '", "'|>'"))
    named = stage(tmp_path, model=str(tmp_path / "fine"), base={"path": str(tmp_path / "base"), "chat_template": str(kept)}, measure=DATA)
    assert load(run(named, tmp_path / "named").model("delta")).tokenizer.chat_template == kept.read_text(), "one that is named is taken"


def test_the_stage_without_data_keeps_the_scales_that_it_begins_with(tmp_path):
    for form in ("signs", "low_rank"):
        result = run(stage(tmp_path, form=form, measure=RAW), tmp_path / form)
        metrics = {name: each["value"] for name, each in result.stages["delta"]["metrics"].items()}
        assert set(metrics) == {"fine_kl", "logit_gap", "fine_kl_base", "logit_gap_base"}
        assert metrics["fine_kl"] < metrics["fine_kl_base"]
    bare = run(stage(tmp_path), tmp_path / "bare").stages["delta"]
    assert bare["metrics"] == {}
    assert bare["sizes"] | {"file_bytes": 0} == stage_sizes()


def stage_sizes():
    """Written out: 26,000 weights of which everything differs."""
    model = load(tuned_base()).lm.model
    return sizes_of(model.config).as_dict() | {"file_bytes": 0}


def test_settings_of_a_distillation_that_is_not_asked_for_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="steps is of the distillation, which needs `data`"):
        stage(tmp_path, steps=3)
    with pytest.raises(RecipeError, match="rank is of form: low_rank"):
        stage(tmp_path, rank=3)
