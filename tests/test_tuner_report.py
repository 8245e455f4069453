"""Tuners side by side in the report: what each reaches against what it moves; and texts, where less is better."""

import json

import pytest
from tiny_runs import base, settings

from posttrain.evaluation import Figure
from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.report import write_report
from posttrain.pipeline.run import run
from posttrain.pipeline.table import read_run
from posttrain.pipeline.tuning import panels
from posttrain.pipeline.verdict import comparable, verdict

TUNERS = {"bias": {"kind": "bitfit", "add": True}, "scales": "ia3", "words": {"kind": "prompt", "tokens": 2}}
TEXTS = {"sources": {"kind": "inline", "items": [{"text": "Sam has 18 shells."}, {"text": "What is 3 + 4? It is 7."}]}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tune = settings("sft", "full", steps=1, optim={"learning_rate": 0.05}, vary={"tuner": TUNERS})
    tune.pop("tuner")
    stages = {
        "base_text": {"kind": "evaluate_text", "model": str(base()), "data": TEXTS},
        "tune": tune,
        "tune_text": {"kind": "evaluate_text", "model": {"stage": "tune"}, "data": TEXTS},
    }
    root = tmp_path_factory.mktemp("report")
    run(Recipe.parse(json.dumps({"stages": stages}), name="tiny"), root)
    return root / "tiny"


def test_a_panel_has_each_tuner_with_what_it_moves_and_the_start(folder):
    found = read_run(folder)
    (panel,) = panels(found, comparable(found))
    assert panel.metric == "nll"
    assert {name for name, _, _ in panel.points} == set(TUNERS)
    moved = {name: count for name, count, _ in panel.points}
    assert moved["words"] == 2 * 32
    assert [count for _, count, _ in panel.points] == sorted(moved.values())
    assert panel.start == found.stages["base_text"].figures["nll"]
    assert all(isinstance(figure, Figure) for _, _, figure in panel.points)


def test_the_page_draws_it_and_the_lowest_nll_is_the_best(folder):
    page = write_report(folder).read_text()
    drawn = page.split("<h2>Tuners</h2>")[1].split("</section>")[0]
    assert all(f">{name}<" in drawn for name in TUNERS)
    found = read_run(folder)
    best = min((each for each in found.evaluations()), key=lambda each: each.figures["nll"].value)
    (said,) = verdict(found, comparable(found))
    assert said.startswith(f"On 2 texts, {found.label(best)} needs ")


def test_stages_that_do_not_differ_in_their_tuner_make_no_panel(folder):
    found = read_run(folder)
    for stage in found.stages.values():
        if stage.name.startswith("tune-"):
            stage.settings["tuner"] = {"kind": "ia3"}
    assert panels(found, comparable(found)) == []
