"""The stages `prune` and `quantize` and their commands: what they write loads everywhere, and what they say is so."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_runs import base, inline
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from typer.testing import CliRunner

import posttrain
from posttrain.batch import Sequences
from posttrain.cli.app import app
from posttrain.compress.blocks import blocks_of
from posttrain.compress.distance import distance
from posttrain.compress.rounding import nearest
from posttrain.errors import ModelError, RecipeError
from posttrain.models.integers import Whole
from posttrain.models.linears import matrix_of
from posttrain.models.load import load as load_plain
from posttrain.models.quantized import quantized
from posttrain.models.source import ModelSource
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import run
from posttrain.tuners.load import load

TEXTS = inline(*({"text": f"Sam has {n} shells and buys {n + 3} more. He counts to {2 * n + 3}, all day long."} for n in range(1, 9)))
HELD_OUT = inline({"text": "What is 3 + 4? It is 7. A cat who could count."}, {"text": "He has 24 shells and 6 more."})
SEQS = Sequences.of([([5, 9, 17, 300, 42, 7, 8], [False] * 3 + [True] * 4), ([250, 11, 12, 13], [False, False, True, True])])
IDS = torch.tensor([[5, 9, 17, 300, 42, 7, 8, 33]])
SFT = {"objective": "sft", "data": inline({"prompt": "What is 3 + 4?", "completion": "It is 7."}), "steps": 3, "batch": {"rows": 1}}


def made(tmp_path, **stages):
    """The folders of a recipe's stages, and their records."""
    stages = {name: {"model": str(base()), **stage} for name, stage in stages.items()}
    result = run(Recipe.parse(json.dumps({"stages": stages}), name="tiny"), tmp_path)
    return result.folders, {name: json.loads((folder / "done.json").read_text()) for name, folder in result.folders.items()}


def refused(**stage):
    with pytest.raises(RecipeError) as error:
        Recipe.parse(json.dumps({"stages": {"small": {"model": str(base()), **stage}}}), name="tiny").check()
    return str(error.value)


def logits(folder, **options):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, **options)(IDS).logits


def ours(folder):
    with torch.no_grad():
        return load(folder).lm.model(IDS).logits


# ---- distances


def test_distances_are_those_of_all_logits():
    one, other = load(base()).lm, load(base()).lm
    with torch.no_grad():
        other.model.model.layers[0].mlp.up_proj.weight.mul_(5)
        found = distance(one, other, SEQS)
        kl, mse, nll, count = 0.0, 0.0, 0.0, 0
        for tokens, train in zip(SEQS.rows(), SEQS.train.split(SEQS.lengths.tolist()), strict=True):
            before, after = (lm.model(torch.tensor([tokens])).logits[0].double() for lm in (one, other))
            p, q = before.log_softmax(-1), after.log_softmax(-1)
            for place in train.nonzero()[:, 0].tolist():
                kl += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
                mse += float((before[place - 1] - after[place - 1]).square().mean())
                nll -= float(q[place - 1, tokens[place]])
                count += 1
    assert found["kl"].value == pytest.approx(kl / count, rel=1e-4)
    assert found["logit_gap"].value == pytest.approx(mse / count, rel=1e-4)
    assert found["nll"].value == pytest.approx(nll / count, rel=1e-5)
    assert found["kl"].value > 1e-6
    same = distance(one, one, SEQS)
    assert same["kl"].value == same["logit_gap"].value == 0.0
    assert same["nll"] == same["nll_before"]


# ---- prune


