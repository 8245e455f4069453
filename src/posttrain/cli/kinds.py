"""posttrain kinds"""

import json
from typing import Annotated, Any

import typer


def kinds(
    family: Annotated[str | None, typer.Argument(help="objective, tuner, task, ...")] = None,
    kind: Annotated[str | None, typer.Argument(help="One kind of that family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="{family: {kind: ...}} for programs.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="JSON Schema of recipes, for editors.")] = False,
) -> None:
    """What a recipe can say: families, their kinds, and one kind's formula, fields and defaults.

    Example: posttrain kinds objective grpo
    """
    from posttrain.component import did_you_mean
    from posttrain.errors import InputError
    from posttrain.pipeline.schema import catalogue, families, json_schema

    if schema:
        print(json.dumps(json_schema(), indent=1))
        return
    found: dict[str, Any] = catalogue()
    if family is not None and family not in found:
        raise InputError(f"there is no family {family!r}{did_you_mean(family, found)}")
    if kind is not None and family is not None and kind not in found[family]:
        raise InputError(f"family {family} has no kind {kind!r}{did_you_mean(kind, found[family])}")
    if as_json:
        print(
            json.dumps(
                found if family is None else {family: found[family] if kind is None else {kind: found[family][kind]}}, indent=1
            )
        )
    elif family is None:
        for name in families():
            print(f"{name:10} {', '.join(found[name])}")
    elif kind is None:
        for name, each in found[family].items():
            print(f"{name:18} {each['about'].partition(chr(10))[0]}")
    else:
        print(card(family, kind, found[family][kind]))


def card(family: str, kind: str, facts: dict[str, Any]) -> str:
    """One kind for people."""
    lines = [f"{family} {kind}", "", facts["about"], ""]
    for name, field in facts["fields"].items():
        default = "required" if field.get("required") else json.dumps(field["default"])
        lines += [f"  {name}: {field['type']} = {default}", f"      {field['about']}"]
    return "\n".join(lines).rstrip()
