"""The report: what it must say, what it must not claim, and that nothing in a run's folder can break or escape from the page."""

import html
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import InputError
from posttrain.pipeline.plots import Curve, curve_svg, curves
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.report import write_report
from posttrain.pipeline.table import amount, read_run, summary_table

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "br", "link", "img", "input", "hr", "base", "wbr"}

EVALUATE = "kind: evaluate, task: {kind: arithmetic, source: 'posttrain:data/arith_test.jsonl'}, evaluation: {samples: 8}"
RECIPE = f"""
title: Arithmetic from scratch
seed: 7
stages:
  base: {{{EVALUATE}, model: 'posttrain:tiny-base'}}
  sft:
    model: posttrain:tiny-base
    objective: sft
    data:
      sources: [{{path: 'posttrain:data/arith_train.jsonl.gz', rows: '0:2000'}}]
      format: {{kind: prompt_completion, fields: {{completion: solution}}}}
    optim: {{learning_rate: 2e-5}}
    epochs: 3
    validation:
      task: {{kind: arithmetic, source: {{path: 'posttrain:data/arith_train.jsonl.gz', rows: '7000:7200'}}}}
      best: pass@1
  sft-eval: {{{EVALUATE}, model: {{stage: sft}}, kl_to: 'posttrain:tiny-base'}}
  grpo:
    model: {{stage: sft}}
    objective: {{kind: grpo, kl: 0.01}}
    tuner: {{kind: lora, rank: 4}}
    task: {{kind: arithmetic, source: {{path: 'posttrain:data/arith_train.jsonl.gz', rows: '2000:7000'}}}}
    steps: 60
  grpo-eval: {{{EVALUATE}, model: {{stage: grpo}}, kl_to: 'posttrain:tiny-base'}}
"""


def share(value: float, low: float, high: float, count: int = 500) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "count": count}


BASE = {"pass@1": share(0.021, 0.014, 0.03), "greedy": share(0.024, 0.012, 0.04), "pass@8": share(0.09, 0.07, 0.12)}
SFT = {"pass@1": share(0.410, 0.389, 0.431), "greedy": share(0.60, 0.557, 0.643), "pass@8": share(0.78, 0.74, 0.81)}
GRPO = {"pass@1": share(0.612, 0.590, 0.633), "greedy": share(0.63, 0.587, 0.673), "pass@8": share(0.83, 0.79, 0.86)}
EXTRA = {"length": share(35.4, 34.6, 36.2), "ended": share(0.995, 0.99, 0.999), "kl": share(25.9, 24.9, 26.9)}


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(**scores: float | None) -> str:
    return lines(
        *(
            {
                "id": name.replace("_", "-"),
                "prompt": f"Asked: {name}?",
                "answer": "19",
                "text": f"It is {score}.",
                "score": score,
                "stop": "end",
            }
            for name, score in scores.items()
        )
    )


def evaluated(metrics: dict[str, Any], seconds: float = 19.9, text: str | None = None) -> dict[str, str]:
    done = {
        "seconds": seconds,
        "metrics": metrics,
        "problems": 500,
        "failures": 0,
        "wall_seconds": seconds,
        "peak_memory_mb": 612.3,
    }
    return {"done.json": json.dumps(done), **({} if text is None else {"answers.jsonl": text})}


def row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "lr": 2e-5,
        "grad_norm": 1.0 + step,
        "tokens": 1000 + step,
        **values,
        "time": {"seconds": 0.5, "at": 1795201526.0 + step},
    }


def sft_row(step: int) -> dict[str, Any]:
    found = row(step, **{"nll": 8.0 / step, "loss/nll": 8.0 / step})
    return found | ({"validation": {"pass@1": share(step / 100, 0.01, 0.5, 200), "nll": 0.5}} if step % 20 == 0 else {})


def grpo_row(step: int) -> dict[str, Any]:
    return row(
        step,
        **{
            "reward": 0.4 + step / 300,
            "entropy": 0.6 - step / 200,
            "length": 38.0,
            "kl": step / 1000,
            "loss/policy": 0.01 / step,
        },
    )


