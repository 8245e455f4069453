"""What the docs say is what the code does."""

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


def test_every_objective_has_a_page_with_equation_function_recipe_and_curve():
    from posttrain.objectives import Objective

    for kind in (kind for kind in Objective.kinds if ":" not in kind):
        text = (ROOT / f"docs/{kind}.md").read_text()
        for word in ("**Equation", "**Function.**", "**Recipe.**", "**Curve.**"):
            assert word in text, f"docs/{kind}.md lacks {word}"
