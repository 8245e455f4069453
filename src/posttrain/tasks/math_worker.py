"""The process that calls math-verify; run as a script by `mathematics.py`, never imported.

One line of JSON in, {"gold": text, "answers": [text], "seconds": CPU time}, one line out, {"readable": bool, "right": [bool]}.
Over its CPU time, or its memory, the process is killed by the kernel, also inside a long call of C code.
"""

import json
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any

MEMORY = 2 << 30


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    from math_verify import LatexExtractionConfig, parse, verify

    reading = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback", "parsing_timeout": None}

    comparing = {"float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": None}

    def read(text: str) -> list[Any]:
        return list(parse(f"\\boxed{{{text}}}", **reading))

    read_gold = lru_cache(maxsize=4096)(read)
    verify(read("\\frac{1}{2}"), read("x+1"), **comparing)  # what the first call loads is loaded now
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    print("ready", file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads it from here on
    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, question["seconds"])
        gold = read_gold(question["gold"])
        right = [verify(gold, read(answer), **comparing) for answer in question["answers"]]
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"readable": bool(gold), "right": [bool(each) for each in right]}), file=replies, flush=True)


if __name__ == "__main__":
    main()
