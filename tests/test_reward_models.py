"""Reward models: what is learned from comparisons, labels and grades, where the score is read, and what transformers makes of it."""

import json
import math
import warnings

import pytest
import tiny_tokenizers
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors import safe_open
from tiny_models import transformer
from torch import tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain import api
from posttrain.batch import Labelled, Pairs, Ranked, Sequences, Stepped
from posttrain.data.dataset import Data
from posttrain.data.render import Template
from posttrain.errors import DataError, ModelError, RecipeError
from posttrain.models import layout
from posttrain.models.load import load_scalar, load_tokenizer
from posttrain.models.reward import normalise
from posttrain.models.scalar import ScalarLM
from posttrain.models.source import ModelSource
from posttrain.objectives import Objective
from posttrain.paths import resolve
from posttrain.text import Message
from posttrain.training.fit import Learner, Training, fit
from posttrain.training.optim import AdamW
from posttrain.training.record import Recorder
from posttrain.training.roles import new_head
from posttrain.training.session import Session, train
from posttrain.training.settings import Checkpoints, TrainSettings
from posttrain.training.updates import Item, Update

SUMS = [(a, b) for a in range(1, 5) for b in range(1, 4)]
COMPARED = [
    {
        "prompt": f"What is {a} + {b}?",
        "chosen": f"{a} + {b} = {a + b}",
        "rejected": f"{a} + {b} = {a + b + 1}" + " or so" * (a % 3),
    }
    for a, b in SUMS
]
LONELY = """\
{%- for message in messages %}{{ message.role }}
{{ message.content }}<|endoftext|>
{% endfor %}
{%- if add_generation_prompt %}assistant
{% endif %}"""


def tokenizer_of(kind):
    """One of tiny_tokenizers; `lonely` has a single control token, which ends every turn."""
    if kind != "lonely":
        return tiny_tokenizers.make(kind)
    tokenizer = tiny_tokenizers.make("no_template")
    tokenizer.chat_template = LONELY
    return tokenizer


