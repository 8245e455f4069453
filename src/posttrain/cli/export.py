"""posttrain export"""

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[str, typer.Argument(help="A model folder, an adapter folder, a hub name, or posttrain:tiny-base.")],
    out: Annotated[Path, typer.Argument(help="What to write: a folder; of gguf and bitdelta a file.")],
    form: Annotated[
        str,
        typer.Option("--format", help="folder (transformers; adapters merged), peft (an adapter), bitdelta, gguf (llama.cpp)."),
    ] = "folder",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16; gguf: also q8_0, q5_1, q5_0, q4_1, q4_0. By default as it is stored."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model below an adapter, where it is not where the adapter says.")] = None,
    tokenizer: Annotated[
        bool, typer.Option("--tokenizer/--no-tokenizer", help="Of gguf: whether the tokenizer is in the file.")
    ] = True,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Of quantised models: take the weights that their codes stand for.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Write a model for other programs. What was written is read back and compared.

    Example: posttrain export runs/support/sft-*/model support.gguf --format gguf --dtype q8_0
    """
    from posttrain.api import export as write
    from posttrain.cli.merge import tell
    from posttrain.pipeline.libraries import heavy_imports

    with heavy_imports():
        import posttrain.compress.export  # noqa: F401
    tell(write(model, out, form, dtype, base, tokenizer, dequantize), as_json)
