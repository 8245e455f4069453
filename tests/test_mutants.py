"""The tests are tested: each breakage of mutants/table.py, in a copy of the source, makes its named test fail."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants.table import MUTANTS

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "src" / "posttrain"
NOT_COPIED = ("__pycache__", "tiny-base", ".mypy_cache")


@pytest.fixture(scope="module")
def nursery():
    """Imports the libraries once; each test runs in a child of its own, whose posttrain is the copy."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    with subprocess.Popen(
        [sys.executable, str(TESTS / "mutants" / "nursery.py")],
        cwd=TESTS.parent, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        process.stdin.close()


def outcome(nursery, source, test, log):
    """(exit status of pytest, what it printed)"""
    nursery.stdin.write(json.dumps({"source": str(source), "test": str(TESTS / test), "log": str(log)}) + "\n")
    nursery.stdin.flush()
    return json.loads(nursery.stdout.readline())["status"], log.read_text(encoding="utf-8")


def test_there_are_breakages_of_every_part_of_the_house():
    assert len(MUTANTS) >= 15
    assert len({mutant.trap for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.file.partition("/")[0] for mutant in MUTANTS} >= {
        "losses", "data", "models", "tuners", "objectives", "sampling", "training",
    }  # fmt: skip


def test_every_breakage_changes_one_place_of_the_source():
    """Of the whole table in every run: a text that moved on would be found only when the grid comes to its case."""
    counts = {mutant.trap: (SOURCE / mutant.file).read_text(encoding="utf-8").count(mutant.old) for mutant in MUTANTS}
    assert {trap: count for trap, count in counts.items() if count != 1} == {}


def test_an_unbroken_copy_passes(nursery, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src" / "posttrain", ignore=shutil.ignore_patterns(*NOT_COPIED))
    status, shown = outcome(nursery, tmp_path / "src", MUTANTS[0].test, tmp_path / "log")
    assert (status, "1 passed" in shown) == (pytest.ExitCode.OK, True), shown[-2000:]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.trap.replace(" ", "-"))
def test_a_breakage_makes_its_named_test_fail(mutant, nursery, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src" / "posttrain", ignore=shutil.ignore_patterns(*NOT_COPIED))
    file = tmp_path / "src" / "posttrain" / mutant.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    status, shown = outcome(nursery, tmp_path / "src", mutant.test, tmp_path / "log")
    # 1: a test ran and failed. An error of import or collection, or a test that does not exist, is another status
    assert status == pytest.ExitCode.TESTS_FAILED, f"not seen: {mutant.trap}\n{shown[-2000:]}"
    assert " error" not in shown.splitlines()[-1], shown[-2000:]