def made(folder, kind="chatml", name="llama", dtype="float32", **changes):
    """The folder of a tiny random model with a tokenizer of that kind."""
    tokenizer = tokenizer_of(kind)
    model = transformer(name, dtype, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def words(model):
    """The tokenizer of a model."""
    return load_tokenizer(ModelSource(path=str(model)))


def inline(rows, **more):
    return {"sources": {"kind": "inline", "items": rows}, **more}


def settings_of(model, objective="bradley_terry", rows=COMPARED, **changes):
    plan = {"data": inline(rows), "steps": 2, "batch": {"rows": 4}, "optim": {"learning_rate": 0.01, "warmup": 0.0}}
    return TrainSettings.model_validate({"model": model, "objective": objective, **plan, **changes})


def trained(folder, model="posttrain:tiny-base", objective="bradley_terry", rows=COMPARED, seed=0, **changes):
    """The folder of a stage that was trained and left."""
    train(settings_of(model, objective, rows, **changes), Session(folder, "owner", seed))
    return folder


def sequences(rows):
    return Sequences.of([(row, [False] * len(row)) for row in rows])


def answers(template, side="chosen"):
    """The token sequences of one side of COMPARED."""
    plan = Data.model_validate(inline(COMPARED))
    rows = plan.render(plan.read(), template).rows[0]
    return [row.sequences[side == "rejected"][0] for row in rows]


def scores(lm, rows):
    with torch.no_grad():
        return lm.scores(sequences(rows))


def plain_scores(model, tokenizer, rows, side):
    """What transformers says of token sequences in one padded batch, with the shift that the config holds."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return model.eval()(**batch).logits[:, 0] + model.config.reward_shift


# ---- the folder that is left


TOKENIZERS = {
    "posttrain:tiny-base": "pad is eos",
    "qwen": "a pad of its own",
    "pad_is_eos": "pad is the end of a turn",
    "lonely": "no spare token",
}


@pytest.mark.parametrize("kind", TOKENIZERS, ids=lambda kind: TOKENIZERS[kind].replace(" ", "-"))
def test_transformers_gives_our_score_alone_and_padded_on_either_side(kind, tmp_path):
    start = kind if kind.startswith("posttrain:") else made(tmp_path / "start", kind)
    folder = trained(tmp_path / "run", start, normalise={}) / "model"
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    template = Template(tokenizer)
    rows = answers(template) + answers(template, "rejected")
    assert len({len(row) for row in rows}) > 2
    assert all(row[-1] == template.end_id for row in rows)
    ours = scores(load_scalar(folder).lm, rows)
    assert float(ours.std()) > 0.05
    assert abs(model.config.reward_shift) > 1e-3
    for side in ("left", "right"):
        torch.testing.assert_close(plain_scores(model, tokenizer, rows, side), ours, rtol=0, atol=1e-5)
    alone = torch.cat([plain_scores(model, tokenizer, [row], "right") for row in rows])
    torch.testing.assert_close(alone, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "pad"),
    [
        ("qwen", "<|endoftext|>"),
        ("pad_is_eos", "<|im_start|>"),
        ("llama3", "<|begin|>"),
        ("no_eos", "<|im_start|>"),
        ("lonely", "<|pad|>"),
    ],
)
def test_the_pad_of_a_reward_model_is_a_token_that_ends_no_text(kind, pad, tmp_path):
    start = made(tmp_path / "start", kind)
    folder = trained(tmp_path / "run", start, steps=1) / "model"
    before, tokenizer = words(start), AutoTokenizer.from_pretrained(folder)
    template, config = Template(tokenizer), json.loads((folder / "config.json").read_text())
    assert tokenizer.pad_token == pad
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["pad_token_id"] not in template.stop_ids
    assert config["pad_token_id"] not in {row[-1] for row in answers(template)}
    assert config["vocab_size"] == len(tokenizer) == len(before) + (pad == "<|pad|>")
    assert before.get_vocab().items() <= tokenizer.get_vocab().items()
    assert before("What is 3 + 4?")["input_ids"] == tokenizer("What is 3 + 4?")["input_ids"]


def test_a_model_with_a_new_pad_is_the_same_file_whatever_was_drawn_before(tmp_path):
    start, found = made(tmp_path / "start", "lonely"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append((trained(tmp_path / str(seed), start, steps=1) / "model" / "model.safetensors").read_bytes())
    assert found[0] == found[1]


def test_the_saved_model_is_the_one_that_was_validated_last(tmp_path):
    folder = trained(tmp_path, validation={"data": inline(COMPARED), "every": 2}, steps=3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = lines[-1]["validation"]
    loaded = load_scalar(folder / "model")
    chosen, rejected = (scores(loaded.lm, answers(Template(loaded.tokenizer), side)) for side in ("chosen", "rejected"))
    assert found["chosen_score"] == pytest.approx(float(chosen.mean()), abs=1e-5)
    assert found["gap"] == pytest.approx(float((chosen - rejected).mean()), abs=1e-5)
    assert found["accuracy"] == float((chosen > rejected).double().mean())
    assert found["loss"] == pytest.approx(-float(logsigmoid(chosen - rejected).mean()), abs=1e-5)


def test_the_python_api_trains_a_reward_model_that_learns_its_comparisons(tmp_path):
    folder = api.train(
        tmp_path, model="posttrain:tiny-base", objective="bradley_terry", data=inline(COMPARED), steps=12,
        optim={"learning_rate": 1e-3, "schedule": "constant"}, batch={"rows": 12},
    )  # fmt: skip
    loaded = load_scalar(folder)
    chosen, rejected = (scores(loaded.lm, answers(Template(loaded.tokenizer), side)) for side in ("chosen", "rejected"))
    assert bool((chosen > rejected).all())


# ---- normalisation


@pytest.mark.parametrize("named", [False, True], ids=["the-chosen-answers", "named-answers"])
def test_normalised_scores_have_mean_0_and_deviation_1_on_the_reference_answers_and_the_old_order(named, tmp_path):
    other = [{"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": "yes" * b}]} for a, b in SUMS]
    section = {"unit_variance": True} | ({"data": inline(other)} if named else {})
    plain = load_scalar(trained(tmp_path / "plain") / "model")
    folder = trained(tmp_path / "normal", normalise=section) / "model"
    loaded, template = load_scalar(folder), Template(plain.tokenizer)
    rows = answers(template)
    if named:
        turns = [[Message("user", f"{a}?"), Message("assistant", "yes" * b)] for a, b in SUMS]
        rows = [
            [*template.prompt(turn[:1]), *template.tokenizer(turn[1].content)["input_ids"], template.end_id] for turn in turns
        ]
    raw, found = scores(plain.lm, rows).double(), scores(loaded.lm, rows).double()
    gain = 1 / float(raw.std(correction=0))
    rounding = 1e-6 * max(1.0, abs(float(raw.mean())) * gain)  # of the size that the shift takes away
    assert float(found.mean()) == pytest.approx(0, abs=rounding)
    assert float(found.std(correction=0)) == pytest.approx(1, abs=rounding)
    assert abs(gain - 1) > 0.1
    torch.testing.assert_close(found, (raw - raw.mean()) * gain, rtol=0, atol=1e-5)
    for side in ("chosen", "rejected"):
        some = answers(template, side)
        assert scores(plain.lm, some).argsort().tolist() == scores(loaded.lm, some).argsort().tolist()
    torch.testing.assert_close(loaded.lm.head.weight, plain.lm.head.weight * gain, rtol=1e-5, atol=1e-7)
    shift = json.loads((folder / "config.json").read_text())["reward_shift"]
    assert shift == loaded.lm.shift == pytest.approx(-float(raw.mean()) * gain, abs=1e-5)
    assert torch.equal(loaded.lm.model.model.embed_tokens.weight, plain.lm.model.model.embed_tokens.weight)


def test_normalising_again_or_by_the_mean_alone_changes_only_what_it_says(tmp_path):
    lm = load_scalar(trained(tmp_path, normalise={"unit_variance": True}) / "model").lm
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 2000, (size,), generator=draw).tolist() for size in (4, 9, 17, 5, 12)]
    before, weight = scores(lm, rows).double(), lm.head.weight.detach().clone()
    said = normalise(lm, sequences(rows), unit_variance=False, micro_tokens=20)
    assert torch.equal(lm.head.weight, weight)
    mean, deviation = (pytest.approx(float(each), rel=1e-5) for each in (before.mean(), before.std(correction=0)))
    assert said == {"mean": mean, "deviation": deviation, "answers": 5}
    torch.testing.assert_close(scores(lm, rows).double(), before - before.mean(), rtol=0, atol=1e-5)  # they are about 11
    normalise(lm, sequences(rows), unit_variance=True, micro_tokens=20)
    found = scores(lm, rows).double()
    assert (float(found.mean()), float(found.std(correction=0))) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    normalise(lm, sequences(rows[:1]), unit_variance=True, micro_tokens=20)  # one answer has no deviation: a shift alone
    assert float(scores(lm, rows[:1])) == pytest.approx(0, abs=1e-6)
    assert float(scores(lm, rows).double().std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_a_normalised_model_that_is_trained_on_keeps_its_shift(tmp_path):
    first = trained(tmp_path / "first", normalise={}) / "model"
    second = trained(tmp_path / "second", str(first), steps=1, optim={"learning_rate": 1e-30}) / "model"
    one, two = load_scalar(first), load_scalar(second)
    rows = answers(Template(one.tokenizer))
    assert one.lm.shift == two.lm.shift != 0
    assert torch.equal(scores(one.lm, rows), scores(two.lm, rows))


# ---- where the score is read


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "phi", "gpt_neox"])
def test_the_score_is_that_of_the_last_token_in_every_layout(name, tmp_path):
    """Also of sequences that end with the pad, and of one that is the beginning of another."""
    folder = made(tmp_path, "pad_is_eos", name)
    lm = load_scalar(folder, new_head(0)).lm
    assert lm.layout == "tree"
    draw, end = torch.Generator().manual_seed(0), words(folder).eos_token_id
    stem = torch.randint(0, 300, (20,), generator=draw).tolist()
    rows = [
        [*stem, 5, end],
        [*stem, 5, end, end],
        [*stem, 7, 9, 11],
        stem,
        [3],
        [end, end],
        torch.randint(0, 300, (31,), generator=draw).tolist(),
    ]
    with torch.no_grad():
        alone = torch.stack(
            [lm.head(lm.backbone(input_ids=tensor([row]), use_cache=False).last_hidden_state[0, -1])[0] for row in rows]
        )
    padded = ScalarLM(lm.model, "padded")
    assert float(alone.diff().abs().min()) > 1e-3
    torch.testing.assert_close(scores(lm, rows), alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores(padded, rows), alone, rtol=0, atol=1e-5)
    with torch.no_grad():
        sides = lm.scores(sequences(rows[:3]), sequences(rows[3:]))
        torch.testing.assert_close(torch.cat(sides), alone, rtol=0, atol=1e-5)
        torch.testing.assert_close(lm.scores_of_many(sequences(rows), 25), alone, rtol=0, atol=1e-5)


def test_a_value_is_the_score_of_what_stood_before_a_token_and_a_step_score_of_what_stood_up_to_it(tmp_path):
    lm = load_scalar(made(tmp_path), new_head(0)).lm
    row = torch.randint(0, 300, (12,), generator=torch.Generator().manual_seed(1)).tolist()
    marks = [False, True, False, False, True, True, False, False, False, False, False, True]
    places = [place for place, mark in enumerate(marks) if mark]
    seqs = Sequences.of([(row, marks), ([4, 5, 6], [False] * 3)])
    for layout_name in ("tree", "padded"):
        view = ScalarLM(lm.model, layout_name)
        with torch.no_grad():
            before, upto = view.values(seqs), view.step_scores(seqs)
        torch.testing.assert_close(before, scores(lm, [row[:place] for place in places]), rtol=0, atol=1e-5)
        torch.testing.assert_close(upto, scores(lm, [row[: place + 1] for place in places]), rtol=0, atol=1e-5)


STEPS = Data.model_validate({"sources": {"kind": "file", "path": "posttrain:data/arith_steps.jsonl.gz", "rows": "0:40"}})


def test_a_process_rewards_steps_end_at_their_line_breaks_and_the_last_at_the_end_of_the_turn():
    template = Template(words("posttrain:tiny-base"))
    loaded = STEPS.read()
    rendered = STEPS.render(loaded, template).rows[0]
    assert len(rendered) == 40
    batch = Stepped.from_rows(rendered)
    assert batch.seqs.trained == sum(len(row.steps) for row in loaded.rows[0])
    assert batch.right.tolist() == [label for row in loaded.rows[0] for label in row.right]
    for row, (tokens, ends) in zip(loaded.rows[0], (each.sequences[0] for each in rendered), strict=True):
        places = [place for place, end in enumerate(ends) if end]
        told = ["\n".join(row.steps[: count + 1]) for count in range(len(row.steps))]
        expected = [*(text + "\n" for text in told[:-1]), told[-1] + "<|end_of_turn|>"]
        opening = template.decode(template.prompt(row.prompt))
        assert [template.decode(tokens[: place + 1]) for place in places] == [opening + text for text in expected]
        assert places[-1] == len(tokens) - 1


def test_a_process_reward_is_read_at_the_ends_of_steps_and_is_a_mean_over_steps():
    lm = load_scalar("posttrain:tiny-base", new_head(0)).lm
    batch = Stepped.from_rows(STEPS.render(STEPS.read(), Template(words("posttrain:tiny-base"))).rows[0][:5])
    objective = Objective.lookup("process_reward")()
    assert objective.units(batch) == {"step": batch.seqs.trained}
    loss = objective.loss(lm, batch)
    places = layout.at_trained(batch.seqs)
    begun = [row[: place + 1] for row, ends in zip(batch.seqs.rows(), places, strict=True) for place in ends]
    read = scores(lm, begun).double()
    right = batch.right.double()
    expected = -(right * logsigmoid(read) + (1 - right) * logsigmoid(-read)).sum()
    assert float(loss.terms["step"].detach()) == pytest.approx(float(expected), rel=1e-5)
    assert loss.stats["accuracy"] == (float(((read > 0) == (right > 0.5)).sum()), len(begun))


# ---- the head


@pytest.mark.parametrize("width", [48, 4096])
def test_a_new_head_has_deviation_one_over_the_root_of_d_plus_1_and_is_addressed_by_the_seed(width):
    heads = []
    for seed in (0, 0, 1):
        weight = torch.empty(1, width)
        new_head(seed)(weight)
        heads.append(weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) * math.sqrt(width + 1) == pytest.approx(1, abs=3 / math.sqrt(2 * width))
    assert float(heads[0].mean()) * math.sqrt(width + 1) == pytest.approx(0, abs=4 / math.sqrt(width))


def test_a_recipes_seed_decides_the_head_and_nothing_else_does(tmp_path):
    still = {"steps": 1, "optim": {"learning_rate": 1e-30}}
    start = made(tmp_path / "start")
    found = []
    for place, (seed, tuner) in enumerate([(0, "full"), (0, "lora"), (3, "full")]):
        torch.manual_seed(place)
        found.append(load_scalar(trained(tmp_path / str(place), start, seed=seed, tuner=tuner, **still) / "model").lm.head.weight)
    expected = torch.empty(1, 32)
    new_head(0)(expected)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    assert not torch.equal(found[2], expected)


def test_the_head_of_a_bfloat16_model_is_float32_in_training_in_the_file_and_loaded_again(tmp_path):
    start = {"path": made(tmp_path / "start"), "dtype": "bfloat16"}
    fresh = load_scalar(ModelSource(**start), new_head(0)).lm
    assert {fresh.head.weight.dtype, fresh.model.model.embed_tokens.weight.dtype} == {torch.float32, torch.bfloat16}
    rows = [[5, 6, 7], [8, 9, 10, 11]]
    states = [fresh.backbone(input_ids=tensor([row]), use_cache=False).last_hidden_state[0, -1] for row in rows]
    exact = torch.stack([state.double() @ fresh.head.weight[0].double() for state in states])
    torch.testing.assert_close(scores(ScalarLM(fresh.model, "padded"), [rows[0]]).double(), exact[:1], rtol=0, atol=1e-5)
    folder = trained(tmp_path / "run", start, tuner="lora") / "model"
    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {name for name, kind in kinds.items() if kind == "F32"} == {"score.weight"}
    assert not torch.equal(load_scalar(folder).lm.head.weight, fresh.head.weight), "it was trained"
    again = load_scalar(ModelSource(path=str(folder), dtype="bfloat16")).lm
    assert again.head.weight.dtype == torch.float32


def test_a_pad_among_the_tokens_of_the_check_does_not_refuse_a_good_reward_model(tmp_path):
    """The check reads tokens 3 to 10; transformers passes over pads at the end."""
    folder = trained(tmp_path / "run", made(tmp_path / "start"), steps=1) / "model"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 10}))
    assert load_scalar(folder).lm.shift == 0


@pytest.mark.parametrize("start", ["posttrain:tiny-base", "lonely"])
def test_under_lora_the_head_is_trained_and_peft_loads_the_adapter_with_the_same_score(start, tmp_path):
    start = start if start.startswith("posttrain:") else made(tmp_path / "start", start)
    folder = trained(tmp_path / "run", start, tuner={"kind": "lora", "rank": 4})
    expected, head = load_scalar(folder / "model"), torch.empty(1, load_scalar(start, new_head(0)).lm.head.weight.shape[1])
    new_head(0)(head)
    assert float((expected.lm.head.weight.detach() - head).abs().max()) > 1e-3, "the head moved"
    torch.manual_seed(99)  # the base has no head: whatever transformers makes up must not matter
    base = AutoModelForSequenceClassification.from_pretrained(resolve(start), num_labels=1)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    rows = answers(Template(words(start)))
    with torch.no_grad():
        theirs = torch.stack([adapted(input_ids=tensor([row])).logits[0, 0] for row in rows])
    torch.testing.assert_close(theirs, scores(expected.lm, rows), rtol=0, atol=1e-5)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118
    assert not [name for name in names if "score" in name and name != "score.weight"], "no LoRA on the head"


# ---- what is learned


class Fixed:
    """The same update again and again."""

    def __init__(self, objective, batch):
        self.update = Update((Item(objective, batch, [""] * batch.count),))

    def __next__(self):
        return self.update

    def state(self):
        return {}, {}


def test_a_linear_reward_over_frozen_random_features_is_recovered_from_comparisons(tmp_path):
    """200 pairs, each compared by 1000 raters who follow Bradley and Terry; the direction is found to cos > 0.99."""
    lm = load_scalar(made(tmp_path, num_hidden_layers=1), new_head(0)).lm
    lm.requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    sides = [sequences(torch.randint(0, 300, (200, 4), generator=draw).tolist()) for _ in range(2)]
    with torch.no_grad():
        features = lm.states_at(layout.at_last, sides)
        apart = (features[0] - features[1]).double()
        truth = torch.randn(32, generator=draw, dtype=torch.float64)
        truth *= 1.5 / float((apart @ truth).std())
        votes = torch.rand(1000, 200, generator=draw, dtype=torch.float64) < (apart @ truth).sigmoid()
    batch = Pairs(*sides, prefer=votes.float().mean(0), margin=torch.zeros(200))
    lm.head.requires_grad_(True)
    before = float(torch.cosine_similarity(lm.head.weight[0].double(), truth, dim=0))
    learner = Learner.of({"score.weight": lm.head.weight}, AdamW(learning_rate=0.2, schedule="linear", warmup=0.0, clip=None))
    run = Training(lm, {"policy": learner}, Fixed(Objective.lookup("bradley_terry")(), batch), steps=60, micro_tokens=10**6)
    fit(run, Recorder(tmp_path, "owner", Checkpoints(every=1000)))
    found = lm.head.weight.detach()[0].double()
    assert abs(before) < 0.5
    assert float(torch.cosine_similarity(found, truth, dim=0)) > 0.99
    assert float(found.norm() / truth.norm()) == pytest.approx(1, abs=0.1), "and its size: the probabilities are calibrated"


class Says:
    """A model that gives the scores that it was told, in order."""

    device = torch.device("cpu")

    def __init__(self, *told):
        self.told = [torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in told]

    def scores(self, *seqs):
        assert [each.count for each in seqs] == [len(each) for each in self.told]
        return self.told[0] if len(seqs) == 1 else tuple(self.told)

    def step_scores(self, seqs):
        assert seqs.trained == len(self.told[0])
        return self.told[0]


def nothing(count, trained=0):
    return Sequences.of([([1, 2, 3], [False, False, bool(trained)])] * count)


def value(objective, told, batch, term):
    """One term as the loop takes it, divided by its units; and its gradient for each score."""
    lm = Says(*told)
    loss = objective.loss(lm, batch)
    total = loss.terms[term] / objective.units(batch)[term]
    return float(total.detach()), torch.autograd.grad(total, lm.told), loss


def compared(prefer, margin=None):
    count = len(prefer)
    return Pairs(nothing(count), nothing(count), tensor(prefer), tensor(margin or [0.0] * count))


def test_bradley_terry_has_its_printed_values():
    plain, centred = (Objective.lookup("bradley_terry")(centring=weight) for weight in (0.0, 0.01))
    assert value(plain, ([1.5], [0.5]), compared([1.0]), "ranking")[0] == pytest.approx(0.3132617, abs=1e-7)
    assert value(plain, ([1.5], [0.5]), compared([1.0], [0.5]), "ranking")[0] == pytest.approx(0.4740770, abs=1e-7)
    assert value(plain, ([0.9], [0.5]), compared([0.7]), "ranking")[0] == pytest.approx(0.6330153, abs=1e-7)
    assert value(centred, ([2.0], [1.0]), compared([1.0]), "centring")[0] == pytest.approx(0.09, abs=1e-12)
    assert plain.units(compared([1.0])) == {"ranking": 1}
    _, _, loss = value(plain, ([2.0, 1.0, 0.0], [1.0, 1.0, 3.0]), compared([1.0, 0.9, 0.2]), "ranking")
    assert loss.stats["accuracy"] == (2.5, 3)
    assert loss.stats["gap"] == (-2.0, 3)


def test_a_pair_may_be_swapped_with_its_label_and_the_scores_of_a_prompt_shifted():
    objective = Objective.lookup("bradley_terry")()
    one, other, prefer = [0.3, -1.0, 2.0], [0.8, 0.1, 1.0], [1.0, 0.25, 0.9]
    here, slopes, _ = value(objective, (one, other), compared(prefer), "ranking")
    there, swapped, _ = value(objective, (other, one), compared([1 - p for p in prefer]), "ranking")
    assert here == pytest.approx(there, rel=1e-6)
    torch.testing.assert_close(slopes, swapped[::-1], rtol=1e-6, atol=1e-8)
    shift = [5.0, -3.0, 0.5]
    moved = [[score + each for score, each in zip(side, shift, strict=True)] for side in (one, other)]
    assert value(objective, moved, compared(prefer), "ranking")[0] == pytest.approx(here, rel=1e-9)
    pinned = Objective.lookup("bradley_terry")(centring=0.01)
    still, after = (value(pinned, sides, compared(prefer), "centring")[0] for sides in ((one, other), moved))
    assert after == pytest.approx(0.01 * sum((a + b) ** 2 for a, b in zip(*moved, strict=True)) / 3)
    assert after > still + 0.1


RANKED = Ranked(nothing(9), sizes=tensor([4, 2, 3]), score=tensor([3.0, 1.0, 2.0, 2.0, 0.0, 7.0, 1.0, 1.0, 5.0]))
TOLD = [0.4, -0.3, 1.1, 0.2, 0.9, -0.6, 0.5, -2.0, 0.1]
GROUPS = [range(4), range(4, 6), range(6, 9)]


def test_all_comparisons_of_a_prompt_are_one_unit_and_the_loss_is_their_mean():
    objective = Objective.lookup("ranking_reward")()
    per_prompt, right, count = [], 0, 0
    for group in GROUPS:
        better = [(a, b) for a in group for b in group if RANKED.score[a] > RANKED.score[b]]
        per_prompt.append(sum(math.log1p(math.exp(TOLD[b] - TOLD[a])) for a, b in better) / len(better))
        right += sum(TOLD[a] > TOLD[b] for a, b in better)
        count += len(better)
    assert count == 5 + 1 + 2, "of four answers two are equal, of three too"
    found, slopes, loss = value(objective, (TOLD,), RANKED, "ranking")
    assert objective.units(RANKED) == {"ranking": 3}
    assert found == pytest.approx(sum(per_prompt) / 3, rel=1e-9)
    assert loss.stats["accuracy"] == (right, count)
    for group in GROUPS:
        assert float(slopes[0][list(group)].sum()) == pytest.approx(0, abs=1e-12), "a prompt's scores may be shifted"
    one = Ranked(nothing(2), tensor([2]), tensor([1.0, 0.0]))
    assert value(objective, ([1.0, 0.0],), one, "ranking")[0] == pytest.approx(0.3132617, abs=1e-7)


def test_the_choice_of_the_best_is_the_cross_entropy_of_a_softmax_over_the_answers():
    objective = Objective.lookup("best_of_k")()
    four = Ranked(nothing(4), tensor([4]), tensor([9.0, 1.0, 2.0, 2.0]))
    assert value(objective, ([1.0, 0.0, 0.0, 0.0],), four, "choice")[0] == pytest.approx(0.7436684, abs=1e-7)
    best = [0, 5, 8]
    expected = [math.log(sum(math.exp(TOLD[i]) for i in group)) - TOLD[top] for group, top in zip(GROUPS, best, strict=True)]
    found, slopes, loss = value(objective, (TOLD,), RANKED, "choice")
    assert found == pytest.approx(sum(expected) / 3, rel=1e-9)
    assert loss.stats["accuracy"] == (0, 3)
    for group in GROUPS:
        assert float(slopes[0][list(group)].sum()) == pytest.approx(0, abs=1e-12)


def test_regression_is_a_mean_over_answers_and_labels_are_log_odds():
    found, _, loss = value(Objective.lookup("score_regression")(), (TOLD,), RANKED, "error")
    assert found == pytest.approx(sum((said - float(true)) ** 2 for said, true in zip(TOLD, RANKED.score, strict=True)) / 9)
    assert float(loss.stats["absolute_error"][0]) == pytest.approx(
        sum(abs(s - float(t)) for s, t in zip(TOLD, RANKED.score, strict=True))
    )
    batch = Labelled(nothing(3), tensor([True, False, True]))
    found, _, loss = value(Objective.lookup("labelled_reward")(), ([0.4, 0.4, -1.0],), batch, "label")
    expected = [math.log1p(math.exp(-0.4)), math.log1p(math.exp(0.4)), math.log1p(math.exp(1.0))]
    assert found == pytest.approx(sum(expected) / 3)
    assert loss.stats["accuracy"] == (1, 3)
    steps = Stepped(nothing(2, trained=1), tensor([0.7, 0.0]))
    found, _, _ = value(Objective.lookup("process_reward")(), ([0.4, 1.0],), steps, "step")
    assert found == pytest.approx((0.6330153 + math.log1p(math.e)) / 2, abs=1e-7)


KINDS = {
    "ranking_reward": [
        {"prompt": f"{a}?", "completions": [f"{a}", f"{b}", "no"], "scores": [2, 1, b % 2]} for a, b in SUMS
    ],
    "best_of_k": [{"prompt": f"{a}?", "completions": [f"{a}", f"{b} or so"], "best": 1} for a, b in SUMS],
    "score_regression": [{"prompt": f"{a}?", "completion": f"{b}", "score": a - b} for a, b in SUMS],
    "labelled_reward": [{"prompt": f"{a}?", "completion": f"{b}", "label": a > b} for a, b in SUMS],
    "process_reward": [{"prompt": f"{a}?", "steps": [f"{a} + {b} = 3", "so 3"], "labels": [True, a > b]} for a, b in SUMS],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reward_data_trains_a_model_that_fits_it_better_than_before(kind, tmp_path):
    rows = KINDS[kind]
    plan = {"steps": 12, "optim": {"learning_rate": 2e-3, "schedule": "constant", "warmup": 0.0}, "batch": {"rows": 12}}
    folder = trained(tmp_path, objective=kind, rows=rows, validation={"data": inline(rows), "every": 1}, **plan)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < lines[-1]["validation"]["loss"] < 0.8 * lines[0]["validation"]["loss"]
    assert load_scalar(folder / "model").lm.shift == 0


# ---- what is refused


def test_a_model_that_only_writes_is_no_reward_model(tmp_path):
    with pytest.raises(
        ModelError, match="tiny-base: is no reward model: it has no `score`; train one with objective bradley_terry"
    ):
        load_scalar("posttrain:tiny-base")
    with pytest.raises(ModelError, match=r"transformers cannot load this model: .*Mamba"):
        load_scalar(made(tmp_path / "mamba", name="mamba"), new_head(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": {"task": "arithmetic"}}, "trains a model that scores and does not write; remove `validation.task`"),
        (
            {"mix": {"objective": "sft", "data": inline(KINDS["score_regression"])}},
            "trains a model that scores and does not write; remove `mix`",
        ),
        ({"critic": {"shared": True}}, "objective bradley_terry trains no critic; remove the section `critic`"),
        ({"reference": "some/model"}, "compares with no reference; remove the section `reference`"),
        ({"task": "arithmetic"}, "objective bradley_terry learns from `data` and does not sample; remove the section `task`"),
        ({"objective": "sft", "normalise": {}}, "objective sft trains no reward model; remove the section `normalise`"),
        ({"objective": {"kind": "dpo"}, "normalise": {}}, "objective dpo trains no reward model; remove the section `normalise`"),
    ],
)
def test_sections_that_do_not_go_with_a_reward_model_are_refused(changes, message):
    with pytest.raises(ValidationError) as error:
        settings_of("posttrain:tiny-base", **changes)
    assert message in str(error.value)


def test_rows_that_a_reward_objective_cannot_learn_from_are_refused_before_weights_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("posttrain.training.starting.load_scalar", lambda *_: pytest.fail("weights were read"))
    tied = [{"prompt": "a?", "completions": ["b", "c", "d"], "scores": [1, 2, 2]}]
    with pytest.raises(DataError, match="two answers share the highest score; objective best_of_k needs one best"):
        trained(tmp_path, objective="best_of_k", rows=tied)
    for label, kind in ((True, "good"), (False, "bad")):
        same = [{"prompt": f"{a}?", "completion": f"{b}", "label": label} for a, b in SUMS]
        with pytest.raises(DataError, match=f"all 12 answers are {kind}; there is nothing to tell apart"):
            trained(tmp_path, objective="labelled_reward", rows=same)
    with pytest.raises(
        RecipeError, match="format prompt_completion gives nothing that objective bradley_terry learns from; use objective sft"
    ):
        settings_of("posttrain:tiny-base", rows=[{"prompt": "a", "completion": "b"}]).check()
