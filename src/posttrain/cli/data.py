"""posttrain data"""

import json
from typing import Annotated, Any

import typer


def data(
    file: Annotated[str, typer.Argument(help="A data file, or posttrain:data/NAME for one that comes with posttrain.")],
    format: Annotated[
        str | None, typer.Option(help="A kind, such as preference, or a mapping as in a recipe; found if not given.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="The model whose tokenizer and template render the examples.")
    ] = "posttrain:tiny-base",
    fields: Annotated[
        list[str] | None, typer.Option("--field", help="wanted=column, where a column is called otherwise.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest row in tokens.")] = 1024,
    show: Annotated[int, typer.Option(help="How many examples to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Read a data file: how many rows are usable, what was dropped and why, and a few as the model will see them.

    Example: posttrain data train.jsonl --format prompt_completion --field completion=response
    or: posttrain data posttrain:data/reviews_test.jsonl.gz --format '{kind: labelled, good: positive}'
    """
    from pydantic import ValidationError

    from posttrain import yaml
    from posttrain.data.dataset import Data, describe
    from posttrain.errors import DataError

    if bad := [pair for pair in fields or [] if "=" not in pair]:
        raise DataError(f"--field {bad[0]}: write it as wanted=column")
    section: dict[str, Any] = {"sources": {"kind": "file", "path": file}, "max_tokens": max_tokens}
    if format is not None:
        given = yaml.parse(f"format: {format}", "--format").value["format"]
        named = dict(given) if isinstance(given, dict) else {"kind": given}
        mapped = dict(pair.split("=", 1) for pair in fields or [])
        section["format"] = {**named, "fields": {**named.get("fields", {}), **mapped}}
    elif fields:
        raise DataError("--field goes with --format: say which format's field it is")
    try:
        wanted = Data.model_validate(section)
    except ValidationError as error:
        raise DataError("; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())) from None
    wanted.check()
    found = describe(wanted, template_of(model, wanted), show)
    if as_json:
        print(json.dumps(found.as_dict(), ensure_ascii=False, indent=1))
    else:
        print("\n".join(found.lines()))


def template_of(model: str, data: Any) -> Any:
    """The template of a model, without its weights."""
    from posttrain.pipeline.libraries import heavy_imports

    with heavy_imports():
        from transformers import AutoTokenizer

    from posttrain.data.render import Template
    from posttrain.errors import ModelError
    from posttrain.models.source import ModelSource

    folder = ModelSource(path=model).folder()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder or model))
    except (OSError, ValueError) as error:
        raise ModelError(f"{model}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    return Template(tokenizer, chat=data.read().needs_chat)
