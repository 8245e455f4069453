"""Stages under every tuner: what they leave is the model that was trained, and other stages go on from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_runs import base, settings, text, train

from posttrain.batch import Sequences
from posttrain.errors import ModelError, RecipeError
from posttrain.models.source import ModelSource
from posttrain.pipeline.recipe import Recipe
from posttrain.training import checkpoint
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.load import load, load_scalar

SEQS = Sequences.of([([5, 9, 17, 300, 42, 7, 8], [False] * 3 + [True] * 4), ([250, 11, 12, 13], [False, False, True, True])])
TUNERS: dict[str, dict[str, Any]] = {
    "layers": {"kind": "layers", "last": 1}, "head": {"kind": "head", "untie": True}, "bitfit": {"kind": "bitfit", "add": True},
    "lora": {"kind": "lora", "rank": 2, "init": "pissa"}, "ia3": {"kind": "ia3"}, "adapter": {"kind": "adapter", "size": 4},
    "prompt": {"kind": "prompt", "tokens": 3, "text": "Add the numbers"}, "p_tuning": {"kind": "p_tuning", "tokens": 3, "at": [0, 1]},
    "prefix": {"kind": "prefix", "tokens": 3, "projection": 8}, "delta_scale": {"kind": "delta_scale"},
}  # fmt: skip
FAST = {"learning_rate": 0.02}


def said(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.logprobs(SEQS)
    return found


def trained_on(start: Path | str, folder: Path, tuner: dict[str, Any]) -> Any:
    """The model as training left it: the start, the tuner, and the weights of the last checkpoint."""
    lm = load(str(start)).lm
    Tuner.model_validate(tuner).install(lm.model)
    last = checkpoint.folder_of(folder / "checkpoints", checkpoint.steps(folder / "checkpoints")[-1])
    weights = checkpoint.load(last, json.loads((last / "manifest.json").read_text())["owner"]).tensors["weights"]
    parameters = tuned(lm.model)
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return lm


@pytest.mark.parametrize("kind", TUNERS)
def test_a_stage_leaves_the_model_that_it_trained(kind: str, tmp_path: Path) -> None:
    folder = train(text("sft", "full", steps=3, optim=FAST, tuner=TUNERS[kind]), tmp_path)
    tuner = settings("sft", "full", tuner=TUNERS[kind])["tuner"]
    trained = said(trained_on(base(), folder, tuner)) if kind != "lora" else None
    before, found = said(load(base()).lm), said(load(folder / "model").lm)
    assert (found - before).abs().max() > 1e-3, "training moved the model"
    if trained is not None:
        torch.testing.assert_close(found, trained, rtol=0, atol=1e-5)
    folded = Tuner.model_validate(tuner).folds_in
    assert (folder / "model" / "config.json").exists() == folded
    assert (folder / "adapter").exists() == folded
    if folded:
        torch.testing.assert_close(said(load(folder / "adapter").lm), found, rtol=0, atol=1e-5)


def two_stages(first: dict[str, Any], second: dict[str, Any], kind: str = "sft", **changes: Any) -> str:
    """One stage, and one that starts from its model."""
    one = json.loads(text("sft", "full", steps=2, optim=FAST, tuner=first))
    two = json.loads(text(kind, "full", steps=2, optim=FAST, tuner=second, **changes)) | {"model": {"stage": "one"}}
    return json.dumps({"stages": {"one": one, "two": two}})


def run_both(recipe: str, root: Path) -> dict[str, Path]:
    from posttrain.pipeline.run import run

    return run(Recipe.parse(recipe, name="tiny"), root).folders


@pytest.mark.parametrize("above", ["lora", "prompt", "adapter", "head"])
@pytest.mark.parametrize("below", ["prompt", "prefix", "adapter"])
def test_a_stage_goes_on_from_an_adapter_and_leaves_one_on_top_of_it(below: str, above: str, tmp_path: Path) -> None:
    if (below, above) == ("adapter", "adapter"):
        with pytest.raises(RecipeError, match="has adapters already"):
            run_both(two_stages(TUNERS[below], TUNERS[above]), tmp_path)
        return
    second = TUNERS[above] | ({"init": "kaiming"} if above == "lora" else {})
    folders = run_both(two_stages(TUNERS[below], second), tmp_path)
    trained = said(trained_on(folders["one"] / "model", folders["two"], second))
    found = said(load(folders["two"] / "model").lm)
    torch.testing.assert_close(found, trained, rtol=0, atol=1e-5)
    start = said(load(folders["one"] / "model").lm)
    assert (found - start).abs().max() > 1e-3
    assert (start - said(load(base()).lm)).abs().max() > 1e-3

    elsewhere = tmp_path.parent / f"{tmp_path.name}-moved"
    shutil.move(tmp_path, elsewhere)  # the folders that stand beside each other still do
    torch.testing.assert_close(said(load(elsewhere / folders["two"].relative_to(tmp_path) / "model").lm), found, rtol=0, atol=0)


def test_what_cannot_stand_on_an_adapter_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    folder = train(text("sft", "full", steps=1, optim=FAST, tuner=TUNERS["prompt"]), tmp_path)
    recipe = json.loads(text("sft", "full", steps=1)) | {"model": str(folder / "model")}
    with pytest.raises(RecipeError, match="tuner: full would move the weights below the adapter"):
        Recipe.parse(json.dumps(recipe), name="tiny").check()


def test_a_reward_model_may_be_an_adapter(tmp_path: Path) -> None:
    recipe = text("bradley_terry", "full", steps=3, optim=FAST, tuner=TUNERS["prompt"], normalise={})
    folder = train(recipe, tmp_path)
    lm = load_scalar(folder / "model").lm
    with torch.no_grad():
        scores = lm.scores(SEQS)
    assert lm.shift != 0
    assert len(set(scores.tolist())) == 2
    record = json.loads((folder / "model" / "posttrain_adapter.json").read_text())
    assert record["reward_shift"] == pytest.approx(lm.shift)
    assert ModelSource(path=str(folder / "model")).foundation().path is not None


@pytest.mark.parametrize("kind", ["adapter", "prompt", "prefix", "p_tuning", "ia3", "bitfit", "delta_scale"])
def test_policies_under_every_tuner_are_compared_with_the_model_below(kind: str, tmp_path: Path) -> None:
    """The first update of DPO: margin 0; of GRPO with a KL term: ratio 1 and KL 0, on samples drawn with the tuner in place.

    A soft prompt, or a delta, changes the model as soon as it is there, so that it does not begin at the reference.
    """
    begins_apart = kind in {"prompt", "prefix", "p_tuning", "delta_scale"}
    for objective, section in (("dpo", {}), ("grpo", {"objective": {"kind": "grpo", "kl": 0.1}})):
        folder = train(text(objective, "full", steps=2, optim=FAST, tuner=TUNERS[kind], **section), tmp_path / objective)
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        if objective == "dpo":
            assert (abs(first["loss/preference"] - 0.6931472) < 2e-5) != begins_apart
        else:
            assert (abs(first["kl"]) < 1e-5) != begins_apart
            assert first["mismatch"] < 1e-5
            assert first["clip_fraction"] == 0


def test_the_learning_rate_is_the_tuners_where_none_is_given(tmp_path: Path) -> None:
    folder = train(text("sft", "full", steps=1, optim={"schedule": "constant", "warmup": 0}, tuner=TUNERS["prompt"]), tmp_path)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["lr"] == 3e-2


def first_line(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return found


@pytest.mark.parametrize("kind", ["prompt", "adapter", "ia3"])
def test_a_cached_reference_is_the_model_below_the_tuner_and_serves_stages_under_other_tuners(kind: str, tmp_path: Path) -> None:
    asked = train(text("dpo", "full", steps=1, tuner=TUNERS[kind]), tmp_path / "asked")
    one = json.loads(text("dpo", "full", steps=1, tuner=TUNERS[kind], reference={"cache": True}))
    two = one | {"tuner": {"kind": "lora", "rank": 2}}
    folders = run_both(json.dumps({"stages": {"one": one, "two": two}}), tmp_path / "cached")
    wanted = first_line(asked)["loss/preference"]
    assert first_line(folders["one"])["loss/preference"] == pytest.approx(wanted, abs=1e-6)
    assert first_line(folders["two"])["loss/preference"] == pytest.approx(0.6931472, abs=1e-5)
    assert len(list((folders["one"].parent / "cache").glob("reference-*.safetensors"))) == 1


def test_what_a_tuner_cannot_promise_is_refused_in_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"reference\.refresh: .*under tuner prompt"):
        Recipe.parse(text("dpo", "full", tuner=TUNERS["prompt"], reference={"refresh": {"every": 2}}), name="tiny")
    stage = settings("sft", "full", tuner={"kind": "layers", "unfreeze": 0.5}, seconds=5, optim={"schedule": "constant", "warmup": 0})
    with pytest.raises(RecipeError, match=r"tuner\.unfreeze: a run of a given time"):
        Recipe.parse(json.dumps({key: value for key, value in stage.items() if key != "steps"}), name="tiny")


@pytest.mark.parametrize("kind", ["lora", "ia3", "bitfit", "layers", "prompt"])
def test_a_reward_models_adapter_scores_as_its_model_does(kind: str, tmp_path: Path) -> None:
    tuner = TUNERS[kind] | ({"init": "kaiming"} if kind == "lora" else {})
    folder = train(text("bradley_terry", "full", steps=2, optim=FAST, tuner=tuner, normalise={}), tmp_path)
    whole = load_scalar(folder / "model").lm
    assert whole.shift != 0
    if Tuner.lookup(kind).merges:
        alone = load_scalar(folder / "adapter").lm
        with torch.no_grad():
            torch.testing.assert_close(alone.scores(SEQS), whole.scores(SEQS), rtol=0, atol=2e-5)


def test_an_adapter_without_a_score_leaves_the_reward_model_below_as_it_is(tmp_path: Path) -> None:
    folder = train(text("bradley_terry", "full", steps=2, optim=FAST, normalise={}), tmp_path / "reward")
    below = load_scalar(folder / "model").lm
    theirs = get_peft_model(below.model, LoraConfig(r=2, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path / "lora")
    found = load_scalar(ModelSource(path=str(tmp_path / "lora"), base=str(folder / "model"))).lm
    again = load_scalar(folder / "model").lm
    with torch.no_grad():
        torch.testing.assert_close(found.scores(SEQS), again.scores(SEQS), rtol=0, atol=1e-6)


def test_frozen_adapters_below_stay_frozen_under_tuners_of_the_models_own_weights(tmp_path: Path) -> None:
    for below, above in (("prompt", {"kind": "layers", "last": 1}), ("adapter", TUNERS["bitfit"])):
        folders = run_both(two_stages(TUNERS[below], above), tmp_path / below)
        lm = load(folders["one"] / "model").lm
        Tuner.model_validate(above).install(lm.model)
        assert not any("soft_tokens" in name or ".adapter." in name for name in tuned(lm.model))
        trained = said(trained_on(folders["one"] / "model", folders["two"], above))
        torch.testing.assert_close(said(load(folders["two"] / "model").lm), trained, rtol=0, atol=1e-5)


def test_a_prefix_needs_the_tree(tmp_path: Path) -> None:
    recipe = text("sft", "full", steps=1, tuner=TUNERS["prefix"], model={"path": str(base()), "layout": "padded"})
    with pytest.raises(ModelError, match="a prefix needs layout: tree"):
        train(recipe, tmp_path)


def test_an_adapter_folder_is_known_by_its_weights_and_its_lowest_model_can_be_named(tmp_path: Path) -> None:
    home = tmp_path / "base"
    shutil.copytree(base(), home)
    folders = run_both(two_stages(TUNERS["prompt"], TUNERS["adapter"]).replace(str(base()), str(home)), tmp_path)
    wanted = said(load(folders["two"] / "model").lm)
    (home / "config.json").write_text((home / "config.json").read_text() + "\n")  # no weight is another
    shutil.move(home, tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"the model below this adapter, .*, is not there"):
        load(folders["two"] / "model")
    found = load(ModelSource(path=str(folders["two"] / "model"), base=str(tmp_path / "elsewhere"))).lm
    assert torch.equal(said(found), wanted)
    (folders["one"] / "model" / "config.json").write_text("{}")  # as some trainers leave one beside an adapter
    assert torch.equal(said(load(ModelSource(path=str(folders["two"] / "model"), base=str(tmp_path / "elsewhere"))).lm), wanted)
    known = json.loads((folders["two"] / "model" / "posttrain_adapter.json").read_text())
    (folders["two"] / "model" / "posttrain_adapter.json").write_text(json.dumps(known | {"tuner": {"kind": "vera"}}))
    with pytest.raises(ModelError, match="unknown tuner 'vera'"):
        load(ModelSource(path=str(folders["two"] / "model"), base=str(tmp_path / "elsewhere")))
