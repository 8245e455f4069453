"""posttrain chat"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.data.render import Template
    from posttrain.models.source import ModelSource
    from posttrain.sampling.engine import Engine

BASE = "base"  # what a model without its deltas is called


def chat(
    model: Annotated[str, typer.Argument(help="A model folder, a hub name, or posttrain:tiny-base.")],
    delta: Annotated[list[Path] | None, typer.Option(help="A delta on this model, from `posttrain delta`; several.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and questions give the same answers.")] = 0,
) -> None:
    """Talk to a model in the terminal; answers appear as they are written. /new begins anew, /quit ends.

    With deltas, /delta NAME answers as that fine-tuned model from here on, /delta base as the model itself.
    Example: posttrain chat runs/quickstart/grpo-*/model --temperature 0
    """
    from posttrain.errors import TemplateError
    from posttrain.pipeline.libraries import heavy_imports

    with heavy_imports():
        from posttrain.data.render import Template
        from posttrain.models.delta import switch
        from posttrain.models.delta_file import tokenizer_with
        from posttrain.models.source import ModelSource
        from posttrain.sampling import InProcess, Sampling
        from posttrain.sampling.engine import Request
        from posttrain.text import Message
        from posttrain.tuners.load import load

    loaded = load(model)
    names = add_deltas(loaded.lm.model, delta, ModelSource(path=model)) if delta else []
    tokenizers = {BASE: loaded.tokenizer}
    tokenizers |= {name: tokenizer_with(file, loaded.tokenizer) for name, file in zip(names, delta or (), strict=True)}
    template = Template(tokenizers[names[0] if names else BASE])
    start = [Message("system", system)] if system else []
    messages, turn = list(start), 0
    print("type a message; /new begins anew, /quit ends")
    if names:
        print(f"/delta NAME answers as {', '.join(names)} or {BASE}; now {names[0]}")
    while True:
        try:
            said = input("\nyou> ").strip()
        except EOFError:
            print()
            return
        if said == "/quit":
            return
        if said == "/new":
            messages = list(start)
            continue
        if not said:
            continue
        if names and said.split()[0] == "/delta":
            chosen = said.removeprefix("/delta").strip()
            if chosen not in tokenizers:
                print(f"there is {', '.join(names)} and {BASE}: /delta {names[0]}")
                continue
            try:
                template = Template(tokenizers[chosen])
            except TemplateError as error:
                print(f"{chosen}: {error}")
                continue
            switch(loaded.lm.model, None if chosen == BASE else chosen)
            print(f"now {chosen}; the conversation goes on")
            continue
        prompt = template.prompt([*messages, Message("user", said)])
        room = max_tokens if loaded.lm.context is None else min(max_tokens, loaded.lm.context - len(prompt))
        if room < 1:
            print(f"that would be {len(prompt)} tokens, and the model reads {loaded.lm.context}; say less, or begin with /new")
            continue
        messages.append(Message("user", said))
        turn += 1
        plan = Sampling(max_tokens=room, temperature=temperature)
        engine = InProcess(rows=1).open(loaded.lm, plan, sorted(template.stop_ids), seed)
        engine.add(Request(tuple(prompt), ("chat", turn)))
        messages.append(Message("assistant", _stream(engine, template)))


def add_deltas(model: "PreTrainedModel", files: "list[Path]", base: "ModelSource") -> list[str]:
    """Puts deltas onto a model, the first of them active; returns their names: of files their own, of a stage's model its.

    Raises ModelError for what is no delta of this model, and for names that are taken.
    """
    from posttrain.errors import ModelError
    from posttrain.models.delta import switch
    from posttrain.models.delta_file import add_file

    names = [(file.parent.name if file.name == "model" and file.is_dir() else file.stem) for file in files]
    if BASE in names:
        raise ModelError(f"{files[names.index(BASE)]}: {BASE} is the model without a delta; give the file another name")
    for name, file in zip(names, files, strict=True):
        add_file(model, file, name, base)
    switch(model, names[0])
    return names


def _stream(engine: "Engine", template: "Template") -> str:
    """Prints an answer as it grows, holding back bytes that are not yet whole characters."""
    shown = ""
    while (text := engine.partial()) is not None:
        written = template.tokenizer.decode(text, skip_special_tokens=True)
        if not written.endswith("\ufffd") and len(written) > len(shown):
            print(written[len(shown) :], end="", flush=True)
            shown = written
    done = engine.next()
    assert done is not None
    written = template.tokenizer.decode(done.tokens, skip_special_tokens=True)
    print(written[len(shown) :] + ("" if done.stop == "end" else " ..."), flush=True)
    return written
