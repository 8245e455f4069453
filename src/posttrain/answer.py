"""Where in a completion its answer stands: behind the thought, between answer tags, in fenced blocks."""

import re
from dataclasses import dataclass

_OPENING = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*")


def answer_of(text: str) -> str:
    """What stands in the answer tags of a completion, else behind its thought."""
    inner = tagged(text)
    return behind_thought(text) if inner is None else inner


def behind_thought(text: str) -> str:
    """What stands behind the last `</think>`; a thought that is not closed holds no answer."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def tagged(text: str) -> str | None:
    """What stands between `<answer>` and `</answer>` behind the thought, where there is one pair of them."""
    before, opening, rest = behind_thought(text).partition("<answer>")
    inner, closing, after = rest.partition("</answer>")
    alone = "<answer>" not in rest and "</answer>" not in before + after
    return inner if opening and closing and alone else None


@dataclass(frozen=True)
class Block:
    """A fenced block of Markdown, without its indentation."""

    language: str
    text: str
    closed: bool = True


def fenced(text: str) -> list[Block]:
    """The fenced blocks of a text, in order; one that is not closed ends with it. One pass over the lines."""
    found: list[Block] = []
    opening, inside = None, list[str]()
    for line in text.replace("\r\n", "\n").split("\n"):
        if opening is None:
            opening, inside = _OPENING.fullmatch(line), []
        elif _closes(line.strip(), opening[2]):
            found.append(Block(opening[3], "".join(f"{each}\n" for each in inside)))
            opening = None
        else:
            inside.append(line.removeprefix(opening[1]))
    if opening is not None:
        found.append(Block(opening[3], "\n".join(inside), closed=False))
    return found


def _closes(line: str, fence: str) -> bool:
    return len(line) >= len(fence) and not line.strip(fence[0])
