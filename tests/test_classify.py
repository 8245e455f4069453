"""Classifiers: labels and pairs of texts, heads of decoders and encoders, three losses, every tuner, and figures with intervals."""

import json
import math
import warnings
from functools import cache

import pytest
import tiny_encoders
import tiny_tokenizers
import torch
from example_batches import rows
from peft import PeftModel
from tiny_encoders import THREE
from tiny_fits import MADE, fitted, update_of
from tiny_models import transformer
from tiny_runs import base
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    pipeline,
)

from posttrain.batch import Classified, Sequences
from posttrain.data.dataset import Data
from posttrain.data.render import Template
from posttrain.data.rows import making_row
from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.evaluation.classes import Told, class_figures, f1_each, matthews, ranks, redrawn, related
from posttrain.models.classifier import load_classifier as load_whole
from posttrain.models.encoder import segments
from posttrain.models.heads import head_parameters, head_parts, in_config
from posttrain.models.load import takes_the_tree
from posttrain.models.source import ModelSource
from posttrain.objectives import Classify
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.report import write_report
from posttrain.pipeline.run import run
from posttrain.text import Classes
from posttrain.text import Classified as Row
from posttrain.training.roles import new_head
from posttrain.training.session import Session, train
from posttrain.training.settings import TrainSettings
from posttrain.tuners import Tuner, tuned
from posttrain.tuners.bottleneck import bottlenecks
from posttrain.tuners.folder import save_adapter
from posttrain.tuners.injected import layers_of
from posttrain.tuners.load import load_classifier

ENCODERS = pytest.mark.parametrize("name", list(tiny_encoders.CONFIGS))
TEXTS = [
    Row("the cat sat on the mat .", "ant"), Row("a film , not good", "bee", "the story is bad and long ."),
    Row("all day long", "cow", "all night"), Row("red", "ant"),
]  # fmt: skip
FEELINGS = [{"text": f"the {a} is {b} {c}", "label": "good" if c == "good" else "bad"}
            for a in ("film", "story", "cat", "dog") for b in ("very", "not", "all") for c in ("good", "bad")]  # fmt: skip


def inline(items, **more):
    return {"sources": {"kind": "inline", "items": items}, "format": "classified", **more}


def settings_of(model, items=FEELINGS, **changes):
    plan = {"data": inline(items), "steps": 3, "batch": {"rows": 6}, "optim": {"learning_rate": 0.01, "warmup": 0.0}}
    return TrainSettings.model_validate({"model": str(model), "objective": "classify", **plan, **changes})


