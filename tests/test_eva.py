"""LoRA that begins from rows (EVA): A is the largest directions of a layer's inputs, ranks go where they are needed, and once."""

import json
import re
import signal
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict
from safetensors.torch import load_file
from tiny_models import make
from tiny_runs import DATA, OBJECTIVES, marks, settings, stage_folder, text, train
from transformers import AutoModelForCausalLM

from posttrain.batch import Sequences
from posttrain.errors import DataError, RecipeError
from posttrain.models.lm import LM
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.stage import Interrupted
from posttrain.tuners import LoRA, tuned
from posttrain.tuners.eva import ranks
from posttrain.tuners.injected import layers_of
from posttrain.tuners.load import load

EVA = {"kind": "lora", "rank": 4, "alpha": 8.0, "init": "eva"}


def rows(count: int = 12, length: int = 30, seed: int = 0, shared: int = 0) -> Sequences:
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(2, 97, (shared,), generator=draw).tolist()
    made = [[*first, *torch.randint(2, 97, (length + index % 3,), generator=draw).tolist()] for index in range(count)]
    return Sequences.of([(tokens, [False] + [True] * (len(tokens) - 1)) for tokens in made])


def begun(lm: LM, tuner: LoRA, seqs: Sequences) -> None:
    tuner.install(lm.model)
    tuner.begin(lm.model, tuner.observe(lm, seqs))


def inputs_of(lm: LM, seqs: Sequences) -> dict[str, torch.Tensor]:
    """{layer: [tokens, inputs]}, each sequence by itself through the model's own forward."""
    found: dict[str, list[torch.Tensor]] = {path: [] for path in layers_of(lm.model)}
    handles = [
        layer.register_forward_pre_hook(lambda _, given, path=path: found[path].append(given[0][0].detach()))
        for path, layer in layers_of(lm.model).items()
    ]  # fmt: skip
    with torch.no_grad():
        for row in seqs.rows():
            lm.model(torch.tensor(row)[None])
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in found.items()}


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_a_is_the_right_singular_vectors_of_the_layers_inputs(name: str, layout: str) -> None:
    lm, seqs = make(name, "float64", layout), rows()
    tuner = LoRA(**{**EVA, "rank": 6})
    before = lm.logprobs(seqs)
    begun(lm, tuner, seqs)
    torch.testing.assert_close(lm.logprobs(seqs), before, atol=0, rtol=0)
    inputs, counts = inputs_of(lm, seqs), []
    for path, layer in layers_of(lm.model).items():
        a = layer.lora_A["default"].weight  # type: ignore[union-attr]
        states = inputs[path]
        _, _, vectors = torch.linalg.svd(states - states.mean(0), full_matrices=False)
        torch.testing.assert_close((a @ vectors[: len(a)].T).abs(), torch.eye(len(a), dtype=torch.float64), atol=1e-4, rtol=0)
        assert not layer.lora_B["default"].weight.any()  # type: ignore[union-attr]
        assert layer.scaling["default"] == 8.0 / 6  # type: ignore[union-attr]
        counts.append(len(a))
    assert sum(counts) == 6 * len(counts)
    assert 1 <= min(counts) < max(counts) <= 12


def test_ranks_go_where_directions_have_the_largest_shares_and_none_is_left_without() -> None:
    shares = {"flat": [0.1, 0.1, 0.1, 0.1], "steep": [0.9, 0.05, 0.01, 0.0], "even": [0.4, 0.3, 0.2, 0.1]}
    assert ranks(shares, 2) == {"flat": 1, "steep": 1, "even": 3} | {"flat": 2}
    assert ranks(shares, 1) == {"flat": 1, "steep": 1, "even": 1}
    assert sum(ranks(shares, 3).values()) == 9


def test_a_prefix_that_rows_share_counts_once() -> None:
    lm, seqs = make("llama", "float64"), rows(shared=40)
    tuner = LoRA(**EVA)
    begun(lm, tuner, seqs)
    path, layer = next(iter(layers_of(lm.model).items()))
    states = inputs_of(lm, seqs)[path]
    edges = seqs.starts.tolist()
    once = torch.cat([states[:40], *(states[start + 40 : stop] for start, stop in pairwise(edges))])
    a = layer.lora_A["default"].weight  # type: ignore[union-attr]
    _, _, vectors = torch.linalg.svd(once - once.mean(0), full_matrices=False)
    torch.testing.assert_close((a @ vectors[: len(a)].T).abs(), torch.eye(len(a), dtype=torch.float64), atol=1e-4, rtol=0)


