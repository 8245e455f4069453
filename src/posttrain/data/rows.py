"""From a row to its sequences: one for a single answer, two for a pair, as many as there are answers for a ranking."""

from collections.abc import Sequence
from typing import Literal

from posttrain.data.format import Prompted, Unusable
from posttrain.data.render import Making, Template
from posttrain.errors import DataError
from posttrain.text import (
    Classified,
    Completion,
    Conversation,
    Labelled,
    Message,
    Preference,
    Ranking,
    RenderedRow,
    Rendering,
    Row,
    Steps,
)

Learn = Literal["all", "last"]


def making_row(row: Row, template: Template, learn: Learn) -> Making[RenderedRow]:
    """What a row becomes. Raises Unusable for a row to drop whole, DataError for one that nothing can be learned from."""
    match row:
        case Completion():
            return RenderedRow(((yield from template.making_completion(row)),))
        case Conversation():
            return RenderedRow(((yield from template.making_conversation(row, learn)),))
        case Preference():
            sides = yield from _answers(row.prompt, (row.chosen, row.rejected), template, row.where)
            if sides[0] == sides[1]:  # the template, or the tokenizer, may leave out what told them apart
                raise Unusable("chosen and rejected are the same")
            return RenderedRow(sides, (row.prefer, row.margin))
        case Labelled():
            return RenderedRow((yield from _answers(row.prompt, (row.completion,), template, row.where)), (float(row.good),))
        case Ranking():
            return RenderedRow((yield from _answers(row.prompt, row.completions, template, row.where)), row.scores)
        case Steps():
            return RenderedRow(((yield from template.making_steps(row)),), row.right)
        case Classified():
            made = template.making_chat(row.messages) if row.messages else template.making_texts(row.text, row.second)
            tokens = yield from made
            return RenderedRow(((tokens, [False] * len(tokens)),), label=row.label)
    raise DataError(f"{row.where}: this row is a problem without an answer to learn from; it can only be a task's")


def _answers(
    prompt: tuple[Message, ...], answers: Sequence[tuple[Message, ...]], template: Template, where: str
) -> Making[tuple[Rendering, ...]]:
    """Several answers to one prompt, whose tokens must be the same in all."""
    made = []
    for answer in answers:
        made.append((yield from template.making_conversation(Prompted(prompt + answer, (), where, len(prompt)), "all")))
    asked = {tuple(tokens[: train.index(True)]) for tokens, train in made}
    if len(asked) > 1:
        raise Unusable("the chat template renders the prompt differently for each answer")
    return tuple(made)
