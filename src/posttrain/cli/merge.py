"""posttrain merge"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.compress.readback import Written


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Adapter folders: one, or several LoRAs of one model.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    weight: Annotated[list[float] | None, typer.Option(help="Of several: how much of each, in their order.")] = None,
    method: Annotated[
        str, typer.Option(help="Of several: linear (the weighted sum), ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "linear",
    density: Annotated[float | None, typer.Option(help="The share of each update that all methods but linear keep.")] = None,
    base: Annotated[str | None, typer.Option(help="The model below the adapters, where it is not where they say.")] = None,
    chat_template: Annotated[str | None, typer.Option(help="A file with a Jinja chat template to use instead of theirs.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Of several: write one adapter, and not a merged model.")] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Of --adapter; by default the sum of theirs.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default as the model below is stored.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides what dare drops.")] = 0,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Of quantised models: take the weights that their codes stand for.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Fold adapters into the model that they stand on. The folder is read back and compared.

    Example: posttrain merge runs/a/sft-*/adapter runs/b/sft-*/adapter --weight 0.7 --weight 0.3 --out merged
    """
    from posttrain.api import merge as write
    from posttrain.errors import InputError
    from posttrain.pipeline.libraries import heavy_imports
    from posttrain.tuners.mix import METHODS

    if method not in METHODS:
        raise InputError(f"method {method!r}: there is no such; take one of {', '.join(METHODS)}")
    with heavy_imports():
        import posttrain.compress.export  # noqa: F401
    written = write(adapters, out, weight or None, method, density, base, chat_template, adapter, rank, dtype, dequantize, seed)  # type: ignore[arg-type]
    tell(written, as_json)


def tell(written: "Written", as_json: bool) -> None:
    print(json.dumps(written.as_dict()) if as_json else "\n".join(written.lines()))