TRAINED = {
    "seconds": 61.2,
    "steps": 40,
    "stopped": None,
    "best": {"step": 40, "value": 0.4},
    "parameters": 2755008,
    "wall_seconds": 88.1,
    "peak_memory_mb": 710.6,
    "data": {"rows": 2000, "tokens": 121130, "trained_tokens": 32560},
}
SAMPLED = {**TRAINED, "seconds": 214.8, "steps": 60, "best": None, "parameters": 81920, "problems": 5000}
SAMPLES = lines(
    *(
        {"step": s, "id": f"train-{s}", "index": i, "text": f"text {s}.{i}", "score": float(i)}
        for s in range(1, 61)
        for i in (0, 1)
    )
)


def whole() -> dict[str, dict[str, str]]:
    """The files of the recipe's stages."""
    return {
        "base": evaluated(BASE, 21.4, answers(p_0=0.0, p_1=0.0, p_2=0.0)),
        "sft": {"done.json": json.dumps(TRAINED), "metrics.jsonl": lines(*map(sft_row, range(1, 41)))},
        "sft-eval": evaluated(SFT | EXTRA, 19.9, answers(p_0=0.0, p_1=1.0, p_2=1.0)),
        "grpo": {
            "done.json": json.dumps(SAMPLED),
            "metrics.jsonl": lines(*map(grpo_row, range(1, 61))),
            "samples.jsonl": SAMPLES,
        },
        "grpo-eval": evaluated(GRPO | EXTRA, 18.2, answers(p_0=0.0, p_1=1.0, p_2=0.0)),
    }


