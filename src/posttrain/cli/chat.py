"""posttrain chat"""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.data.render import Template
    from posttrain.sampling.engine import Engine


def chat(
    model: Annotated[str, typer.Argument(help="A model folder or a hub name.")],
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed and questions give the same answers.")] = 0,
) -> None:
    """Talk to a model in the terminal; answers appear as they are written. /new begins anew, /quit ends.

    Example: posttrain chat runs/quickstart/grpo-*/model --temperature 0
    """
    from posttrain.pipeline.libraries import heavy_imports

    with heavy_imports():
        from posttrain.data.render import Template
        from posttrain.sampling import InProcess, Sampling
        from posttrain.sampling.engine import Request
        from posttrain.text import Message
        from posttrain.tuners.load import load

    loaded = load(model)
    template = Template(loaded.tokenizer)
    start = [Message("system", system)] if system else []
    messages, turn = list(start), 0
    print("type a message; /new begins anew, /quit ends")
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
        messages.append(Message("user", said))
        turn += 1
        plan = Sampling(max_tokens=max_tokens, temperature=temperature)
        engine = InProcess(rows=1).open(loaded.lm, plan, sorted(template.stop_ids), seed)
        engine.add(Request(tuple(template.prompt(messages)), ("chat", turn)))
        messages.append(Message("assistant", _stream(engine, template)))


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
