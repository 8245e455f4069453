"""What the sandbox holds: attacks by programs that want to be taken for right, to get out, or to stay; and what is left of them."""

import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.sandbox import seccomp
from posttrain.tasks import CodeGrader
from posttrain.text import Message, Problem
from tests.attacks import ATTACKS, HONEST, WRONG, hidden

TESTS = ["assert add(2, 3) == 5", "assert add(10, -4) == 6", "assert add(0, 0) == 0"]
ADD = Problem("add", (Message("user", "?"),), None, {"tests": TESTS}, "attacks:1")
CALLS = [{"call": "add", "args": [a, b], "expected": a + b} for a, b in ((2, 3), (10, -4), (0, 0))]
ADD_BY_CALLS = Problem("add", (Message("user", "?"),), None, {"tests": CALLS}, "attacks:2")
ROOT = Path(__file__).parents[1]


def score(sandbox, program, asked=ADD):
    return CodeGrader(sandbox=sandbox)._guarded(asked, program).score


def said(attack, sandbox, wrapped):
    """Its name, and whether it earns what it should; what should earn nothing may take as long as it likes."""
    sandbox = sandbox.model_copy(update={"seconds": 1.0 if attack.score == 0 else 4.0})
    found = score(sandbox, hidden(attack.code) if wrapped else attack.code)
    return attack.name, found in {0.0, 1.0} if attack.score is None else found == attack.score


SINGLE = [each for each in ATTACKS if each.group != "persistence"]


@pytest.mark.parametrize("attack", SINGLE, ids=lambda each: f"{each.group}-{each.name}")
def test_an_attack_is_contained_and_earns_what_it_should(attack, isolated):
    """Every second one is hidden in base64, so that nothing depends on how it looks; `-m slow` hides the others."""
    wrapped = SINGLE.index(attack) % 2 == 1
    assert said(attack, isolated, wrapped)[1]


LINES = [each for each in SINGLE if each.score == 0 and each.group == "forge"]


@pytest.mark.parametrize(
    "attack", [each if index % 4 == 0 else pytest.param(each, marks=pytest.mark.slow) for index, each in enumerate(LINES)],
    ids=lambda each: each.name,
)  # fmt: skip
def test_calls_are_no_easier_to_be_forged_than_asserts(attack, isolated):
    assert score(isolated.model_copy(update={"seconds": 1.0}), attack.code, ADD_BY_CALLS) == 0


@pytest.mark.slow
@pytest.mark.parametrize("attack", SINGLE, ids=lambda each: f"{each.group}-{each.name}")
def test_it_is_so_in_the_other_dress_too(attack, isolated):
    wrapped = SINGLE.index(attack) % 2 == 0
    assert said(attack, isolated, wrapped)[1]


def test_nothing_passes_from_one_program_to_the_next_and_nothing_is_left(isolated):
    """What stays behind would be found by the attack that follows it, or by us."""
    persistent = [each for each in ATTACKS if each.group == "persistence"]
    assert len(persistent) > 10
    before = traces()
    found = dict(said(each, isolated, wrapped=False) for each in persistent)
    assert [name for name, right in found.items() if not right] == []
    time.sleep(0.2)
    assert traces() == before


def traces():
    """What programs could leave on this machine: descriptors of ours, mounts, files, processes of the slots' users and of ours."""
    mounts = Path("/proc/self/mountinfo").read_text().count("\n")
    files = {each.name for folder in ("/tmp", "/dev/shm", "/var/tmp") for each in Path(folder).iterdir() if owner(each) >= 200_000}
    return len(os.listdir("/proc/self/fd")), mounts, files, children(os.getpid())


def owner(path):
    try:
        return path.lstat().st_uid
    except OSError:
        return 0


def children(process):
    return len(Path(f"/proc/{process}/task/{process}/children").read_text().split())


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_program_is_right(name, isolated):
    assert score(isolated, HONEST[name]) == score(isolated, HONEST[name], ADD_BY_CALLS) == 1
    assert score(isolated, hidden(HONEST[name])) == 1


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_program_is_wrong(name, isolated):
    assert score(isolated, WRONG[name]) == 0


def test_a_whole_program_is_held_too(isolated):
    spy = "import os\ntry:\n    open('/etc/passwd').read()\n    print('out')\nexcept OSError:\n    print('held', sorted(os.listdir('/tmp')))"
    asked = Problem("p", (Message("user", "?"),), None, {"tests": [{"input": "", "output": "held []"}]}, "f:1")
    assert CodeGrader(sandbox=isolated).grade(asked, spy).score == 1


