"""`evaluate_text`: nats a token of texts, with an interval over texts."""

import json
import math

import pytest
import torch
from tiny_runs import base

from posttrain.errors import RecipeError
from posttrain.evaluation.intervals import ratio
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import run
from posttrain.tuners.load import load

TEXTS = ["Sam has 18 shells.", "What is 3 + 4? It is 7. Once upon a time", "a cat who could count to 12 and back again, all day long."]


def recipe(items):
    stage = {"kind": "evaluate_text", "model": str(base()), "data": {"sources": {"kind": "inline", "items": items}}}
    return Recipe.parse(json.dumps({"stages": {"text": stage}}), name="tiny")


def test_the_nll_is_the_models_over_all_tokens_with_an_interval_over_texts(tmp_path):
    folder = run(recipe([{"text": text} for text in TEXTS]), tmp_path).folders["text"]
    found = json.loads((folder / "done.json").read_text())["metrics"]
    loaded = load(base())
    totals, counts = [], []
    for text in TEXTS:
        ids = [*loaded.tokenizer(text, add_special_tokens=False)["input_ids"], loaded.tokenizer.eos_token_id]
        with torch.no_grad():
            logits = loaded.lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        totals.append(-float(logits[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum()))
        counts.append(len(ids) - 1)
    assert found["nll"]["value"] == pytest.approx(sum(totals) / sum(counts), rel=1e-5)
    assert found["nll"]["count"] == 3
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["nll"]["value"]))
    assert found["perplexity"]["low"] == pytest.approx(math.exp(found["nll"]["low"]))


def test_a_ratios_interval_holds_as_often_as_it_says():
    draw = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        counts = torch.randint(5, 200, (60,), generator=draw)
        totals = counts * (2.0 + 0.5 * torch.randn(60, generator=draw))
        figure = ratio(totals.tolist(), counts.tolist())
        held += figure.low <= 2.0 <= figure.high
    assert 0.91 < held / 400 < 0.98
    assert ratio([4.0, 2.0], [2, 1]).low == ratio([4.0, 2.0], [2, 1]).high == 2.0, "no spread, no width"
    assert math.isnan(ratio([], []).value)


def test_what_holds_no_text_is_refused():
    with pytest.raises(RecipeError, match="this stage measures text"):
        recipe([{"prompt": "What?", "chosen": "yes", "rejected": "no"}]).check()
