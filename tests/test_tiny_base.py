"""What docs/tiny_base.md says of the base model that comes with posttrain: made by its recipe, and able to calculate."""

import json
import random
import re
from pathlib import Path

import pytest

from posttrain.models.load import load
from posttrain.paths import ASSETS
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.run import run
from posttrain.sampling import Sampling
from posttrain.sampling.engine import Engine, Request

BASE = ASSETS / "tiny-base"


@pytest.fixture(scope="module")
def loaded():
    return load("posttrain:tiny-base")


def continued(loaded, texts: list[str], tokens: int) -> list[str]:
    """The likeliest continuation of each text."""
    engine = Engine(loaded.lm, Sampling(max_tokens=tokens, temperature=0), [loaded.tokenizer.eos_token_id], seed=0)
    for index, text in enumerate(texts):
        engine.add(Request(tuple(loaded.tokenizer.encode(text)), (index,)))
    found = {}
    while (done := engine.next()) is not None:
        found[done.request.address[0]] = loaded.tokenizer.decode(done.tokens, skip_special_tokens=True)
    return [found[index] for index in range(len(texts))]


def test_it_calculates(loaded):
    dice = random.Random(0)
    sums = {
        "+": [(a, b, a + b) for _ in range(100) for a, b in [(dice.randint(2, 60), dice.randint(2, 30))]],
        "-": [(a, b, a - b) for _ in range(100) for a, b in [(dice.randint(31, 90), dice.randint(1, 30))]],
        "*": [(a, b, a * b) for _ in range(100) for a, b in [(dice.randint(2, 9), dice.randint(2, 9))]],
        "/": [(a * b, b, a) for _ in range(100) for a, b in [(dice.randint(2, 20), dice.randint(2, 6))]],
    }
    for sign, wanted in sums.items():
        answers = continued(loaded, [f"{a} {sign} {b} = " for a, b, _ in wanted], 5)
        right = sum(re.split(r"\D", text)[0] == str(result) for text, (_, _, result) in zip(answers, wanted, strict=True))
        assert right >= 75, f"{sign}: {right} of 100"


def test_it_reads_a_story_problem_of_its_own_form(loaded):
    story = "Problem: Nils had 7 feathers. In the evening Nils collected 5 extra feathers. What was the number of feathers at last?\nWork:\n"
    assert "7 + 5 = 12" in continued(loaded, [story], 30)[0]


def test_it_has_no_idea_of_the_chat_format(loaded):
    from posttrain import evaluate

    report = evaluate(loaded, {"kind": "arithmetic", "limit": 60}, samples=0, sampling={"max_tokens": 64})
    assert report.figures["greedy"].value <= 0.05


def test_it_is_small_and_ordinary():
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 12_000_000
    assert {file.suffix for file in BASE.iterdir()} == {".json", ".jsonl", ".jinja", ".safetensors"}


def test_its_digits_are_single_tokens_and_its_text_survives(loaded):
    tokens = loaded.tokenizer.tokenize("1807 apples, 12 + 345 = 357")
    assert not [token for token in tokens if len(re.findall(r"\d", token)) > 1]
    text = "Zwölf Bären – 你好 1 + 2 = 3\n\tend"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text


@pytest.mark.slow
def test_its_recipe_makes_the_same_tokenizer_and_begins_with_the_same_loss(tmp_path):
    recipe = Recipe.load(Path(__file__).parents[1] / "recipes/tiny_base.yaml", ["stages.base.steps=1"])
    result = run(recipe, tmp_path)
    made = json.loads((result.model("new") / "tokenizer.json").read_text())
    assert made == json.loads((BASE / "tokenizer.json").read_text())
    first = json.loads((result.folders["base"] / "metrics.jsonl").read_text())
    kept = json.loads((BASE / "metrics.jsonl").read_text().splitlines()[0])
    assert first["tokens"] == kept["tokens"]
    assert first["nll"] == pytest.approx(kept["nll"], rel=1e-5)