def test_a_pruned_model_is_an_ordinary_folder_with_the_figures_that_it_has(tmp_path):
    folders, records = made(tmp_path, small={"kind": "prune", "method": "sparsegpt", "pattern": "2:4", "data": TEXTS, "measure": HELD_OUT})
    record, model = records["small"], AutoModelForCausalLM.from_pretrained(folders["small"] / "model")
    matrices = {path: matrix_of(layer) for block in blocks_of(model) for path, layer in block.layers.items()}
    assert all(((each != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all() for each in matrices.values())
    zeros = {path: int((each == 0).sum()) for path, each in matrices.items()}
    assert {path: each["zeros"] for path, each in record["matrices"].items()} == zeros
    weights = sum(each.numel() for each in matrices.values())
    assert record["sparsity"] == pytest.approx(sum(zeros.values()) / weights)
    sizes = record["bytes"]
    assert sizes["matrices_after"] / sizes["matrices_before"] == 9 / 16
    assert sizes["before"] == 2 * sum(each.numel() for each in model.parameters())
    assert sizes["before"] - sizes["after"] == sizes["matrices_before"] - sizes["matrices_after"]
    lm, before = load(folders["small"] / "model").lm, load(base()).lm
    torch.testing.assert_close(ours(folders["small"] / "model"), logits(folders["small"] / "model"))
    assert record["metrics"]["kl"]["value"] > 0
    assert record["metrics"]["nll"]["count"] == 2
    with torch.no_grad():
        assert (lm.logprobs(SEQS) - before.logprobs(SEQS)).abs().max() > 1e-4


def test_what_was_pruned_stays_out_when_an_ordinary_stage_goes_on_from_it(tmp_path):
    train = {"model": {"stage": "small"}, "tuner": {"kind": "full", "keep_zeros": True}, **SFT}
    train["optim"] = {"learning_rate": 0.02, "weight_decay": 0.1}
    folders, _ = made(tmp_path, small={"kind": "prune", "method": "magnitude", "sparsity": 0.6}, recovered=train)
    before, after = (load(folders[name] / "model").lm.model for name in ("small", "recovered"))
    pairs = zip(blocks_of(before), blocks_of(after), strict=True)
    for one, other in pairs:
        for path in one.layers:
            zeros = matrix_of(one.layers[path]) == 0
            assert 0.55 < zeros.float().mean() < 0.61
            assert torch.equal(matrix_of(other.layers[path]) == 0, zeros), path


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"kind": "prune"}, "method wanda looks at what layers are given: give it `data`"),
        ({"kind": "prune", "method": "magnitude", "data": TEXTS}, "rows to measure on are `measure`"),
        ({"kind": "prune", "method": "magnitude", "pattern": "4:2"}, "leaves nothing out"),
        ({"kind": "prune", "method": "magnitude", "pattern": "2:4", "sparsity": 0.3}, "leaves out 50%; remove `sparsity`"),
        ({"kind": "prune", "method": {"kind": "magnitude", "within": "row"}, "pattern": "2:4"}, "remove `within`"),
        ({"kind": "prune", "method": "wnada"}, "unknown pruner 'wnada'; did you mean 'wanda'?"),
        ({"kind": "prune", "method": "wanda", "data": inline({"prompt": "a", "chosen": "b", "rejected": "c"})}, "reads text"),
        ({"kind": "quantize", "method": "gptq"}, "method gptq looks at what layers are given"),
        ({"kind": "quantize", "bits": 5}, "bits"),
        ({"kind": "quantize", "method": "nf4", "bits": 4}, "method nf4 has a grid of its own: remove bits"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_a_weight_is_read(stage, message):
    assert message in refused(**stage)


def test_a_group_that_does_not_fit_is_refused_with_one_that_does(tmp_path):
    with pytest.raises(RecipeError, match=r"group: 32: the 48 inputs of .*down_proj cannot be .* take a divisor of 16"):
        made(tmp_path, small={"kind": "quantize", "group": 32})


# ---- quantize


CASES = {
    "rtn-4": {"method": "rtn", "group": 16}, "gptq-3": {"method": "gptq", "bits": 3, "group": 16, "data": TEXTS},
    "awq-8": {"method": "awq", "bits": 8, "group": "channel", "data": TEXTS}, "rtn-4-zero": {"group": 16, "symmetric": False},
    "part": {"group": 16, "targets": ["*.mlp.*"]}, "nf4": {"method": "nf4"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_folder_gives_the_same_logits_in_posttrain_and_in_transformers(name, tmp_path):
    case = CASES[name]
    folders, records = made(tmp_path, small={"kind": "quantize", "measure": HELD_OUT, **case})
    folder, record = folders["small"] / "model", records["small"]
    options = {}
    if case.get("symmetric") is False:  # as it stands transformers gives zeros no place but while it makes weights dense
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    torch.testing.assert_close(ours(folder), logits(folder, **options), atol=1e-5, rtol=0)
    assert (ours(folder) - ours(base())).abs().max() > 1e-5
    found = quantized(load(folder).lm.model)
    assert len(found) == (6 if name == "part" else 14)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    of_layers = sum(each.nbytes for key, each in stored.items() if any(key.startswith(f"{path}.") for path in found))
    assert record["bytes"]["matrices_after"] == of_layers
    weights = sum(layer.in_features * layer.out_features for layer in found.values())
    assert record["bits"] == pytest.approx(8 * of_layers / weights)
    assert record["metrics"]["kl"]["value"] > 0
    seqs = Sequences.of([([*IDS[0].tolist()], [False] + [True] * 7)])
    posttrain.export(folder, tmp_path / "dense", dequantize=True)
    assert not quantized(load(tmp_path / "dense").lm.model)
    torch.testing.assert_close(logits(tmp_path / "dense"), ours(folder), atol=1e-5, rtol=0)
    with torch.no_grad():
        logp = logits(folder, **options)[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]
        torch.testing.assert_close(load(folder).lm.logprobs(seqs), logp, atol=1e-5, rtol=0)


def test_lora_learns_on_integers_which_stay_as_they_are_and_full_is_refused(tmp_path):
    small = {"kind": "quantize", "group": 16}
    lora = {"model": {"stage": "small"}, "tuner": {"kind": "lora", "rank": 2}, "optim": {"learning_rate": 0.02}, **SFT}
    folders, _ = made(tmp_path, small=small, tuned=lora)
    before, after = load(folders["small"] / "model").lm, load(folders["tuned"] / "model").lm
    with torch.no_grad():
        assert (before.logprobs(SEQS) - after.logprobs(SEQS)).abs().max() > 1e-3
    with pytest.raises(ModelError, match=r"quantised to codes.*which gives the model that was trained$"):
        posttrain.merge(folders["tuned"] / "model", tmp_path / "merged")
    posttrain.merge(folders["tuned"] / "model", tmp_path / "merged", dequantize=True)
    torch.testing.assert_close(logits(tmp_path / "merged"), ours(folders["tuned"] / "model"), atol=2e-5, rtol=0)
    codes = [{path: layer.stored()["weight_packed"] for path, layer in quantized(each.model).items()} for each in (before, after)]
    assert all(torch.equal(one, codes[1].get(path, codes[1].get(f"{path}.base_layer")))
               for path, one in codes[0].items())  # fmt: skip
    with pytest.raises(RecipeError, match="quantised"):
        Recipe.parse(json.dumps({"stages": {"t": {"model": str(folders["small"] / "model"), "tuner": "full", **SFT}}}), name="t").check()
    assert "quantised already" in refused(kind="quantize", group=16, model=str(folders["small"] / "model"))


def test_a_gradient_flows_through_integers_as_through_their_values():
    draw = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(size, 20, dtype=torch.float64, generator=draw) for size in (6, 3))
    rows.requires_grad_()
    codes = nearest(weight, 3, 8, False)
    layer = Whole.of(codes, None)
    layer(rows).square().sum().backward()
    (expected,) = torch.autograd.grad((rows @ codes.dense().t()).square().sum(), rows)
    torch.testing.assert_close(rows.grad, expected)


@pytest.mark.parametrize("change", [{"format": "naive-quantized"}, {"actorder": "group"}, {"num_bits": 5}, {"type": "float"}])
def test_integers_in_another_form_are_refused_by_name(change, tmp_path):
    folders, _ = made(tmp_path, small={"kind": "quantize", "group": 16})
    file = folders["small"] / "model" / "config.json"
    config = json.loads(file.read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    (config["quantization_config"] if "format" in change else weights).update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised by compressed-tensors in a form that posttrain does not read"):
        load_plain(ModelSource(path=str(file.parent)))


# ---- commands


def test_the_commands_print_sizes_and_distances_and_overwrite_nothing(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in HELD_OUT["sources"]["items"]))
    rows = f"measure={tmp_path / 'rows.jsonl'}"
    found = CliRunner().invoke(app, ["quantize", str(base()), str(tmp_path / "small"), "group=16", rows])
    assert found.exit_code == 0, found.output
    assert "bits a weight of the matrices:" in found.stdout
    assert "KL(before || after), nats a token: 0." in found.stdout
    assert load(tmp_path / "small").lm.model.config.vocab_size
    again = CliRunner().invoke(app, ["prune", str(base()), str(tmp_path / "small"), "method=magnitude"])
    assert "is there already" in str(again.exception)
    pruned = CliRunner().invoke(app, ["prune", str(base()), str(tmp_path / "sparse"), "method=magnitude", "sparsity=0.25", "--json"])
    record = json.loads(pruned.stdout)
    assert record["sparsity"] == 0.25
    assert record["metrics"] == {}
