"""What calls math-verify, in the process of a worker.

A question is {"gold": text, "answers": [text]}, what comes back {"readable": bool, "right": [bool]}.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any


def begin() -> Callable[[dict[str, Any]], dict[str, Any]]:
    from math_verify import LatexExtractionConfig, parse, verify

    reading = {"extraction_config": [LatexExtractionConfig()], "fallback_mode": "no_fallback", "parsing_timeout": None}
    comparing = {"float_rounding": 12, "allow_set_relation_comp": True, "timeout_seconds": None}

    def read(text: str) -> list[Any]:
        return list(parse(f"\\boxed{{{text}}}", **reading))

    read_gold = lru_cache(maxsize=4096)(read)
    verify(read("\\frac{1}{2}"), read("x+1"), **comparing)  # what the first call loads is loaded now

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        gold = read_gold(question["gold"])
        right = [verify(gold, read(answer), **comparing) for answer in question["answers"]]
        return {"readable": bool(gold), "right": [bool(each) for each in right]}

    return answer
