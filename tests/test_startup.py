"""What is not there when a command starts: no library is imported before something needs it. Nothing is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import make

from posttrain.component import Component
from posttrain.data.format import Unusable
from posttrain.data.render import Template
from posttrain.text import Conversation, Message

RECIPE = """\
model: posttrain:tiny-base
objective: sft
data:
  sources: {kind: inline, items: [{prompt: a, completion: b}]}
steps: 1
"""
COMMAND = """
import json, sys
from posttrain.cli import main
sys.argv = ["posttrain", *WORDS]
try:
    main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""
FIRST_STEP = """
import gc, json, sys
from posttrain import Recipe, draws, run

def order(*_):  # the first shuffle is drawn when the first step begins
    print(json.dumps([gc.isenabled(), gc.get_freeze_count() > 100_000, *{name.partition(".")[0] for name in sys.modules}]))
    sys.exit()

draws.generator = order
run("recipe.yaml")
"""


def printed(code: str, folder: Path) -> list:
    """What a new interpreter prints last, as JSON."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], {"pydantic", "yaml", "numpy", "torch", "transformers", "jinja2"}),
        (["run", "wrong.yaml"], {"numpy", "torch", "transformers", "tokenizers", "jinja2", "rich"}),
    ],
    ids=["help", "refusal"],
)
def test_a_command_that_loads_no_model_imports_no_library_for_it(words, absent, tmp_path):
    (tmp_path / "wrong.yaml").write_text(RECIPE.replace("steps", "stps"))
    assert not absent & set(printed(COMMAND.replace("WORDS", repr(words)), tmp_path))


def test_what_only_other_runs_or_the_report_need_is_not_there_at_the_first_step(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    collects, set_aside, *loaded = printed(FIRST_STEP, tmp_path)
    assert "torch" in loaded
    assert not {"matplotlib", "peft", "datasets", "pyarrow", "pandas", "math_verify", "typer"} & set(loaded)
    assert collects, "garbage is collected while a run trains"
    assert set_aside, "what the libraries brought is no part of that"


def test_a_conversation_of_one_answer_is_tokenized_once_and_its_prompt_once():
    seen = []

    class Counting:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __call__(self, text, **settings):
            seen.extend([text] if isinstance(text, str) else text)
            return self.tokenizer(text, **settings)

    plain = make("chatml")
    template = Template(Counting(plain))
    conv = Conversation((Message("user", "The cat"), Message("assistant", "sat on the mat")))
    seen.clear()
    assert template.conversation(conv) == Template(plain).conversation(conv)
    assert len(seen) == 2


def test_a_field_says_what_the_nearest_class_that_declares_it_says():
    class Shape(Component):
        """A family."""

        sides: int = 0
        """How many
        sides."""
        colour: str = "red"
        """Its colour."""

    class Square(Shape, kind="square"):
        """A kind."""

        sides: int = 4

    assert [Shape.meaning("sides"), Square.meaning("sides"), Square.meaning("colour")] == ["How many\nsides.", "", "Its colour."]
    properties = Square.model_json_schema()["properties"]
    assert "description" not in properties["sides"]
    assert properties["colour"]["description"] == "Its colour."


def test_rows_rendered_side_by_side_are_what_each_is_alone():
    template = Template(make("chatml"))
    turns = (
        Message("user", "The cat"),
        Message("assistant", "sat"),
        Message("user", "on the mat"),
        Message("assistant", "it sat"),
    )
    broken = (Message("user", "a <|im_end|> b"), Message("assistant", "c"))
    rows = [Conversation(each) for each in (turns, turns[:2], broken, turns[2:])] * 40
    made = list(template.together(template.making_conversation(row, "all") for row in rows))
    assert len(made) == len(rows)
    for row, found in zip(rows, made, strict=True):
        if row.messages is broken:
            assert isinstance(found, Unusable)
            assert str(found) == "a message spells the control token <|im_end|>"
        else:
            assert found == template.conversation(row)
