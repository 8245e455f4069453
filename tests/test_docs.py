"""What the docs say is what the code does."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from posttrain.pipeline.recipe import Recipe
from posttrain.pipeline.reference import reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_recipe_reference_is_what_the_kinds_say():
    written = (ROOT / "docs/reference.md").read_text()
    assert written == reference(), "run: python -m posttrain.pipeline.reference > docs/reference.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_recipe_in_the_docs_loads(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S):
        text = block if "stages:" in block or "stage: " not in block else "stages:\n  sft: {model: m, objective: sft, data: {sources: f.jsonl}, epochs: 1}\n  here:\n" + re.sub(r"^", "    ", block, flags=re.M)
        if "objective" in block:
            assert Recipe.parse(text, name=page.name).stages


def titled(page):
    """The kinds that a page's title names: `# dpo, ipo: direct preference objectives`."""
    title = page.read_text().splitlines()[0]
    return re.fullmatch(r"# (.+?)(: .*)?", title)[1].split(", ")


def test_every_objective_stands_in_the_title_of_one_page_with_equation_function_recipe_and_curve():
    from posttrain.objectives import Objective

    for kind in (kind for kind in Objective.kinds if ":" not in kind):
        pages = [page for page in PAGES if kind in titled(page)]
        assert len(pages) == 1, f"{kind} stands in the titles of {[page.name for page in pages]}; it needs one page"
        for word in ("**Equation", "**Function.**", "**Recipe.**", "**Curve.**"):
            assert word in pages[0].read_text(), f"docs/{pages[0].name} lacks {word}"


def test_every_test_that_the_docs_name_exists():
    sources = {file.stem: file.read_text() for file in Path(__file__).parent.glob("test_*.py")}
    known, files = set(re.findall(r"def (test_\w+)\(", "".join(sources.values()))), set(sources)
    for page in PAGES:
        text = page.read_text()
        assert set(re.findall(r"`(test_\w+)`", text)) <= known, page.name
        assert set(re.findall(r"(?:tests/|`)(test_\w+)\.py", text)) | set(re.findall(r"\((test_\w+)\)", text)) <= files, page.name


def test_the_page_of_ppo_goes_through_all_27_details():
    rows = re.findall(r"^\| (\d+) \|.*\|$", (ROOT / "docs/ppo.md").read_text(), re.M)
    assert rows == [str(number) for number in range(1, 28)]


def test_the_table_of_preference_objectives_has_every_kind_with_its_default():
    from posttrain.objectives import Objective
    from posttrain.objectives.preference import PreferenceObjective

    page = ROOT / "docs/preference.md"
    table = page.read_text().partition("| kind |")[2].partition("\n\n")[0]
    rows = {kind: row for row, kind in re.findall(r"^(\| `(\w+)` \|.*)$", table, re.M)}
    kinds = [kind for kind in titled(page) if issubclass(Objective.kinds[kind], PreferenceObjective)]
    assert kinds == list(rows) == titled(page)
    for kind in kinds:
        strength = next(name for name in ("beta", "tau", "weight") if name in Objective.kinds[kind].model_fields)
        default = Objective.kinds[kind].model_fields[strength].default
        assert f"`{strength}` {default:g}" in rows[kind], f"{kind}: {strength} is {default:g}"


def test_the_curves_are_drawn_from_the_runs_that_the_pages_name(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make_curves", ROOT / "docs/make_curves.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "CURVES", tmp_path / "curves")
    kinds = {"dpo-0.1": "dpo", "dpo-0.3": "dpo", "kto": "kto", "reward": "bradley_terry", "ppo": "ppo", "sft": "sft"}
    run = tmp_path / "rlhf_sentiment"
    run.mkdir()
    stages = {stage: {"kind": "train", "objective": {"kind": kind}} for stage, kind in kinds.items()}
    (run / "recipe.json").write_text(json.dumps({"folders": {stage: stage for stage in kinds}, "recipe": {"stages": stages}}))
    for stage in kinds:
        (run / stage).mkdir()
        names = {name for panels in script.PANELS.values() for name in panels if name != "pass@1"}
        lines = [json.dumps({"step": step, **dict.fromkeys(names, step * 0.5)}) for step in range(1, 6)]
        (run / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    script.draw_run(run)
    drawn = {file.stem: file.read_text() for file in (tmp_path / "curves").glob("*.svg")}
    assert set(drawn) == {"preference", "unpaired", "reward_models", "ppo"}, "and not the sft stage of this run"
    assert "dpo-0.1" in drawn["preference"]
    assert "dpo-0.3" in drawn["preference"]
    for figures in script.FIGURES.values():
        assert all((ROOT / f"docs/curves/{name}.svg").exists() for name in figures)