def test_wide_inputs_give_the_directions_that_peft_finds() -> None:
    """Where all directions would cost too much they are found by a random projection; peft's own search goes on until it settles."""
    shape = {"hidden_size": 96, "intermediate_size": 112, "num_attention_heads": 12, "num_key_value_heads": 6}
    lm, seqs = make("llama", "float32", **shape), rows(40, 50)
    tuner = LoRA(**{**EVA, "targets": ["q_proj", "down_proj"]})
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, use_label_mask=False)
    )
    ids = [torch.tensor(row) for row in seqs.rows()]
    batches = [{"input_ids": torch.stack([each[:50] for each in ids[start : start + 10]])} for start in range(0, 40, 10)]
    theirs = get_eva_state_dict(lm.model, batches, config, show_progress_bar=False)
    tuner.install(lm.model)
    ours, inputs = tuner.observe(lm, seqs), inputs_of(lm, seqs)
    assert sorted(theirs) == sorted(ours)
    for path, vectors in ours.items():
        shared = min(len(vectors), len(theirs[path]))
        states = inputs[path] - inputs[path].mean(0)
        held = [float((states @ each[:shared].T.float()).square().sum()) for each in (vectors, theirs[path])]
        assert held[0] == pytest.approx(held[1], rel=0.02)
        _, values, _ = torch.linalg.svd(states.double())
        assert held[0] == pytest.approx(float(values[:shared].square().sum()), rel=0.01)


def test_tokens_that_are_too_few_are_refused() -> None:
    lm, tuner = make("llama"), LoRA(**EVA)
    tuner.install(lm.model)
    with pytest.raises(DataError, match=r"eva: 10 tokens are too few to find 8 directions .* lower tuner.rank"):
        tuner.observe(lm, rows(1, 10))


# ---- stages


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_stage_that_is_stopped_begins_where_it_began(kind: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = text(kind, tuner=EVA)
    unbroken = train(recipe, tmp_path / "unbroken")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "stopped", {3: signal.SIGTERM})
    found = (stage_folder(tmp_path / "stopped") / "beginning.safetensors").read_bytes()
    assert found == (unbroken / "beginning.safetensors").read_bytes()
    monkeypatch.setattr(LoRA, "observe", None)  # it is not asked again
    assert marks(train(recipe, tmp_path / "stopped")) == marks(unbroken)


def test_what_a_stage_leaves_is_a_lora_of_several_ranks_that_peft_loads(tmp_path: Any) -> None:
    folder = train(text("sft", tuner=EVA), tmp_path)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    sizes = {name: tuple(each.shape) for name, each in load_file(folder / "adapter" / "adapter_model.safetensors").items()}
    first, last = "base_model.model.", ".lora_A.weight"
    found = {name.removeprefix(first).removesuffix(last): rank for name, (rank, _) in sizes.items() if name.endswith(last)}
    assert sum(found.values()) == 4 * len(found)
    assert config["rank_pattern"] == {name: rank for name, rank in found.items() if rank != 4}
    assert len(set(found.values())) > 2
    tokens = torch.tensor([[5, 9, 17, 300, 42, 7, 8]])
    base = AutoModelForCausalLM.from_pretrained(settings()["model"])
    with torch.no_grad():
        plain = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, folder / "adapter")(tokens).logits
        ours = load(str(folder / "adapter")).lm.model(tokens).logits
        whole = load(str(folder / "model")).lm.model(tokens).logits
    assert (theirs - plain).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    torch.testing.assert_close(whole, theirs, atol=2e-5, rtol=0)


def test_rows_come_from_the_stages_sources_as_they_are_mixed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequences] = []
    observe = LoRA.observe

    def watched(self: LoRA, lm: LM, seqs: Sequences) -> dict[str, torch.Tensor]:
        seen.append(seqs)
        return observe(self, lm, seqs)

    monkeypatch.setattr(LoRA, "observe", watched)
    train(text("sft", tuner=EVA), tmp_path / "rows")
    train(text("grpo", tuner=EVA), tmp_path / "prompts")
    answers, prompts = seen
    assert answers.count == len(DATA["sources"]["items"])
    assert answers.trained > 0
    assert prompts.count == len(OBJECTIVES["grpo"]["task"]["source"]["items"])
    assert prompts.trained == 0


def test_a_frozen_adapter_below_stays_frozen_and_is_not_counted_as_its_own() -> None:
    lm, seqs = make("llama", "float64"), rows()
    LoRA(**EVA).install(lm.model)
    assert len(tuned(lm.model)) == 2 * len(layers_of(lm.model))
    tuner = LoRA(**EVA)
    tuner.begin(lm.model, tuner.observe(lm, seqs))
    assert len(tuned(lm.model)) == 2 * len(layers_of(lm.model))


def test_a_critic_cannot_begin_from_rows() -> None:
    critic = {"critic": {"tuner": EVA}}
    with pytest.raises(RecipeError, match=re.escape("critic.tuner: init: eva is for the policy")):
        Recipe.parse(text("ppo", **critic), name="tiny")