def run_folder(root: Path, files: dict[str, dict[str, str]], text: str = RECIPE, index: bool = True, **about: Any) -> Path:
    """A run's folder as `run` leaves it: `files` by stage; `about` goes into every stage.json. Not `index`: no recipe.json."""
    recipe = Recipe.parse(text, name="arith").model_dump(mode="json")
    folder = root / "arith"
    places = {name: f"{name}-{number:010x}" for number, name in enumerate(files, start=1)}
    for name, texts in files.items():
        place = folder / places[name]
        place.mkdir(parents=True)
        settings = recipe["stages"][name]
        task = f"{settings.get('task')}".encode().hex()[-64:]
        facts = {
            "settings": settings,
            "seed": recipe["seed"],
            "code": "c0de" * 16,
            "fingerprints": {"task posttrain:x": task},
            "inputs": {other: "k" for other in [settings["model"]["stage"]] if other},
        }
        stage = {
            "name": name,
            "recipe": "arith",
            "key": f"{name}-key",
            "facts": facts,
            "versions": {"torch": "2.13.0"},
            "git": "abc123+",
        }
        for file, content in ({"stage.json": json.dumps(stage | about)} | texts).items():
            (place / file).write_text(content, encoding="utf-8", errors="surrogatepass")
    if index:
        (folder / "recipe.json").write_text(json.dumps({"recipe": recipe, "folders": places}), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The page as a browser sees it: elements with attributes, text; every element is closed where it must be."""

    def __init__(self, folder: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = write_report(folder).read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> is for SVG only"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["title"]):
            self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)

    @property
    def cautions(self) -> str:
        found = re.search(r'<ul class="cautions">(.*?)</ul>', self.source, re.DOTALL)
        return found[1] if found else ""


def verdict_of(root: Path, *metrics: tuple[str, dict[str, Any]]) -> str:
    page = Page(run_folder(root, whole() | {name: evaluated(each) for name, each in metrics}))
    return " ".join(re.findall(r'<p class="verdict">(.*?)</p>', page.source, re.DOTALL))


# --- what it says ---


def test_a_finished_run_is_told_with_its_figures_intervals_data_and_cost(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole()))
    assert "<title>Arithmetic from scratch</title>" in page.source
    for words in (
        "61.2% 59.0 to 63.3",
        "41.0% 38.9 to 43.1",
        "2.1% 1.4 to 3.0",
        "83.0% 79.0 to 86.0",
        "35.4 34.6 to 36.2",
        "25.9 24.9 to 26.9",
        "arithmetic: arith_test.jsonl; 500 problems; 8 samples of each problem at temperature 1",
        "to posttrain:tiny-base",
        "sft; tuner full (2,755,008 parameters)",
        "arith_train.jsonl.gz rows 0:2000",
        "2,000 rows, 121,130 tokens, 32,560 of them trained",
        "40 updates (3 epochs), 40,820 tokens",
        "learning rate 2e-5",
        "kept the weights of update 40: pass@1 40.0%",
        "tuner lora, rank 4",
        "arithmetic: arith_train.jsonl.gz rows 2000:7000: 5,000 problems",
        "rollouts of 32 problems × 8 samples",
        "61.2 s 88.1 s with loading, validation and saving peak 711 MB",
        "3.6 min",
    ):
        assert words in page.text, words


def test_where_it_comes_from_is_told_so_that_it_can_be_had_again(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole()))
    for words in (
        "posttrain run arith.yaml",
        "abc123+ (and changes that were not committed)",
        "torch 2.13.0",
        "c0de" * 16,
        "seed 7",
        "grpo-key",
    ):
        assert words in page.text, words
    recipe = re.search(r"<pre>(name: arith.*?)</pre>", page.source, re.DOTALL)
    assert recipe is not None
    assert Recipe.parse(html.unescape(recipe[1])) == Recipe.parse(RECIPE, name="arith")


def test_intervals_that_do_not_touch_are_said_not_to_touch(tmp_path: Path) -> None:
    said = verdict_of(tmp_path)
    assert said.startswith(
        "On 500 problems, grpo gets 61.2% (95% interval 59.0 to 63.3) of its sampled answers right; "
        "sft 41.0% (38.9 to 43.1) and base 2.1% (1.4 to 3.0): the intervals do not touch."
    )
    greedy = (
        "By the likeliest answer instead of samples, grpo 63.0% (58.7 to 67.3), sft 60.0% (55.7 to 64.3): the intervals touch."
    )
    assert greedy in said


def test_where_intervals_touch_nothing_is_claimed(tmp_path: Path) -> None:
    said = verdict_of(tmp_path, ("grpo-eval", {"pass@1": share(0.44, 0.431, 0.46)}))
    assert "sft 41.0% (38.9 to 43.1): the intervals touch, so these figures do not show which of them is better" in said
    assert "base 2.1% (1.4 to 3.0): the intervals do not touch" in said
    assert "best" not in said


def test_a_difference_without_intervals_is_not_called_one(tmp_path: Path) -> None:
    said = verdict_of(tmp_path, ("sft-eval", {"pass@1": 0.41}), ("base", {"pass@1": share(0.3, -math.inf, math.inf)}))
    assert "sft 41.0% and base 30.0%: without intervals, so nothing says whether the difference is chance" in said


def test_one_evaluation_alone_shows_no_improvement(tmp_path: Path) -> None:
    text = "".join(RECIPE.partition("  grpo:")[:1]).replace(f"  base: {{{EVALUATE}, model: 'posttrain:tiny-base'}}\n", "")
    page = Page(run_folder(tmp_path, {name: files for name, files in whole().items() if name in {"sft", "sft-eval"}}, text))
    assert "sft gets 41.0% (95% interval 38.9 to 43.1) of its sampled answers right." in page.text
    assert "It is the only evaluation of its kind here: it does not show that training made the model better." in page.text
    assert "touch" not in page.text


def test_evaluations_on_different_problems_are_not_compared(tmp_path: Path) -> None:
    text = RECIPE.replace(f"{EVALUATE}, model: {{stage: grpo}}", f"{EVALUATE.replace('8}', '4}')}, model: {{stage: grpo}}")
    assert text != RECIPE
    page = Page(run_folder(tmp_path, whole(), text))
    first, second = re.findall(r'<p class="verdict">(.*?)</p>', page.source, re.DOTALL)
    assert "sft gets 41.0%" in first
    assert "grpo" not in first
    assert "grpo gets 61.2%" in second
    assert "only evaluation of its kind" in second


def test_a_model_that_training_made_worse_is_pointed_out(tmp_path: Path) -> None:
    files = whole() | {"grpo-eval": evaluated({"pass@1": share(0.20, 0.18, 0.22)})}
    page = Page(run_folder(tmp_path, files))
    assert "grpo is worse than sft, from which it was trained (pass@1: the intervals do not touch)." in page.cautions
    assert "worse" not in Page(run_folder(tmp_path / "fine", whole())).cautions


@pytest.mark.parametrize(
    ("before", "after", "caution"),
    [
        ("rows: '2000:7000'", "rows: '7100:7300'", None),
        (
            "{path: 'posttrain:data/arith_train.jsonl.gz', rows: '0:2000'}",
            "'posttrain:data/arith_test.jsonl'",
            "sft was trained on",
        ),
        (
            "{path: 'posttrain:data/arith_train.jsonl.gz', rows: '7000:7200'}",
            "{path: 'posttrain:data/arith_test.jsonl', rows: '9:'}",
            "sft chose its best weights by",
        ),
    ],
)
def test_an_evaluation_on_rows_that_training_has_seen_is_pointed_out(
    tmp_path: Path, before: str, after: str, caution: str | None
) -> None:
    assert before in RECIPE
    page = Page(run_folder(tmp_path, whole(), RECIPE.replace(before, after)))
    if caution is None:
        assert "may be too good" not in page.text
    else:
        who = "sft-eval and grpo-eval"
        assert f"{caution} rows that {who} evaluate on: the figures of {who} may be too good." in page.cautions


@pytest.mark.parametrize(("rows", "seen"), [("7200:7400", False), ("7199:7400", True), ("1999:2000", True)])
def test_rows_of_one_file_are_seen_only_where_they_overlap(tmp_path: Path, rows: str, seen: bool) -> None:
    source = f"{{path: 'posttrain:data/arith_train.jsonl.gz', rows: '{rows}'}}"
    page = Page(run_folder(tmp_path, whole(), RECIPE.replace("'posttrain:data/arith_test.jsonl'", source)))
    assert ("rows that sft-eval and grpo-eval evaluate on" in page.cautions) is seen


def test_answers_that_could_not_be_graded_are_pointed_out(tmp_path: Path) -> None:
    files = whole()
    files["grpo-eval"]["done.json"] = files["grpo-eval"]["done.json"].replace('"failures": 0', '"failures": 3')
    assert "grpo-eval: 3 answers could not be graded" in Page(run_folder(tmp_path, files)).cautions


# --- answers and samples ---


def test_answers_stand_side_by_side_and_those_judged_differently_come_first(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole()))
    assert "Of 3 problems that base, sft, grpo all answered, 2 are judged differently" in page.text
    kinds = "✗ wrong ✓ right ✓ right 1 ✗ wrong ✓ right ✗ wrong 1 ✗ wrong ✗ wrong ✗ wrong 1"
    assert f"base sft grpo problems {kinds}" in page.text
    order = [page.text.index(f"Asked: {name}?") for name in ("p_1", "p_2", "p_0")]
    assert order == sorted(order)
    first = page.text[order[0] : order[1]]
    assert "Expected: 19 base ✗ wrong It is 0.0. sft ✓ right It is 1.0. grpo ✓ right It is 1.0." in first


def test_at_most_twelve_problems_are_shown_and_only_those_that_all_answered(tmp_path: Path) -> None:
    files = whole()
    everyone = {f"p_{place}": float(place % 2) for place in range(40)}
    for name in ("base", "sft-eval", "grpo-eval"):
        files[name]["answers.jsonl"] = answers(**everyone)
    files["base"]["answers.jsonl"] = answers(**{name: score for name, score in everyone.items() if name != "p_0"}, only_base=1.0)
    page = Page(run_folder(tmp_path, files))
    assert page.text.count("Asked: ") == 12
    assert "Asked: p_0?" not in page.text
    assert "only_base" not in page.text
    assert "Of 39 problems that base, sft, grpo all answered, all are judged alike." in page.text


def test_scores_between_right_and_wrong_and_missing_ones_are_told(tmp_path: Path) -> None:
    files = whole()
    files["base"]["answers.jsonl"], files["sft-eval"]["answers.jsonl"] = answers(p_0=0.4), answers(p_0=None)
    files["grpo-eval"]["answers.jsonl"] = answers(p_0=0.9999999999)
    page = Page(run_folder(tmp_path, files))
    assert "base ✗ wrong, score 0.4 It is 0.4. sft ? not graded It is None. grpo ✓ right" in page.text


def test_samples_of_a_training_are_spread_over_its_updates(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole()))
    shown = re.findall(r">text (\d+)\.(\d)<", page.source)
    assert [int(step) for step, index in shown if index == "0"] == [1, 13, 25, 36, 48, 60]
    assert len(shown) == 12


def test_a_very_long_text_is_cut_in_its_middle(tmp_path: Path) -> None:
    files = whole()
    files["grpo-eval"]["answers.jsonl"] = answers(p_1=1.0).replace("It is 1.0.", "begin" + "x" * 50_000 + "finish")
    page = Page(run_folder(tmp_path, files))
    assert "[... 47,011 characters left out ...]" in page.text
    assert "begin" in page.text
    assert "finish" in page.text
    assert len(page.source) < 300_000


# --- curves ---


def test_each_training_has_its_curves_with_units_and_the_kept_update(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole()))
    for words in (
        "nats per trained token",
        "mean score of the samples",
        "tokens per second",
        "Validation: pass@1",
        "Loss (policy)",
        "before clipping",
    ):
        assert words in page.text, words
    assert "40 updates logged; the weights of update 40 were kept. Unchanged throughout: Learning rate 2e-5." in page.text
    assert "Loss 8.00 → 0.200" in page.text
    assert "Length of the samples 38.0 tokens; Learning rate 2e-5." in page.text
    assert (
        page.count("svg") == 1 + 5 + 6
    )  # intervals; nll, pass@1, nll of validation, norm, speed; reward, entropy, kl, loss, norm, speed


def test_the_running_mean_of_a_rate_is_a_ratio_of_sums() -> None:
    rows = [row(step, tokens=1000) | {"time": {"seconds": 10.0 if step % 2 else 0.1}} for step in range(1, 101)]
    (speed,) = [curve for curve in curves(rows)[0] if curve.title == "Speed"]
    assert speed.values[:2] == pytest.approx((100.0, 10_000.0))
    assert speed.smooth()[50] == pytest.approx(
        5000 / 30.2
    )  # updates 49 to 53, three of them slow; their mean rate would be 4,060


def test_a_score_that_is_pass_at_1_again_is_shown_once() -> None:
    rows = [row(step, validation={"pass@1": share(0.1 * step, 0, 1), "score": share(0.1 * step, -1, 1)}) for step in (1, 2)]
    assert [curve.title for curve in curves(rows)[0] if curve.validated] == ["Validation: pass@1"]
    rows[1]["validation"]["score"]["value"] = 0.3
    assert [curve.title for curve in curves(rows)[0] if curve.validated] == ["Validation: pass@1", "Validation: score"]


def test_a_spike_of_one_update_is_still_drawn_of_a_long_training() -> None:
    values = [1.0] * 10_000
    values[4321] = 900.0
    spiky = Curve("Gradient norm", "before clipping", tuple(map(float, range(10_000))), tuple(values))
    flat = Curve("Gradient norm", "before clipping", spiky.steps, tuple(1.0 + step % 2 for step in range(10_000)))
    assert len(curve_svg(flat)) < 80_000
    assert ">750<" in curve_svg(spiky)  # the scale of the spike of 900; its running mean is at most 3.2


def test_the_best_update_is_marked_where_the_curve_has_it() -> None:
    curve = Curve(
        "Validation: pass@1",
        "% of samples",
        (20.0, 40.0, 60.0),
        (0.1, 0.4, 0.3),
        bands=((0.05, 0.2), (0.3, 0.5), (0.2, 0.4)),
        validated=True,
    )
    assert curve_svg(curve, 40).count("var(--mark)") > curve_svg(curve, None).count("var(--mark)") == 0
    assert "stroke-dasharray" not in curve_svg(curve, 500)


# --- what it withstands ---


def test_hostile_texts_are_shown_and_never_run(tmp_path: Path) -> None:
    files = whole()
    for name in ("base", "sft-eval", "grpo-eval"):
        rows = [{"id": HOSTILE, "prompt": HOSTILE, "answer": HOSTILE, "text": HOSTILE, "score": 0.0, "stop": HOSTILE}]
        files[name]["answers.jsonl"] = lines(*rows)
    files["grpo"]["samples.jsonl"] = lines({"step": 1, "id": HOSTILE, "index": 0, "text": HOSTILE, "score": HOSTILE})
    files["grpo"]["metrics.jsonl"] += lines(row(61, **{HOSTILE: 3.0, "validation": {HOSTILE: 0.5}}), row(62, **{HOSTILE: 4.0}))
    files["grpo"]["done.json"] = json.dumps(SAMPLED | {"stopped": HOSTILE})
    files["grpo-eval"]["done.json"] = json.dumps({"metrics": GRPO | {HOSTILE: 0.5}})
    folder = run_folder(
        tmp_path, files, RECIPE.replace("Arithmetic from scratch", json.dumps(HOSTILE)), git=HOSTILE, versions={HOSTILE: HOSTILE}
    )
    index = json.loads((folder / "recipe.json").read_text())
    index["recipe"]["name"] = HOSTILE
    index["folders"][HOSTILE] = index["folders"].pop("base")  # a stage's name goes into a plot as well
    (folder / "recipe.json").write_text(json.dumps(index))
    page = Page(folder)
    assert page.count("script") == page.count("img") == 0
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count(HOSTILE) > 20
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.source


def test_control_characters_are_shown_as_signs_and_direction_marks_have_no_effect(tmp_path: Path) -> None:
    files = whole()
    files["base"]["answers.jsonl"] = answers(p_1=0.0).replace("It is 0.0.", r"a\u0000b\bc\u202ed\ud800e")
    page = Page(run_folder(tmp_path, files))
    assert "a␀b␈c\ufffdd\ufffde" in page.text


def test_the_page_refers_to_nothing_outside_of_itself(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole()))
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "form", "base", "image"}
        assert not {"src", "srcset", "action", "xlink:href", "data", "poster"} & attributes.keys()
        if "href" in attributes:
            assert (attributes["href"] or "").removeprefix("#") in ids
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert ("meta", policy) in page.elements


def test_a_run_that_was_cut_short_is_told_from_its_stages(tmp_path: Path) -> None:
    files = {name: each for name, each in whole().items() if name != "grpo-eval"}
    del files["grpo"]["done.json"]
    files["grpo"]["metrics.jsonl"] = lines(*map(grpo_row, range(1, 13)))
    reverse = dict(reversed(files.items()))  # the order of the folders says nothing, that of the inputs does
    folder = run_folder(tmp_path, reverse, index=False)
    page = Page(folder)
    assert "The run has not come to its end: this report shows the stages that were begun." in page.cautions
    assert "grpo has not finished: 12 updates so far." in page.cautions
    assert "sft gets 41.0%" in page.text
    names = list(read_run(folder).stages)
    assert names.index("sft") < names.index("grpo")
    assert names.index("sft") < names.index("sft-eval")
    assert "posttrain run arith.yaml" in page.text


def test_a_stage_begun_after_the_run_had_ended_is_pointed_out(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, whole())
    os.utime(folder / "recipe.json", (1, 1))  # a copied folder: times say nothing about the stages that are in the report
    assert "was begun after" not in Page(folder).text
    newer = folder / "sft-0123456789"
    newer.mkdir()
    (newer / "stage.json").write_text("{}")
    os.utime(newer / "stage.json", (3e9, 3e9))
    assert "sft-0123456789: was begun after this run had ended and is not in this report." in Page(folder).cautions


def test_the_newest_folder_of_a_stage_speaks_for_a_run_that_was_cut_short(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, {"base": evaluated(BASE)}, index=False)
    older = folder / "base-0ldf0lder0"
    older.mkdir()
    (older / "stage.json").write_bytes((folder / "base-0000000001" / "stage.json").read_bytes())
    os.utime(older / "stage.json", (1, 1))
    assert read_run(folder).stages["base"].folder.name == "base-0000000001"


def test_an_evaluation_that_has_not_finished_has_a_row_that_says_so(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, whole() | {"grpo-eval": {}}))
    assert "grpo-eval stage grpo not finished" in page.text
    assert "grpo-eval has not finished." in page.cautions


def test_a_single_training_stage_has_curves_and_claims_nothing(tmp_path: Path) -> None:
    text = "model: posttrain:tiny-base\nobjective: sft\ndata: {sources: ['posttrain:data/arith_train.jsonl.gz']}\nsteps: 40\n"
    page = Page(run_folder(tmp_path, {"train": whole()["sft"]}, text))
    assert "This run evaluates nothing: the curves below show how the training went, not how good the model is." in page.text
    assert "Evaluations" not in page.text
    assert "Answers" not in page.text
    assert "Loss 8.00 → 0.200" in page.text


def test_stages_without_any_file_but_their_own_are_survived(tmp_path: Path) -> None:
    page = Page(run_folder(tmp_path, {name: {} for name in whole()}))
    assert "No evaluation of this run has given a figure yet, so nothing here says how good its models are." in page.text
    assert page.cautions.count("has not finished.") == 5


def test_damaged_lines_are_left_out_with_a_note(tmp_path: Path) -> None:
    files = whole()
    text = files["grpo"]["metrics.jsonl"].splitlines(keepends=True)
    files["grpo"]["metrics.jsonl"] = "".join([*text[:9], '{"step": 10, "lr\n', "[1]\n", "\n", *text[9:], '{"step": 6'])
    page = Page(run_folder(tmp_path, files))
    assert "grpo: metrics.jsonl: 3 damaged lines left out (line 10, 11, 64)" in page.cautions
    assert "60 updates logged" in page.text


@pytest.mark.parametrize("file", ["done.json", "stage.json"])
def test_a_damaged_record_is_left_out_with_a_note(tmp_path: Path, file: str) -> None:
    files = whole()
    files["sft-eval"][file] = '{"metrics": {"pass@1"'
    page = Page(run_folder(tmp_path, files))
    assert f"sft-eval-0000000003/{file}: is damaged and was left out" in page.cautions
    assert "grpo gets 61.2%" in page.text


def test_figures_that_are_no_numbers_are_shown_as_such(tmp_path: Path) -> None:
    nothing = {"value": math.nan, "low": math.nan, "high": math.nan, "count": 0}
    files = whole() | {
        "base": evaluated(
            {"pass@1": nothing, "greedy": None, "length": {"value": 3.5, "low": -math.inf, "high": math.inf, "count": 1}}
        )
    }
    odd = [
        row(1, nll=math.nan, validation=None),
        row(2, nll=None, validation={"pass@1": nothing}),
        row(3, nll=10**400),
        row(4, nll=2.0, time=None),
    ]
    files["sft"]["metrics.jsonl"] = lines(*odd, {"step": None}, {"nll": 3.0})
    page = Page(run_folder(tmp_path, files))
    assert "base posttrain:tiny-base n/a – – 3.50 –" in page.text
    assert "nan" not in page.text.lower().replace("finan", "")
    assert "inf" not in re.sub(r"\binference|information", "", page.text.lower())
    assert "Loss 2.00" in page.text


def test_a_folder_without_a_run_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"nowhere: holds no run: no recipe\.json and no stage's folder; name a folder such as runs/quickstart"
    ):
        write_report(tmp_path / "nowhere")


def test_folders_named_in_a_record_do_not_lead_out_of_the_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, whole())
    index = json.loads((folder / "recipe.json").read_text())
    index["folders"]["base"] = "../../" + index["folders"]["base"]
    (folder / "recipe.json").write_text(json.dumps(index))
    assert {stage.folder.parent for stage in read_run(folder).stages.values()} == {folder}


def test_the_same_folder_gives_the_same_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, whole())
    before = {path.name for path in folder.iterdir()}
    path = write_report(folder)
    first = path.read_bytes()
    assert write_report(folder).read_bytes() == first
    assert {each.name for each in folder.iterdir()} == before | {"report.html"}


def test_reports_and_tables_are_imported_without_anything_heavy(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, whole())
    code = (
        "import sys; from posttrain.pipeline.report import write_report; from posttrain.pipeline.table import summary_table\n"
        "print(sorted({'matplotlib', 'jinja2', 'torch', 'numpy'} & set(sys.modules)))\n"
        f"summary_table({str(folder)!r}); print(sorted({{'matplotlib', 'jinja2', 'torch'}} & set(sys.modules)))\n"
        f"write_report({str(folder)!r}); print(sorted({{'torch', 'transformers', 'matplotlib.pyplot'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]", "[]"]


# --- the table of the command line ---


def test_the_table_has_a_row_for_each_evaluation_and_the_columns_that_any_has(tmp_path: Path) -> None:
    table = summary_table(run_folder(tmp_path, whole()))
    assert table == [
        {
            "stage": "base",
            "pass@1": "2.1% (1.4 to 3.0)",
            "greedy": "2.4% (1.2 to 4.0)",
            "pass@8": "9.0%",
            "length": "–",
            "KL": "–",
            "seconds": "21.4",
            "trained": "–",
        },
        {
            "stage": "sft-eval",
            "pass@1": "41.0% (38.9 to 43.1)",
            "greedy": "60.0% (55.7 to 64.3)",
            "pass@8": "78.0%",
            "length": "35.4",
            "KL": "25.9",
            "seconds": "19.9",
            "trained": "61.2",
        },
        {
            "stage": "grpo-eval",
            "pass@1": "61.2% (59.0 to 63.3)",
            "greedy": "63.0% (58.7 to 67.3)",
            "pass@8": "83.0%",
            "length": "35.4",
            "KL": "25.9",
            "seconds": "18.2",
            "trained": "214.8",
        },
    ]


def test_the_table_shows_a_score_only_where_it_says_more_than_pass_at_1(tmp_path: Path) -> None:
    same = whole() | {"base": evaluated(BASE | {"score": share(0.021, -1, 1)})}
    assert "score" not in summary_table(run_folder(tmp_path / "same", same))[0]
    other = whole() | {"base": evaluated(BASE | {"score": share(0.3, 0.2, 0.4)})}
    assert [each["score"] for each in summary_table(run_folder(tmp_path / "other", other))] == ["0.300", "–", "–"]


def test_the_table_is_empty_where_nothing_was_evaluated(tmp_path: Path) -> None:
    assert summary_table(run_folder(tmp_path, {"base": {}, "sft": whole()["sft"]})) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (-1.3e-7, "0.000"),
        (0.0314, "0.031"),
        (0.9999, "1.00"),
        (2.345, "2.35"),
        (35.44, "35.4"),
        (12345.6, "12,346"),
        (-4.2, "-4.20"),
    ],
)
def test_numbers_have_the_digits_that_say_something(value: float, text: str) -> None:
    assert amount(value) == text
