"""What asks a JSON Schema about a value, in the process of a worker: patterns and comparisons of a schema can take for ever.

A question is {"schema": schema, "value": JSON as text}, what comes back {"allowed": bool} or {"failure": why nobody can say}.
"""

import json
from collections.abc import Callable
from typing import Any


def begin() -> Callable[[dict[str, Any]], dict[str, Any]]:
    from jsonschema import Draft202012Validator
    from referencing import Registry

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        schema = Draft202012Validator(question["schema"], registry=Registry())  # which fetches nothing
        try:
            return {"allowed": schema.is_valid(json.loads(question["value"]))}
        except (ArithmeticError, RecursionError, ValueError):  # a number, or a depth, that nothing allows
            return {"allowed": False}
        except Exception as error:
            return {"failure": f"its schema cannot be asked: {type(error).__name__}: {error}"[:300]}

    return answer