def test_no_program_outlives_a_harness_that_is_killed(isolated):
    marked = 517  # MB: by this limit its processes are known
    code = (
        "from posttrain.tasks import CodeGrader; from posttrain.sandbox import Bubblewrap; from posttrain.text import *\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from tests.attacks import ATTACKS\n"
        f"grader = CodeGrader(sandbox=Bubblewrap(seconds=60, memory={marked}))\n"
        "asked = Problem('p', (), None, {'tests': ['assert add(2, 3) == 5']}, 'f:1')\n"
        "staying = next(each.code for each in ATTACKS if each.name == 'outlives-the-harness')\n"
        "with ThreadPoolExecutor(4) as pool: list(pool.map(lambda code: grader.grade(asked, code), ['while True: pass', staying] * 2))\n"
    )
    harness = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: len(running(marked)) >= 4, 60)
    harness.send_signal(signal.SIGKILL)
    harness.wait()
    wait_until(lambda: not running(marked), 2)


def running(marked):
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                words = (each / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(marked << 20).encode() in words and (each / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(each.name))
    return found


def wait_until(true, seconds):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_holds_for_a_user_who_is_not_root(isolated):
    python = Path("/usr/bin/python3")
    if os.geteuid() != 0:
        pytest.skip("everything here runs so already")
    if not python.exists() or os.path.realpath(python)[-4:] != f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip("needs the system's Python in this version, which another user can read")
    code = (
        "import os; from posttrain.sandbox import Bubblewrap; from tests.test_sandbox import *\n"
        "assert os.geteuid() == 65534; sandbox = Bubblewrap(seconds=3); sandbox.check()\n"
        "chosen = [a for a in ATTACKS if any(word in a.name for word in ('process', 'fork', 'thread', 'socket', 'kernel', 'passwd'))]\n"
        "assert len(chosen) > 5\n"
        "print([a.name for a in chosen if not said(a, sandbox, False)[1]], score(sandbox, HONEST['recursive']))\n"
    )
    places = os.pathsep.join([str(ROOT), str(ROOT / "src"), next(each for each in sys.path if each.endswith("site-packages"))])
    environment = {"PYTHONPATH": places, "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    done = subprocess.run(
        [str(python), "-c", code], user=65534, group=65534, extra_groups=[], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout == "[] 1.0\n", done.stderr[-2000:]


# ---- the filter of system calls


def decided(program, machine, number, first=0):
    """What the filter says of a call: a small interpreter of the instructions that it is made of."""
    steps = [struct.unpack("=HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    data = {0: number, 4: seccomp.ARCHITECTURES[machine][1] if machine in seccomp.ARCHITECTURES else 0, 16: first}
    held = at = 0
    while True:
        code, if_true, if_false, value = steps[at]
        if code == seccomp.RETURN:
            return value
        if code == seccomp.LOAD:
            held = data[value]
        else:
            true = {seccomp.EQUAL: held == value, seccomp.AT_LEAST: held >= value, seccomp.ANY_BIT: bool(held & value)}[code]
            at += if_true if true else if_false
        at += 1


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_names_and_lets_the_rest_pass(machine):
    program, column = seccomp.filter_of(machine), seccomp.ARCHITECTURES[machine][0]
    refused = seccomp.ERRNO | seccomp.EPERM
    for numbers in seccomp.REFUSED.values():
        if numbers[column] is not None:
            assert decided(program, machine, numbers[column]) == refused
    for numbers in {"read": (0, 63), "write": (1, 64), "mmap": (9, 222), "execve": (59, 221), "exit_group": (231, 94)}.values():
        assert decided(program, machine, numbers[column]) == seccomp.ALLOW
    assert decided(program, machine, seccomp.CLONE[column], first=0x00010F00) == seccomp.ALLOW  # a thread
    assert decided(program, machine, seccomp.CLONE[column], first=0x10000000) == refused  # a namespace of users
    assert decided(program, machine, seccomp.CLONE3[column]) == seccomp.ERRNO | seccomp.ENOSYS
    assert decided(program, "another", 0) == seccomp.KILL
    if machine == "x86_64":
        assert decided(program, machine, seccomp.X32 | 1) == refused


def test_a_machine_without_a_filter_is_named(monkeypatch):
    from posttrain.sandbox import sandbox as module

    module._what_is_missing.cache_clear()
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/bwrap")
    assert "no filter of system calls for the architecture 'riscv64'" in module._what_is_missing(None)
    module._what_is_missing.cache_clear()


@pytest.mark.parametrize("where", ["socket", "unshare"])
def test_a_sandbox_that_lets_something_through_is_refused(where, isolated, monkeypatch):
    from posttrain.sandbox import sandbox as module

    module._what_is_missing.cache_clear()
    monkeypatch.setitem(seccomp.REFUSED, where, (None, None))
    assert "a program in the sandbox" in module._what_is_missing(None)
    module._what_is_missing.cache_clear()
