"""posttrain sample"""

import json
from typing import Annotated

import typer


def sample(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or posttrain:tiny-base.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; with --raw, the text to continue.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many samples.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    top_p: Annotated[
        float, typer.Option(min=1e-6, max=1.0, help="Keep the likeliest tokens that together have this probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k likeliest tokens; 0 keeps all.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue plain text, without the chat template (base models).")] = False,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, with tokens and log-probabilities.")] = False,
) -> None:
    """Sample answers from a model.

    Example: posttrain sample posttrain:tiny-base --raw "12 + 7 =" -n 4
    """
    from posttrain.pipeline.libraries import heavy_imports

    with heavy_imports():
        from posttrain.data.render import Template
        from posttrain.errors import InputError
        from posttrain.sampling import InProcess, Sampling
        from posttrain.sampling.engine import Request
        from posttrain.text import Message
        from posttrain.tuners.load import load

    loaded = load(model)
    template = Template(loaded.tokenizer, chat=not raw)
    asked = [*([Message("system", system)] if system else []), Message("user", prompt)]
    tokens = template.tokenizer.encode(prompt, add_special_tokens=True) if raw else template.prompt(asked)
    if not tokens:
        raise InputError("there is nothing to continue: give some text")
    plan = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    engine = InProcess().open(loaded.lm, plan, sorted(template.stop_ids), seed)
    for index in range(count):
        engine.add(Request(tuple(tokens), ("sample", prompt, index)))
    found = {}
    while (done := engine.next()) is not None:
        found[done.request.address[2]] = done
    for index in range(count):
        done = found[index]
        text = template.tokenizer.decode(done.tokens, skip_special_tokens=True)
        if as_json:
            row = {"index": index, "text": text, "stop": done.stop, "tokens": done.tokens, "logp": done.logp}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(text if count == 1 else f"[{index}] {text}")
