"""Where parts meet that know nothing of each other: adapters, deltas and codes on one model, in few digits, as scores and classes."""

import json

import pytest
import torch
from test_tuners import said
from tiny_models import fine, make, make_scalar, transformer
from tiny_runs import base
from tuned_models import move

from posttrain.data.dataset import Data
from posttrain.errors import ModelError, RecipeError
from posttrain.models.actor_critic import ActorCritic
from posttrain.models.load import wrap, wrap_scalar
from posttrain.models.source import ModelSource
from posttrain.objectives import Classify
from posttrain.text import Classes, Classified
from posttrain.training.session import write
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.folder import WEIGHTS, load_adapter, save_adapter
from posttrain.tuners.mix import Mix


def stored(lm, kind, folder, base, **settings):
    """A tuner's folder, as it was learned on a model."""
    tuner = Tuner.lookup(kind)(**settings)
    tuner.install(lm.model)
    move(lm)
    save_adapter(tuner, lm.model, folder, base)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llama"
    transformer("llama").save_pretrained(folder)
    return ModelSource(path=str(folder))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_keeps_its_digits_in_a_model_of_few(kind, llama, tmp_path):
    """Beside an adapter that cannot be folded in, it is loaded unmerged: as it was learned, not rounded to bfloat16."""
    lm = make("llama", "bfloat16")
    stored(lm, "adapter", tmp_path / "below", llama, size=4)
    below = ModelSource(path=str(tmp_path / "below"))
    again = make("llama", "bfloat16")
    load_adapter(again.model, tmp_path / "below", llama)
    stored(again, kind, tmp_path / "above", below)
    wanted = said(again)
    third = make("llama", "bfloat16")
    load_adapter(third.model, tmp_path / "below", llama)
    load_adapter(third.model, tmp_path / "above", below)
    assert torch.equal(said(third), wanted)


def test_dora_is_refused_on_a_delta_whose_rows_it_would_not_measure(llama):
    lm = make("llama")
    Tuner.lookup("delta_scale")(of=str(fine("llama"))).install(lm.model)
    with pytest.raises(ModelError, match="set dora: false"):
        Tuner.lookup("lora")(rank=2, dora=True).install(lm.model)
    Tuner.lookup("lora")(rank=2).install(lm.model)


def test_a_delta_of_a_quantised_base_is_refused_before_anything_is_read():
    quantised = ModelSource(path=str(base()), quantize="nf4")
    with pytest.raises(RecipeError, match="is quantised, and a delta is a difference of weights"):
        Tuner.lookup("delta_scale")(of=str(base())).check(quantised)


@pytest.mark.parametrize(
    ("init", "dtype", "message"),
    [("pissa", "bfloat16", "too few digits"), ("orthogonal", "bfloat16", "too few digits"), ("olora", "float64", "float32 alone")],
)
def test_beginnings_that_a_precision_cannot_hold_are_refused(init, dtype, message):
    with pytest.raises(RecipeError, match=message):
        Tuner.lookup("lora")(init=init).check(ModelSource(path="x/y", dtype=dtype))


def test_an_orthogonal_beginning_takes_an_even_rank():
    with pytest.raises(ValueError, match="take an even rank"):
        Tuner.lookup("lora")(init="orthogonal", rank=3)


def test_a_head_among_the_targets_is_not_stored_with_its_frozen_weights(llama, tmp_path):
    lm = make("qwen3")
    stored(lm, "lora", tmp_path, llama, rank=2, targets=["q_proj", "lm_head"])
    assert not any("base_layer" in name for name in json.loads(header(tmp_path / WEIGHTS)))


def header(file):
    raw = file.read_bytes()
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")].decode()


class Nobody:
    """In the place of a template: writes no tokenizer."""

    tokenizer = type("Tokenizer", (), {"save_pretrained": lambda *_: None})()


@pytest.mark.parametrize("kind", [None, "regression"])
def test_a_critic_keeps_what_is_added_to_its_scores_in_an_adapter_folder(kind, llama, tmp_path):
    critic = make_scalar("llama")
    critic.model.config.problem_type = None
    critic.shift = 5.0
    tuner = Tuner.lookup("prompt")(tokens=2, init="random")
    tuner.install(critic.model)
    write(critic, tuner, llama, False, Nobody(), tmp_path)
    assert json.loads((tmp_path / "posttrain_adapter.json").read_text())["reward_shift"] == 5.0


def test_adapters_learned_on_weights_and_on_their_codes_are_not_mixed(llama, tmp_path):
    for name, source in {"plain": llama, "coded": llama.model_copy(update={"quantize": "nf4"})}.items():
        stored(make("llama"), "lora", tmp_path / name, source, rank=2)
    sources = [ModelSource(path=str(tmp_path / name)) for name in ("plain", "coded")]
    for order in (sources, sources[::-1]):
        with pytest.raises(ModelError, match="on quantised weights and some on those before"):
            Mix(order, [0.5, 0.5]).check()


# ---- labels as files have them


def test_numbers_that_a_table_has_as_text_are_numbers(tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("text,label\n" + "".join(f"t{index},{index * 0.7:.1f}\n" for index in range(6)), encoding="utf-8")
    rows = Data.model_validate({"sources": str(table), "format": "classified"}).read().all
    settled = Classify().settled(rows)
    assert settled.problem == "regression"
    assert settled.classes.numbers(rows[2].label, rows[2].where) == (1.4,)


def test_integers_are_in_their_order_below_zero_too():
    rows = [Classified("a", 1), Classified("b", -1), Classified("c", 0), Classified("d", 10)]
    assert Classify().settled(rows).labels == ["-1", "0", "1", "10"]


def test_a_classifier_without_names_knows_its_classes_by_number():
    assert Classes("single", ("LABEL_0", "LABEL_1")).numbers(1, "rows.jsonl:1") == (1.0,)


def test_a_wrapped_model_of_each_sort_begins_unmixed_and_is_then_as_asked():
    lm = wrap(transformer("llama"), ModelSource(path="tiny", dtype="mixed"))
    scorer = wrap_scalar(make_scalar("llama").model, ModelSource(path="tiny", dtype="mixed"))
    assert lm.mixed
    assert scorer.mixed
    assert tuned(ActorCritic(lm, scorer).model)
