"""The commands as a user types them: what they print, and the status they end with."""

import json
import re
import sys

import pytest
from test_pipeline import TINY

from posttrain.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture
def posttrain(place, monkeypatch, capsys):
    """Runs a command in the folder with tiny.yaml; gives (exit status, printed, errors)."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["posttrain", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return command


@pytest.fixture(scope="module")
def model(place):
    from posttrain import run

    return run(place / "tiny.yaml", "stages.rl.steps=1", root=place / "runs").model("sft")


@pytest.mark.parametrize("command", ["run", "train", "data", "eval", "audit", "sample", "chat", "delta", "report", "kinds", "init"])
def test_every_command_helps_with_an_example(posttrain, command):
    status, out, _ = posttrain(command, "--help")
    assert status == 0
    assert f"Example: posttrain {command}" in " ".join(out.replace("│", " ").split())


def test_a_run_prints_the_table_and_the_reports_path_and_a_second_one_reuses_it(posttrain, place):
    status, out, err = posttrain("run", "tiny.yaml", "stages.sft.steps=2")
    assert (status, err) == (0, "")
    assert "sft: runs (has not been run)" in out
    assert "pass@1" in out
    assert "report: runs/tiny/report.html" in out
    assert (place / "runs/tiny/report.html").stat().st_size > 5000
    status, out, _ = posttrain("run", "tiny.yaml", "stages.sft.steps=2")
    assert status == 0
    assert out.count("reused (nothing that decides it has changed)") == 5
    status, out, _ = posttrain("run", "tiny.yaml", "stages.sft.steps=2", "stages.rl.steps=3", "--dry-run")
    assert "rl: runs (steps 2 -> 3) -> runs/tiny/rl-" in out


def test_a_wrong_recipe_ends_with_2_and_a_line(posttrain):
    status, out, err = posttrain("run", "tiny.yaml", "stages.sft.stps=2")
    assert status == 2
    assert err == "error: command line `stages.sft.stps=2`: stages.sft.stps: no such setting; did you mean 'steps'?\n"
    assert out == ""
    assert posttrain("run", "nowhere.yaml")[0] == 2


def test_train_refuses_a_pipeline(posttrain):
    status, _, err = posttrain("train", "tiny.yaml")
    assert status == 2
    assert "holds the stages new, sft, rl, test, sft_test; use `posttrain run` for a pipeline" in err


def test_kinds_lists_families_kinds_and_one_kind(posttrain):
    assert re.search(r"^objective  .*\bgrpo, .*\bpretrain, .*\bsft, ", posttrain("kinds")[1], re.M)
    assert posttrain("kinds", "objective")[1].splitlines()[0].startswith("apo_down ")
    card = posttrain("kinds", "objective", "grpo")[1]
    assert "clip_low: float = 0.2" in card
    assert "arXiv 2402.03300" in card
    assert json.loads(posttrain("kinds", "--json")[1])["tuner"]["lora"]["fields"]["rank"]["default"] == 16
    assert "Objective.sft" in json.loads(posttrain("kinds", "--schema")[1])["$defs"]
    status, _, err = posttrain("kinds", "objective", "grpp")
    assert (status, err) == (2, "error: family objective has no kind 'grpp'; did you mean 'grpo'?\n")


def test_data_counts_what_is_usable_and_shows_what_the_model_sees(posttrain, place, model):
    rows = [{"prompt": [{"role": "user", "content": "1 + 2"}], "completion": "1 + 2 = 3"}, {"prompt": "a", "completion": ""}]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, out, _ = posttrain("data", "rows.jsonl", "--model", model)
    assert status == 0
    assert "1 of 2 rows are usable" in out
    assert "dropped 1: empty completion (first: rows.jsonl:2)" in out
    assert "<|user|>1 + 2<|end_of_turn|><|assistant|>⟦1 + 2 = 3<|end_of_turn|>⟧" in out
    found = json.loads(posttrain("data", "rows.jsonl", "--model", model, "--json")[1])
    assert found["usable"] == 1
    assert found["dropped"] == {"empty completion": {"count": 1, "first": "rows.jsonl:2"}}
    status, _, err = posttrain("data", "rows.jsonl", "--model", model, "--format", "messages")
    assert status == 2
    assert 'rows.jsonl:1: format messages needs the column "messages"' in err


def test_sampling_repeats_under_a_seed_and_reports_log_probabilities(posttrain, model):
    words = ("sample", model, "1 + 2", "-n", 3, "--max-tokens", 5, "--json")
    status, out, _ = posttrain(*words)
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert all(len(row["tokens"]) == len(row["logp"]) <= 5 and max(row["logp"]) <= 0 for row in rows)
    assert posttrain(*words)[1] == out
    assert posttrain(*words, "--seed", 1)[1] != out


def test_eval_prints_figures_with_intervals(posttrain, place, model):
    (place / "problems.jsonl").write_text('{"id": "a", "prompt": "1 + 2", "answer": "3"}\n')
    words = ("eval", model, "arithmetic", "task.source=problems.jsonl", "evaluation.samples=2", "evaluation.sampling.max_tokens=5")
    status, out, _ = posttrain(*words)
    assert status == 0
    assert out.startswith("pass@1")
    metrics = json.loads(posttrain(*words, "--json")[1])["metrics"]
    assert 0 <= metrics["pass@1"]["low"] <= metrics["pass@1"]["high"] <= 1


def test_chat_answers_and_streams_what_it_would_have_sampled(posttrain, model, monkeypatch):
    said = iter(["1 + 2", "/new", "1 + 2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    status, out, _ = posttrain("chat", model, "--temperature", 0, "--max-tokens", 6)
    assert status == 0
    answers = [line for line in out.splitlines()[1:] if line]
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_chat_says_where_a_conversation_is_longer_than_the_context_and_goes_on(posttrain, model, monkeypatch):
    from posttrain import sampling
    from posttrain.data.render import Template
    from posttrain.text import Message
    from posttrain.tuners.load import load

    said, asked, real = iter(["1 + 2 " * 200, "1 + 2", "/quit"]), [], sampling.Sampling
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    monkeypatch.setattr(sampling, "Sampling", lambda **settings: asked.append(settings["max_tokens"]) or real(**settings))
    status, out, err = posttrain("chat", model, "--temperature", 0, "--max-tokens", 300)
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines()[1:] if line]
    assert re.fullmatch(r"that would be [\d,]+ tokens, and the model reads \d+; say less, or begin with /new", lines[0])
    loaded = load(model)
    assert asked == [loaded.lm.context - len(Template(loaded.tokenizer).prompt([Message("user", "1 + 2")]))], "what is left"
    assert len(lines) > 1, "and an answer follows"


def test_a_delta_is_made_and_chat_switches_between_it_and_the_base(posttrain, place, model, monkeypatch):
    from transformers import AutoTokenizer

    from posttrain import run
    from posttrain.models import delta_file

    base = run(place / "tiny.yaml", "stages.rl.steps=1", root=place / "runs").model("new")
    (place / "rows.jsonl").write_text('{"prompt": "1 + 2", "completion": "3"}\n{"prompt": "2 + 2", "completion": "4"}\n')
    status, out, err = posttrain("delta", model, base, "data=rows.jsonl", "steps=2", "--out", "a.bitdelta")
    assert (status, err) == (0, "")
    assert re.search(r"matrices of the blocks +[\d,]+ bytes in 16 bits, +[\d,]+ as a delta: 1\d\.\d\d times smaller", out)
    assert re.search(r"KL\(fine-tuned \|\| it\) +base [\d.]+, delta as it begins [\d.]+, delta [\d.]+", out)
    assert (place / "a.bitdelta").stat().st_size > 1000
    template = AutoTokenizer.from_pretrained(model).chat_template
    assert delta_file.read(place / "a.bitdelta")[0]["chat_template"] == template
    said = iter(["1 + 2", "/delta b", "/delta base", "/new", "1 + 2", "/delta a", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    words = ("--temperature", 0, "--max-tokens", 6)
    status, out, _ = posttrain("chat", base, "--delta", "a.bitdelta", *words)
    assert status == 0
    lines = [line for line in out.splitlines()[1:] if line]
    assert lines[0] == "/delta NAME answers as a or base; now a"
    assert lines[2:4] == ["there is a and base: /delta a", "now base; the conversation goes on"]
    said = iter(["1 + 2", "/quit"])
    alone = [line for line in posttrain("chat", base, *words)[1].splitlines()[1:] if line]
    assert lines[4] == alone[0], "the base's own answer"
    status, _, err = posttrain("chat", model, "--delta", "a.bitdelta")
    assert status == 2
    assert "this delta was made on another model than" in err


def test_init_writes_a_recipe_that_loads_and_never_overwrites(posttrain, place):
    status, out, _ = posttrain("init", "mine.yaml")
    assert status == 0
    assert "next: posttrain run mine.yaml --dry-run" in out
    from posttrain import Recipe

    assert list(Recipe.load(place / "mine.yaml").stages) == ["train"]
    status, _, err = posttrain("init", "mine.yaml")
    assert (status, err) == (2, "error: mine.yaml: exists already; name another file\n")


def test_report_refuses_a_folder_that_is_no_run(posttrain):
    status, _, err = posttrain("report", "nowhere")
    assert status == 2
    assert "nowhere: holds no run" in err


def test_a_fault_of_our_own_ends_with_3_and_leaves_the_traceback_in_a_file(posttrain, place, monkeypatch):
    monkeypatch.setattr("posttrain.pipeline.schema.catalogue", lambda: 1 / 0)
    status, _, err = posttrain("kinds")
    assert status == 3
    assert "a fault of posttrain; the traceback is in posttrain-error.txt" in err
    assert "Traceback" not in err
    assert "ZeroDivisionError" in (place / "posttrain-error.txt").read_text()


def test_the_python_functions_keep_their_names_whatever_is_imported():
    import posttrain
    import posttrain.evaluation.evaluate
    import posttrain.training.fit
    from posttrain import Recipe, evaluate, load, run, train

    assert all(callable(each) for each in (Recipe, evaluate, load, run, train))
    assert posttrain.train is train


def test_training_and_evaluating_from_python(place, model, monkeypatch):
    from posttrain import evaluate, train

    rows = [{"prompt": [{"role": "user", "content": "1 + 2"}], "completion": "1 + 2 = 3"}]
    folder = train(
        root=place / "api", model=str(model), objective="sft", data={"sources": {"kind": "inline", "items": rows}}, steps=30,
        optim={"learning_rate": 0.02, "schedule": "constant", "warmup": 0}, batch={"rows": 1},
    )  # fmt: skip
    problems = {"kind": "arithmetic", "source": {"kind": "inline", "items": [{"id": "a", "prompt": "1 + 2", "answer": "3"}]}}
    report = evaluate(folder, problems, samples=4, sampling={"max_tokens": 16})
    assert report.figures["greedy"].value == 1.0
    assert report.figures["pass@1"].value > 0.5


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda p: p.train(model="m", objective="sftt", data="x.jsonl"), "posttrain.train: objective: unknown objective 'sftt'; did"),
        (lambda p: p.train(model="m", objective="sft", data="x.jsonl", stepps=1), "posttrain.train: stepps: no such setting; did you"),
        (lambda p: p.evaluate("m", "arithmetik"), "posttrain.evaluate: task: unknown task 'arithmetik'; did you mean 'arithmetic'?"),
        (lambda p: p.evaluate("m", "arithmetic", sample=2), "posttrain.evaluate: sample: no such setting; did you mean"),
    ],
)
def test_the_python_functions_say_what_is_wrong_as_the_command_line_does(call, said):
    import posttrain
    from posttrain.errors import RecipeError

    with pytest.raises(RecipeError) as error:
        call(posttrain)
    assert str(error.value).startswith(said)


def test_data_may_be_no_more_than_a_file():
    from pathlib import Path

    from posttrain.data.dataset import Data
    from posttrain.pipeline.recipe import Recipe

    assert Data.model_validate(Path("rows.jsonl")) == Data.model_validate("rows.jsonl")
    plain, whole = (
        Recipe.parse(f"model: m\nobjective: sft\ndata: {data}\nepochs: 1\n").stages["train"].data
        for data in ("rows.jsonl", "{sources: [{kind: file, path: rows.jsonl}]}")
    )
    assert plain == whole
    assert Recipe.parse("model: m\nobjective: sft\ndata: [a.jsonl, b.jsonl]\nepochs: 1\n").stages["train"].data.sources[1].path == "b.jsonl"
