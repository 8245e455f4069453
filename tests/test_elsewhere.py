"""Sandboxes that others run, by a command and by a service that stand in for them and do run the programs, in a process."""

import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from posttrain.errors import RecipeError
from posttrain.sandbox import Container, Sandbox, Service
from posttrain.tasks import CodeGrader
from posttrain.text import Message, Problem, Sample

ENGINE = """#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "run":
    if "there:1" not in sys.argv:
        sys.exit("no such image")
    rest = sys.argv[sys.argv.index("there:1") + 1 :]
    if rest[:3] == ["timeout", "-s", "KILL"]:
        rest = [sys.executable, *rest[5:]]
    os.execv(rest[0], rest)
"""
RIGHT, WRONG = "def add(a, b):\n    return a + b", "def add(a, b):\n    return a - b"
HOSTILE = "import sys, os\nclass Same(int):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    print('all tests passed'); return Same(3)"
FORMS = {
    "assert": ["assert add(2, 3) == 5", "assert add(0, 0) == 0"],
    "call": [{"call": "add", "args": [2, 3], "expected": 5}],
    "output": [{"input": "2 3\n", "output": "5"}],
}


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A `docker` that runs what it is given without isolation; the file that it writes its arguments to."""
    log = tmp_path / "log"
    script = tmp_path / "bin" / "docker"
    script.parent.mkdir()
    script.write_text(ENGINE.format(python=sys.executable, log=str(log)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    return log


class Fusion(http.server.BaseHTTPRequestHandler):
    """Answers `run_code` as SandboxFusion does."""

    asked: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        result = {"status": "Finished", "execution_time": 0.1}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", body["code"]], input=body["stdin"], capture_output=True, text=True,
                timeout=body["run_timeout"], check=False,
            )  # fmt: skip
            result |= {"stdout": done.stdout, "stderr": done.stderr, "return_code": done.returncode}
        except subprocess.TimeoutExpired:
            result |= {"status": "TimeLimitExceeded", "stdout": "", "stderr": ""}
        answer = json.dumps({"status": "Success", "message": "", "run_result": result}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fusion) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def graded(sandbox, program, form):
    grader = CodeGrader.model_validate({"sandbox": sandbox})
    grader.check()
    problem = Problem("p", (Message("user", "?"),), facts={"tests": FORMS[form]})
    return grader.grade(problem, program).score


def as_program(program, form):
    return f"{program}\nprint(add(*map(int, input().split())))" if form == "output" else program


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("program", "score"), [(RIGHT, 1.0), (WRONG, 0.0), (HOSTILE, 0.0)])
def test_a_container_runs_programs_with_its_flags(engine, program, score, form):
    sandbox = {"kind": "container", "image": "there:1", "seconds": 5}
    assert graded(sandbox, as_program(program, form), form) == score
    runs = [json.loads(line) for line in engine.read_text().splitlines()]
    first = runs[0]
    assert first[:3] == ["run", "--rm", "--interactive"]
    for flag, value in {
        "--runtime": "runsc", "--network": "none", "--user": "65534:65534", "--cap-drop": "ALL", "--pids-limit": "16",
        "--memory": "512m", "--security-opt": "no-new-privileges", "--tmpfs": "/tmp:size=16m,mode=1777", "--pull": "never",
    }.items():  # fmt: skip
        assert first[first.index(flag) + 1] == value
    assert "--read-only" in first
    started = {run[run.index("--name") + 1] for run in runs if run[0] == "run"}
    assert {run[1] for run in runs if run[0] == "kill"} == started  # each is ended by its name


def test_the_tests_of_a_second_program_have_a_container_of_their_own(engine):
    """One that was started earlier has fewer seconds to live."""
    grader = CodeGrader.model_validate({"sandbox": {"kind": "container", "image": "there:1", "seconds": 5}, "workers": 1})
    problem = Problem("p", (Message("user", "?"),), facts={"tests": FORMS["call"]})
    grades = grader.grade_all([Sample(problem, index, (), (), (), "end", RIGHT) for index in range(2)])
    assert [grade.score for grade in grades] == [1.0, 1.0]
    assert engine.read_text().count('["run"') == 4


def test_a_container_that_cannot_run_is_refused_with_what_the_engine_says(engine, monkeypatch):
    with pytest.raises(RecipeError, match="docker cannot run nowhere:2 here: no such image; is the image on this machine"):
        Container(image="nowhere:2", seconds=5).check()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RecipeError, match="podman is not installed"):
        Container(engine="podman").check()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("program", "score"), [(RIGHT, 1.0), (WRONG, 0.0), (HOSTILE, 0.0)])
def test_a_service_runs_programs_question_by_question(service, program, score, form):
    assert graded({"kind": "http", "url": service, "seconds": 10}, as_program(program, form), form) == score


def test_the_service_is_told_no_expected_value_where_the_program_runs(service):
    Fusion.asked.clear()
    graded({"kind": "http", "url": service, "seconds": 10}, RIGHT, "assert")
    with_program = [body for body in Fusion.asked if "return a + b" in body["stdin"]]
    assert with_program
    assert not [body for body in with_program if "== 5" in body["stdin"] + body["code"]]
    assert {body["language"] for body in Fusion.asked} == {"python"}


def test_a_program_that_takes_too_long_and_a_service_that_is_not_there(service):
    assert graded({"kind": "http", "url": service, "seconds": 2}, "def add(a, b):\n    while True: pass", "call") == 0.0
    with pytest.raises(RecipeError, match="runs no programs"):
        Service(url="http://127.0.0.1:9").check()
    with pytest.raises(ValueError, match="is no address"):
        Sandbox.model_validate({"kind": "http", "url": "localhost:80"})