def trained(folder, model, items=FEELINGS, **changes):
    train(settings_of(model, items, **changes), Session(folder, "owner"))
    return folder / "model"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A BERT as pretraining leaves it: with words to foresee, without a pooler."""
    folder = tmp_path_factory.mktemp("bert")
    return tiny_encoders.saved(folder, "bert", classes=None, auto=AutoModelForMaskedLM)


@pytest.fixture(scope="module")
def lonely(tmp_path_factory):
    """A decoder whose padding token is the one that ends a turn."""
    folder = tmp_path_factory.mktemp("lonely")
    tokenizer = tiny_tokenizers.make("pad_is_eos")
    transformer("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tokens_of(tokenizer, found=TEXTS):
    template = Template(tokenizer, chat=False)
    return [made.sequences[0] for made in template.together(making_row(row, template, "all") for row in found)]


def logits(lm, sequences):
    with torch.no_grad():
        return lm.logits(Sequences.of(sequences))


# ---- what a row becomes


@ENCODERS
def test_an_encoder_reads_texts_and_pairs_as_transformers_gives_them(name, tmp_path):
    folder = tiny_encoders.saved(tmp_path, name)
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), load_whole(folder).lm
    sequences = tokens_of(tokenizer)
    assert [tokens for tokens, _ in sequences] == [tokenizer(row.text, row.second)["input_ids"] for row in TEXTS]
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        alone = [theirs(**tokenizer(row.text, row.second, return_tensors="pt")).logits for row in TEXTS]
    ours = logits(lm, sequences)
    torch.testing.assert_close(ours, torch.cat(alone), rtol=0, atol=2e-6)
    assert float(ours.std(0).min()) > 0.02, "texts differ in what is said of them"
    assert lm.layout == "padded"
    assert not takes_the_tree(lm.model)
    assert lm.context == (63 if name == "roberta" else 64), "RoBERTa keeps a position for padding"


def test_bert_is_told_which_text_is_the_second_one(tmp_path):
    folder = tiny_encoders.saved(tmp_path, "bert")
    tokenizer, lm = AutoTokenizer.from_pretrained(folder), load_whole(folder).lm
    known = tokenizer(["a cat", "red"], ["the dog", "a log ."], padding=True, return_tensors="pt")
    found = segments(known["input_ids"], lm.model.separator) * known["attention_mask"]
    assert torch.equal(found, known["token_type_ids"])
    pair = tokens_of(tokenizer, TEXTS[1:2])
    right = logits(lm, pair)
    lm.model.separator = None
    assert float((logits(lm, pair) - right).abs().max()) > 0.01


def test_two_texts_are_lines_of_one_where_the_tokenizer_knows_no_pairs(lonely):
    tokenizer = AutoTokenizer.from_pretrained(lonely)
    (tokens, _), (both, _) = tokens_of(tokenizer, [Row("Sam has 3", "x"), Row("Sam has 3", "x", "and 4")])
    assert tokens == tokenizer("Sam has 3")["input_ids"]
    assert both == tokenizer("Sam has 3\nand 4")["input_ids"]


def test_what_spells_a_separator_and_what_is_too_long_is_left_out_whole_and_counted(bert):
    tokenizer = AutoTokenizer.from_pretrained(bert)
    items = [{"text": "red [SEP] blue", "label": "a"}, {"text": "red " * 30, "label": "b"}, {"text": "red", "label": "b"}]
    data = Data.model_validate(inline(items, max_tokens=16))
    rendered = data.render(data.read(), Template(tokenizer, chat=False))
    assert {reason: each.count for reason, each in rendered.dropped.items()} == {
        "a text spells the control token [SEP]": 1, "longer than max_tokens": 1,
    }  # fmt: skip
    assert rendered.sequences == [(tokenizer("red")["input_ids"], [False] * 3)]
    strict = Data.model_validate(inline(items, max_tokens=16, too_long="error"))
    with pytest.raises(DataError, match=r"inline:2: 32 tokens, but max_tokens is 16"):
        strict.render(strict.read(), Template(tokenizer, chat=False))


def test_a_conversation_is_read_at_the_end_of_its_answer_or_where_the_answer_would_begin():
    template = Template(AutoTokenizer.from_pretrained(base()))
    data = Data.model_validate(inline([
        {"prompt": "What is 1 + 2?", "completion": "It is 3.", "label": True}, {"prompt": "What is 1 + 2?", "label": False},
        {"messages": [{"role": "user", "content": "What is 1 + 2?"}, {"role": "assistant", "content": "It is 3."}], "label": True},
    ]))  # fmt: skip
    loaded = data.read()
    assert loaded.needs_chat
    (answered, _), (asked, _), (same, _) = data.render(loaded, template).sequences
    assert answered == same
    assert answered[-1] == template.end_id
    assert asked == answered[: len(asked)] == template.prompt(loaded.all[1].messages)
    assert [row.label for row in loaded.all] == ["true", "false", "true"]


# ---- labels


@pytest.mark.parametrize(
    ("found", "problem", "labels"),
    [
        (["b", "a", "b"], "single", ["a", "b"]),
        ([10, 2, 2], "single", ["2", "10"]),
        ([["b"], [], ["a", "b"]], "multi", ["a", "b"]),
        ([1, 2.5, 0], "regression", None),
    ],
)
def test_problem_and_labels_are_what_the_data_hold_whatever_the_order_of_the_rows(found, problem, labels):
    parsed = Data.model_validate(inline([{"text": "x", "label": each} for each in found])).read().all
    for some in (parsed, parsed[::-1]):
        objective = Classify().settled(some)
        assert (objective.problem, objective.labels) == (problem, labels)
    numbers = [Classes(problem, tuple(labels or ())).numbers(row.label, "") for row in parsed]
    assert numbers == {
        "b": [(1.0,), (0.0,), (1.0,)], 10: [(1.0,), (0.0,), (0.0,)], "[": [(0.0, 1.0), (0.0, 0.0), (1.0, 1.0)], 1: [(1.0,), (2.5,), (0.0,)],
    }[found[0] if not isinstance(found[0], list) else "["]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"label": "a"}, {"label": "b"}], "held": [{"label": "a"}, {"label": "c"}]},
         r'inline:2: the label "c" is not among those that are known \(a, b\); correct the row, or name all labels where the model is trained'),
        ({"data": [{"label": "a"}, {"label": "a"}]}, "inline:1: all 2 texts are labelled a; there is nothing to tell apart"),
        ({"data": [{"label": "a"}, {"label": ["b"]}]}, r'inline:1: expected a list of labels, found "a"; correct the row, or set'),
        ({"data": [{"label": "a"}, {"label": 2.5}]}, "inline:2: expected one label, found 2.5; correct the row, or set objective.problem"),
        ({"data": [{"label": 1.5}, {"label": "a"}], "objective": {"problem": "regression"}},
         'inline:2: the label is "a", and others are numbers; correct the row'),
        ({"data": [{"label": "a"}, {"label": "b"}], "objective": {"weights": {"c": 2}}}, "weights: 'c' is no label; labels are a, b"),
        ({"data": [{"label": 1.5}, {"label": 2.0}], "objective": {"label_smoothing": 0.1}}, "label_smoothing is of problem: single"),
        ({"data": [{"label": {}}, {"label": "b"}]}, r'inline:1: column "label": expected text, found'),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit_are_refused_with_their_place(changes, message, tmp_path, bert):
    data, held = ([{"text": "red", **each} for each in changes.get(name, [])] for name in ("data", "held"))
    validation = {"validation": {"data": inline(held)}} if held else {}
    plan = settings_of(bert, data, objective={"kind": "classify", **changes.get("objective", {})}, **validation)
    with pytest.raises(DataError, match=message):
        train(plan, Session(tmp_path, "owner"))
    assert not (tmp_path / "checkpoints").exists()


def test_settings_that_do_not_fit_are_refused_before_anything_is_read(bert):
    numbers = [{"text": "red", "label": each / 2} for each in range(4)]
    rest = {"validation": {"data": inline(numbers), "best": "accuracy"}}
    plan = settings_of(bert, numbers, **rest)
    with pytest.raises(RecipeError, match="'accuracy' is not measured; measured are loss, absolute_error"):
        plan.settled(plan.data.read().all)
    unnamed = settings_of(bert, data={"sources": {"kind": "inline", "items": FEELINGS}})
    with pytest.raises(RecipeError, match=r"format text gives nothing that objective classify learns from; name it: data\.format: class"):
        unnamed.check()
    with pytest.raises(ValueError, match="objective classify trains no reward model; remove the section `normalise`"):
        settings_of(bert, normalise={})


# ---- losses


@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_the_loss_and_its_gradient_are_those_of_transformers(problem, encoder):
    objective = Classify(problem=problem, labels=None if problem == "regression" else ["a", "b", "c"])
    classes = objective.classes
    if encoder:
        lm = tiny_encoders.make("bert", "float64", classes=classes, pad_token_id=None)
    else:
        lm = MADE["classifier"]("gpt2", "float64") if problem != "regression" else MADE["scalar"]("gpt2", "float64")
    seqs = Sequences.of(rows())
    target = {
        "single": torch.tensor([0, 2, 1, 1, 0, 2, 2, 0]), "multi": (torch.arange(24).reshape(8, 3) % 5 < 2).double(),
        "regression": torch.linspace(-1, 2, 8, dtype=torch.float64),
    }[problem]  # fmt: skip
    for value in lm.model.parameters():
        value.requires_grad_(True)
    for key, value in in_config(classes).items():
        setattr(lm.model.config, key, value)
    batch = Classified(seqs, target.reshape(8, -1).float())
    update = update_of(type("Case", (), {"objective": objective}), batch)
    found, figures = fitted(lm, update, 60)
    told = torch.cat([
        lm.model(torch.tensor([row]), **({"token_type_ids": segments(torch.tensor([row]), 3)} if encoder else {})).logits
        for row in seqs.rows()
    ])  # fmt: skip
    from transformers.loss.loss_utils import ForSequenceClassificationLoss

    loss = ForSequenceClassificationLoss(target, told, lm.model.config)
    assert figures["loss/label"] == pytest.approx(float(loss), rel=1e-6 if problem == "regression" else 1e-12)
    exact = torch.autograd.grad(loss, list(tuned(lm.model).values()), allow_unused=True)
    exact = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(exact, tuned(lm.model).values(), strict=True)])
    assert float((found - exact).norm() / exact.norm()) < (1e-6 if problem == "regression" else 1e-10)


def test_smoothed_and_weighted_the_loss_is_its_formula():
    objective = Classify(problem="single", labels=["a", "b", "c"], label_smoothing=0.3, weights={"b": 2.0})
    lm = MADE["classifier"]("gpt2", "float64")
    batch = Classified(Sequences.of(rows()), torch.tensor([[0.0], [2.0], [1.0], [1.0], [0.0], [2.0], [2.0], [0.0]]))
    logp = logits(lm, [(row, [False] * len(row)) for row in batch.seqs.rows()]).log_softmax(1).tolist()
    weights = (1.0, 2.0, 1.0)
    total = -sum(
        weights[c] * ((0.7 if c == int(label) else 0.0) + 0.1) * each[c]
        for each, (label,) in zip(logp, batch.target.tolist(), strict=True) for c in range(3)
    )  # fmt: skip
    assert float(objective.loss(lm, batch).terms["label"].detach()) == pytest.approx(total, rel=1e-10)
    assert objective.units(batch) == {"label": 8}


def test_a_linear_probe_of_separable_features_gets_all_right_and_the_body_stays(tmp_path, bert):
    plan = settings_of(bert, tuner="head", steps=40, optim={"learning_rate": 0.1, "warmup": 0.0}, batch={"rows": 24})
    train(plan, Session(tmp_path, "owner"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["loss/label"] < 0.1 < lines[0]["loss/label"]
    before, after = (load_classifier(path, nn.init.zeros_, Classes("single", ("bad", "good"))).lm.model for path in (bert, tmp_path / "model"))
    head, kept = head_parameters(before), dict(after.named_parameters())
    assert {name.rpartition(".")[0] for name in head} == {"classifier", "bert.pooler.dense"}, "the pooler is as new as the classifier"
    moved = {name for name, each in before.named_parameters() if not torch.equal(each, kept[name])}
    assert moved == set(head)


def test_a_new_head_begins_with_all_classes_about_equally_likely_and_the_same_every_time(bert, lonely):
    for folder in (bert, lonely):
        first, again, other = (load_classifier(folder, new_head(seed, 0.02), THREE).lm for seed in (0, 0, 1))
        drawn = [torch.cat([each.flatten() for each in head_parameters(lm.model).values()]) for lm in (first, again, other)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])
        assert 0.01 < float(drawn[0][drawn[0] != 0].std()) < 0.03
        with pytest.raises(ModelError, match="is no classifier: it has no head; train one with objective classify"):
            load_classifier(folder)


# ---- the folder that is left


def told_by_pipeline(folder, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        say = pipeline("text-classification", str(folder), top_k=None, function_to_apply="none")
        return [{each["label"]: each["score"] for each in one} for one in say(texts, batch_size=4)]


def test_a_decoders_folder_is_transformers_own_also_where_padding_ends_texts(lonely, tmp_path):
    texts = ["What is 12 + 30?", "Once upon a time there was", "Sam has 18 shells and buys 6 more.", "The cat"]
    items = [{"text": text, "label": label} for text, label in zip(texts, "abca", strict=True)]
    folder = trained(tmp_path, lonely, items)
    config = json.loads((folder / "config.json").read_text())
    assert (config["id2label"], config["label2id"]) == ({"0": "a", "1": "b", "2": "c"}, {"a": 0, "b": 1, "c": 2})
    assert config["problem_type"] == "single_label_classification"
    assert "reward_shift" not in config
    loaded = load_classifier(folder)
    assert loaded.classes == Classes("single", ("a", "b", "c"))
    assert loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id
    ours = logits(loaded.lm, tokens_of(loaded.tokenizer, [Row(text, "a") for text in texts])).tolist()
    for said, mine in zip(told_by_pipeline(folder, texts), ours, strict=True):
        assert [said[label] for label in "abc"] == pytest.approx(mine, abs=2e-6)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ended = [[*row, loaded.tokenizer.eos_token_id] for row, _ in tokens_of(loaded.tokenizer, [Row(text, "a") for text in texts])]
    for side in ("left", "right"):
        padded = loaded.tokenizer.pad({"input_ids": ended}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            found = theirs(**padded).logits
        torch.testing.assert_close(found, logits(loaded.lm, [(row, [False] * len(row)) for row in ended]), rtol=0, atol=2e-6)


def test_a_saved_head_is_read_again_bit_for_bit_and_says_the_same_in_a_pipeline(bert, tmp_path):
    folder = trained(tmp_path, bert)
    first, rounded = load_classifier(folder), load_classifier(ModelSource(path=str(folder), dtype="bfloat16"))
    stored = AutoModelForSequenceClassification.from_pretrained(folder)
    for name, each in head_parameters(rounded.lm.model).items():
        assert each.dtype == torch.float32
        assert torch.equal(each, stored.get_parameter(name)), "not rounded with the body"
    texts = [each["text"] for each in FEELINGS[:5]]
    ours = logits(first.lm, tokens_of(first.tokenizer, [Row(text, "good") for text in texts]))
    for said, mine in zip(told_by_pipeline(folder, texts), ours.tolist(), strict=True):
        assert [said["bad"], said["good"]] == pytest.approx(mine, abs=2e-6)
    near = logits(rounded.lm, tokens_of(first.tokenizer, [Row(text, "good") for text in texts]))
    torch.testing.assert_close(near, ours, rtol=0, atol=0.1)


@ENCODERS
def test_fewer_digits_say_about_the_same_and_checkpointed_layers_learn_the_same(name, tmp_path):
    folder, grads = tiny_encoders.saved(tmp_path, name), []
    for saving in (False, True):
        lm = load_whole(ModelSource(path=folder, gradient_checkpointing=saving)).lm
        lm.logits(Sequences.of(given(lm))).square().sum().backward()
        grads.append(torch.cat([each.grad.flatten() for each in lm.model.parameters() if each.grad is not None]))
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 1e-6
    exact = logits(lm, given(lm))
    for dtype in ("mixed", "bfloat16"):
        near = logits(load_whole(ModelSource(path=folder, dtype=dtype)).lm, given(lm))
        assert near.dtype == torch.float32
        assert 0 < float((near - exact).abs().max()) < 0.15


def test_an_encoder_that_says_something_else_of_padded_texts_is_refused(monkeypatch, tmp_path):
    folder = tiny_encoders.saved(tmp_path, "bert")
    whole = BertForSequenceClassification.forward
    monkeypatch.setattr(BertForSequenceClassification, "forward", lambda self, attention_mask=None, **rest: whole(self, **rest))
    with pytest.raises(ModelError, match="does something to its logits that posttrain does not know"):
        load_whole(folder)


def test_a_classifier_of_other_labels_is_refused_and_begins_anew_where_that_is_asked_for(bert, tmp_path):
    folder = trained(tmp_path / "two", bert)
    three = [{"text": text, "label": label} for text, label in (("red", "x"), ("blue", "y"), ("cat", "z"))]
    with pytest.raises(ModelError, match=r"its head gives 2 numbers \(single: bad, good\), and the data ask for 3 .*objective.new_head: true"):
        trained(tmp_path / "refused", folder, three)
    with pytest.raises(ModelError, match=r"set objective\.labels to the model's, in their order, or begin"):
        trained(tmp_path / "refused", folder, objective={"kind": "classify", "labels": ["good", "bad"]})
    new = trained(tmp_path / "three", folder, three, objective={"kind": "classify", "new_head": True})
    assert load_classifier(new).classes.labels == ("x", "y", "z")
    trained(tmp_path / "on", folder, objective={"kind": "classify", "labels": ["bad", "good"]})


# ---- tuners on encoders and decoders


CASES = {
    "lora": {"rank": 3}, "ia3": {}, "adapter": {"size": 4, "deviation": 0.05}, "bitfit": {}, "head": {}, "layers": {"last": 1},
    "prompt": {"tokens": 3}, "p_tuning": {"tokens": 3, "at": [0, 2], "hidden": 8},
}  # fmt: skip
HOSTS = [("bert", kind) for kind in CASES] + [("distilbert", "lora"), ("roberta", "lora"), ("roberta", "prompt"), ("modernbert", "adapter")]


def given(lm):
    """Some texts with [CLS] in front and a separator behind."""
    return [([2, *row[:20], 3], [False] * (len(row[:20]) + 2)) for row in Sequences.of(rows()).rows()]


@pytest.mark.parametrize(("name", "kind"), [*HOSTS, ("llama", "lora"), ("llama", "prompt"), ("llama", "bitfit")])
def test_an_adapter_folder_makes_the_same_classifier_again_and_peft_agrees(name, kind, tmp_path):
    below, folder = tmp_path / "below", tmp_path / "adapter"
    if name == "llama":
        transformer(name, vocab_size=97).save_pretrained(below)
        tiny_encoders.tokenizer("bert").save_pretrained(below)
    else:
        tiny_encoders.saved(below, name, classes=None, auto=AutoModelForMaskedLM)
    loaded = load_classifier(str(below), new_head(0, 0.2), THREE)
    settings = CASES[kind] | ({"add": True} if (name, kind) == ("llama", "bitfit") else {})
    tuner = Tuner.lookup(kind)(**settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuner.install(loaded.lm.model)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        for each in head_parameters(loaded.lm.model).values():
            each.requires_grad_(True)
        for each in tuned(loaded.lm.model).values():
            each.add_(0.1 * torch.randn(each.shape, generator=draw))
    before, after = logits(load_classifier(str(below), nn.init.zeros_, THREE).lm, given(loaded.lm)), logits(loaded.lm, given(loaded.lm))
    assert float((after - before).abs().mean()) > 0.05
    save_adapter(tuner, loaded.lm.model, folder, ModelSource(path=str(below)))
    again = load_classifier(str(folder))
    assert again.classes == THREE
    torch.testing.assert_close(logits(again.lm, given(again.lm)), after, rtol=0, atol=2e-5 if tuner.merges else 0)
    read_by_peft = (folder / "adapter_config.json").is_file()
    assert read_by_peft == (kind in {"lora", "ia3"} or (name, kind) == ("llama", "prompt"))
    if read_by_peft:
        theirs = AutoModelForSequenceClassification.from_pretrained(below, **in_config(THREE))
        theirs = PeftModel.from_pretrained(theirs, str(folder)).eval()
        for sequence, mine in zip(given(again.lm), after, strict=True):
            ids = torch.tensor([sequence[0]])
            kinds = {"token_type_ids": segments(ids, 3)} if name == "bert" else {}
            with torch.no_grad():
                torch.testing.assert_close(theirs(input_ids=ids, **kinds).logits[0], mine, rtol=0, atol=2e-5)


@cache
def adapted(kind):
    lm = tiny_encoders.make("bert")
    Tuner.lookup(kind)(**CASES[kind]).install(lm.model)
    return lm


def test_tuners_find_their_places_in_bert():
    blocks = [f"bert.encoder.layer.{number}." for number in range(2)]
    scaled = {f"{block}{part}" for block in blocks for part in ("attention.self.key", "attention.self.value", "output.dense")}
    assert set(layers_of(adapted("ia3").model)) == scaled, "and no query, and not the attention's own output"
    hosts = {f"{block}{part}" for block in blocks for part in ("attention.output.dense", "output.dense")}
    assert set(bottlenecks(adapted("adapter").model)) == hosts
    assert not any(path.startswith(("classifier", "pre_classifier")) for path in layers_of(adapted("lora").model))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(BertConfig(num_labels=3))
    Tuner.lookup("bitfit")().install(model)
    assert sum(each.numel() for name, each in tuned(model).items() if name not in head_parameters(model)) == 102_912
    assert set(head_parts(model)) == {"classifier"}


def test_an_adapter_of_bert_stands_before_the_residual_sum():
    """LayerNorm(x + A(attention)), the layer's output written out (arXiv 1902.00751)."""
    lm = adapted("adapter")
    block = lm.model.bert.encoder.layer[0].attention.output
    states, entered = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    adapter = bottlenecks(lm.model)["bert.encoder.layer.0.attention.output.dense"]
    plain = states @ block.dense.weight.T + block.dense.bias
    inner = nn.functional.gelu(plain @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(block(states, entered), block.LayerNorm(entered + plain + inner), rtol=1e-5, atol=1e-5)
    assert float(inner.detach().abs().max()) > 1e-3


@ENCODERS
@pytest.mark.parametrize("kind", ["prompt", "p_tuning"])
def test_soft_tokens_stand_behind_the_first_token_which_the_head_goes_on_reading(name, kind):
    """With the vectors of real words, the result is that of the words in their place."""
    lm = tiny_encoders.make(name)
    words = [7, 30, 12]
    Tuner.lookup(kind)(tokens=3).install(lm.model)
    lm.model.soft_tokens[0].encoder = nn.Embedding.from_pretrained(lm.model.get_input_embeddings().weight[words].detach())
    texts = [[2, 9, 22, 41, 3], [2, 60, 3]]
    found = logits(lm, [(row, [False] * len(row)) for row in texts])
    lm.model.soft_tokens[0].active = False
    expected = logits(lm, [([2, *words, *row[1:]], [False] * (len(row) + 3)) for row in texts])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert lm.context == (63 if name == "roberta" else 64)


def test_a_classifier_goes_on_from_an_adapter_and_its_labels_are_known(bert, tmp_path):
    first = trained(tmp_path / "one", bert, tuner={"kind": "prompt", "tokens": 3}, optim={"learning_rate": 0.1, "warmup": 0.0})
    second = trained(tmp_path / "two", first, tuner={"kind": "lora", "rank": 2})
    assert load_classifier(second).classes.labels == ("bad", "good")
    assert "adapter_model.safetensors" in {each.name for each in second.iterdir()}
    lm = load_classifier(second).lm
    assert len(lm.model.soft_tokens) == 1
    with pytest.raises(ModelError, match=r"its head gives 2 numbers"):
        load_classifier(second, new_head(0), THREE)
    assert load_classifier(second, new_head(0), THREE, True).classes == THREE


# ---- figures


def told(labels, logits_):
    return [Told(tuple(map(float, label)), tuple(map(float, each))) for label, each in zip(labels, logits_, strict=True)]


def binary(tp, tn, fp, fn):
    right = [(1,)] * tp + [(0,)] * tn + [(0,)] * fp + [(1,)] * fn
    said = [(0, 1)] * tp + [(1, 0)] * tn + [(0, 1)] * fp + [(1, 0)] * fn
    return told(right, said)


def test_figures_of_two_classes_are_those_worked_by_hand():
    figures = class_figures(Classes("single", ("no", "yes")), binary(6, 3, 1, 2))
    assert figures["matthews"].value == pytest.approx(16 / math.sqrt(1120), abs=1e-12)
    assert figures["matthews"].value == pytest.approx(0.4780914, abs=5e-8)
    assert figures["accuracy"].value == 0.75
    assert figures["f1"].value == pytest.approx(12 / 15)
    assert figures["f1_macro"].value == pytest.approx((12 / 15 + 6 / 9) / 2)
    assert figures["loss"].value == pytest.approx((9 * math.log(1 + math.exp(-1)) + 3 * math.log(1 + math.e)) / 12)
    assert next(iter(figures)) == "accuracy"
    assert figures["f1"].low < 0.8 < figures["f1"].high
    assert figures["f1"].count == 12


def test_figures_of_three_classes_and_of_several_labels_are_those_worked_by_hand():
    said = torch.eye(3)[[0, 0, 1, 2, 2, 1]].tolist()
    figures = class_figures(Classes("single", ("a", "b", "c")), told([(0,), (0,), (1,), (1,), (2,), (0,)], said))
    assert figures["accuracy"].value == pytest.approx(4 / 6)
    assert figures["f1_macro"].value == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert figures["matthews"].value == pytest.approx((4 * 6 - (3 * 2 + 2 * 2 + 1 * 2)) / math.sqrt((36 - 14) * (36 - 12)))
    assert "f1" not in figures
    target, logit = [(1, 0, 0), (1, 1, 0), (0, 0, 0)], [(2, -1, -1), (1, -2, 3), (-1, -1, -1)]
    several = class_figures(Classes("multi", ("a", "b", "c")), told(target, logit))
    assert several["accuracy"].value == pytest.approx(2 / 3)
    assert several["f1_micro"].value == pytest.approx(4 / 6)
    assert several["f1_macro"].value == pytest.approx((1 + 0 + 0) / 3)
    expected = nn.functional.binary_cross_entropy_with_logits(torch.tensor(logit).double(), torch.tensor(target).double())
    assert several["loss"].value == pytest.approx(float(expected))


def test_correlations_are_those_worked_by_hand():
    target, said = [(1,), (2,), (3,), (4,), (5,)], [(2,), (1,), (4,), (4,), (9,)]
    figures = class_figures(Classes("regression"), told(target, said))
    assert figures["pearson"].value == pytest.approx(17 / math.sqrt(10 * 38))
    assert ranks(torch.tensor([2.0, 1, 4, 4, 9]).numpy()).tolist() == [2, 1, 3.5, 3.5, 5]
    assert figures["spearman"].value == pytest.approx(8.5 / math.sqrt(10 * 9.5))
    assert figures["absolute_error"].value == pytest.approx((1 + 1 + 1 + 0 + 4) / 5)
    assert figures["loss"].value == pytest.approx(19 / 5)
    r = figures["pearson"]
    assert r.high == pytest.approx(math.tanh(math.atanh(r.value) + 1.959963984540054 / math.sqrt(2)))
    assert math.isnan(related(torch.ones(4).numpy(), torch.arange(4).numpy()).value)


def test_nothing_said_and_nothing_there_counts_as_zero_and_never_as_nan():
    constant = class_figures(Classes("single", ("no", "yes")), binary(0, 5, 0, 0))
    assert (constant["f1"].value, constant["matthews"].value, constant["f1_macro"].value) == (0.0, 0.0, 1.0)
    assert all(math.isfinite(each.low) for each in constant.values())


def test_intervals_of_drawn_again_texts_hold_the_truth_about_as_often_as_they_promise():
    """Of 200 samples of 150 texts from a known table, the interval of Matthews' correlation holds the table's own."""
    import numpy as np

    table = np.array([0.45, 0.10, 0.15, 0.30])  # (right, said): 00, 01, 10, 11
    patterns = np.array([[1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]], dtype=bool)
    truth = float(matthews(table[None] * 1e6, patterns[:, :2].astype(float), patterns[:, 2:].astype(float))[0])
    drawn, held = np.random.default_rng(0), 0
    for _ in range(200):
        some = patterns[drawn.choice(4, size=150, p=table)]
        found = redrawn(matthews, some[:, :2], some[:, 2:])
        held += found.low <= truth <= found.high
    assert 0.9 * 200 <= held <= 0.99 * 200
    again = redrawn(f1_each_second, patterns[:, :2], patterns[:, 2:], seed=3)
    assert again == redrawn(f1_each_second, patterns[:, :2], patterns[:, 2:], seed=3)


def f1_each_second(*counts):
    return f1_each(*counts)[:, 1]


# ---- the whole pipeline


def test_a_classifier_is_trained_validated_evaluated_and_reported(bert, tmp_path):
    held = [*FEELINGS[:6], {"text": "the dog is red", "label": "bad"}]
    validation = {"data": inline(held), "best": "accuracy", "every": 2}
    stages = {
        "train": {"model": bert, "objective": "classify", "data": inline(FEELINGS), "steps": 6, "batch": {"rows": 8},
                  "optim": {"learning_rate": 0.01}, "validation": validation},
        "test": {"kind": "evaluate_classes", "model": {"stage": "train"}, "data": inline(held)},
    }  # fmt: skip
    done = run(Recipe.parse(json.dumps({"stages": stages}), name="tiny"), tmp_path)
    record = json.loads((done.folders["test"] / "done.json").read_text())
    assert list(record["metrics"]) == ["accuracy", "f1", "f1_macro", "matthews", "loss"]
    predictions = [json.loads(line) for line in (done.folders["test"] / "predictions.jsonl").read_text().splitlines()]
    assert [(each["where"], each["text"], each["label"]) for each in predictions][-1] == ("inline:7", "the dog is red", "bad")
    right = [each["predicted"] == each["label"] for each in predictions]
    assert record["metrics"]["accuracy"]["value"] == pytest.approx(sum(right) / 7)
    for each in predictions:
        assert sum(each["probabilities"].values()) == pytest.approx(1)
        assert max(each["probabilities"], key=each["probabilities"].get) == each["predicted"]
    best = json.loads((done.folders["train"] / "done.json").read_text())["best"]
    assert best["value"] == pytest.approx(sum(right) / 7)
    page = write_report(tmp_path / "tiny").read_text()
    assert f"On 7 texts, train labels {sum(right) / 7:.1%} (95% interval" in page
    assert "macro F1" in page


@pytest.mark.parametrize(("found", "figures"), [
    ([["a"], [], ["a", "b"], ["b"]], ["accuracy", "f1_micro", "f1_macro", "loss"]),
    ([0.5, 1.5, -1.0, 2.0], ["pearson", "spearman", "absolute_error", "loss"]),
])  # fmt: skip
def test_several_labels_and_numbers_go_the_same_way_on_a_decoder(found, figures, tmp_path):
    items = [{"text": text, "label": label} for text, label in zip(["It is", "What is 3 + 4?", "a cat", "24 shells"], found, strict=True)]
    folder = trained(tmp_path / "train", base(), items, tuner={"kind": "lora", "rank": 2})
    stage = {"kind": "evaluate_classes", "model": str(folder), "data": inline(items)}
    done = run(Recipe.parse(json.dumps({"stages": {"test": stage}}), name="tiny"), tmp_path)
    assert list(json.loads((done.folders["test"] / "done.json").read_text())["metrics"]) == figures
    (first, *_) = [json.loads(line) for line in (done.folders["test"] / "predictions.jsonl").read_text().splitlines()]
    assert first["label"] == found[0]
    assert isinstance(first["predicted"], list if isinstance(found[0], list) else float)
    other = {"kind": "evaluate_classes", "model": str(folder), "data": inline([{"text": "a", "label": ["z"]}])}
    recipe = Recipe.parse(json.dumps({"stages": {"test": other}}), name="other")
    with pytest.raises(DataError, match='inline:1: the label "z" is not among' if isinstance(found[0], list) else "inline:1: the label is"):
        run(recipe, tmp_path)
