"""The commands, each in a file of its own."""

from collections.abc import Callable

import typer

from posttrain.cli import audit, chat, compress, data, delta, evaluate, export, init, kinds, merge, report, run, sample

app = typer.Typer(
    name="posttrain",
    help="Post-training for language models: one recipe takes a base model to a better one, and shows that it is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, Callable[..., None]] = {
    "run": run.run,
    "train": run.train,
    "data": data.data,
    "eval": evaluate.evaluate,
    "audit": audit.audit,
    "sample": sample.sample,
    "chat": chat.chat,
    "delta": delta.delta,
    "quantize": compress.quantize,
    "prune": compress.prune,
    "merge": merge.merge,
    "export": export.export,
    "report": report.report,
    "kinds": kinds.kinds,
    "init": init.init,
}
for name, command in COMMANDS.items():
    app.command(name, no_args_is_help=name not in {"kinds", "init"})(command)
