"""Instructions whose following a program can check: the 25 kinds of IFEval (arXiv 2311.07911).

The checks are written anew. Where they read an answer otherwise than Google's code does, docs/tasks.md says so.
Each takes time in proportion to the length of the text, whatever stands in it.
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, PositiveInt, StringConstraints, field_validator, model_validator

from posttrain.component import Settings
from posttrain.tasks.form import JsonGrader
from posttrain.tasks.languages import LANGUAGES, speaks
from posttrain.text import Problem

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Relation = Literal["at least", "less than"]


def holds(count: int, relation: Relation, bound: int) -> bool:
    return count >= bound if relation == "at least" else count < bound


class Instruction(Settings):
    """One instruction. Its fields are named and typed as the columns `kwargs` of IFEval are."""

    model_config = ConfigDict(strict=True)
    known: ClassVar[dict[str, type["Instruction"]]] = {}
    """All instructions by their id in IFEval."""

    def __init_subclass__(cls, id: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Instruction.known[id] = cls

    def followed(self, text: str) -> bool:
        """Whether a text that is not blank does as told."""
        raise NotImplementedError


# ---- words and letters


class Existence(Instruction, id="keywords:existence"):
    """All keywords stand somewhere, also inside of longer words."""

    keywords: list[Words] = Field(min_length=1)

    def followed(self, text: str) -> bool:
        return all(keyword.lower() in text.lower() for keyword in self.keywords)


class Frequency(Instruction, id="keywords:frequency"):
    """How often a keyword stands there, also inside of longer words."""

    keyword: Words
    frequency: PositiveInt
    relation: Relation

    def followed(self, text: str) -> bool:
        return holds(text.lower().count(self.keyword.lower()), self.relation, self.frequency)


class Forbidden(Instruction, id="keywords:forbidden_words"):
    """None of some words stands there as a word of its own."""

    forbidden_words: list[Words] = Field(min_length=1)

    def followed(self, text: str) -> bool:
        return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in self.forbidden_words)


class LetterFrequency(Instruction, id="keywords:letter_frequency"):
    """How often a letter stands there, large or small."""

    letter: Annotated[Words, StringConstraints(max_length=1)]
    let_frequency: PositiveInt
    let_relation: Relation

    def followed(self, text: str) -> bool:
        return holds(text.lower().count(self.letter.lower()), self.let_relation, self.let_frequency)


class NoComma(Instruction, id="punctuation:no_comma"):
    """No comma, of other scripts neither."""

    def followed(self, text: str) -> bool:
        return set(text).isdisjoint(",،，、﹐﹑､")


# ---- language and case


class Language(Instruction, id="language:response_language"):
    """Most of the text is in one language."""

    language: str

    @field_validator("language")
    @classmethod
    def _is_told_apart(cls, language: str) -> str:
        if language not in LANGUAGES:
            raise ValueError(f"{language!r} is none of the languages that are told apart: {', '.join(LANGUAGES)}")
        return language

    def followed(self, text: str) -> bool:
        return speaks(text, self.language)


class EnglishCapital(Instruction, id="change_case:english_capital"):
    """English, and no small letter."""

    def followed(self, text: str) -> bool:
        return text.isupper() and speaks(text, "en")


class EnglishLowercase(Instruction, id="change_case:english_lowercase"):
    """English, and no capital letter."""

    def followed(self, text: str) -> bool:
        return text.islower() and speaks(text, "en")


class CapitalWords(Instruction, id="change_case:capital_word_frequency"):
    """How many words have capital letters only; `I` and `A` are such words, `HIGH-END` and `U.S.` are one each."""

    capital_frequency: PositiveInt
    capital_relation: Relation

    def followed(self, text: str) -> bool:
        capital = sum(word.isupper() for word in re.findall(r"\w+(?:[-.]\w+)*", text))
        return holds(capital, self.capital_relation, self.capital_frequency)


# ---- length

_AROUND = "\"'“”‘’«»()[]{}<>*_~`#"
_LAST = (".", "!", "?", "。", "！", "？", "।", "॥", "؟", "۔")
_SHORT = {
    "mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "vs", "etc", "inc", "ltd", "co", "corp", "dept", "fig", "approx", "gen",
    "gov", "sen", "rep", "lt", "col", "sgt", "capt", "rev", "ph.d",
}  # fmt: skip


def sentences(text: str) -> int:
    """How many sentences a text has: each has a word, and ends in a mark that white space follows, or where the text ends.

    Numbers of list items, initials, abbreviations and dots that trail off end none, and neither does a line break.
    """
    ended, begun = 0, False
    for token in re.sub(r"([。！？])", r"\1 ", text).split():
        bare = token.strip(_AROUND)
        if not begun and bare.endswith(".") and bare[:-1].isdigit():
            continue
        begun = begun or any(letter.isalnum() for letter in bare)
        if begun and bare.endswith(_LAST) and not _goes_on(bare.lower()):
            ended, begun = ended + 1, False
    return ended + begun


def _goes_on(bare: str) -> bool:
    stem = bare.removesuffix(".")
    if stem == bare or stem.endswith("."):
        return stem != bare
    return stem in _SHORT or re.fullmatch(r"[^\W\d](?:\.[^\W\d])*", stem) is not None


class Sentences(Instruction, id="length_constraints:number_sentences"):
    """How many sentences."""

    num_sentences: PositiveInt
    relation: Relation

    def followed(self, text: str) -> bool:
        return holds(sentences(text), self.relation, self.num_sentences)


class WordCount(Instruction, id="length_constraints:number_words"):
    """How many words: runs of letters, their marks, and digits."""

    num_words: PositiveInt
    relation: Relation

    def followed(self, text: str) -> bool:
        import regex

        return holds(len(regex.findall(r"\w+", text)), self.relation, self.num_words)


def between(text: str, divider: str) -> list[str]:
    """The pieces between dividers, white space evened, without a blank one before the first or behind the last divider."""
    pieces = [" ".join(piece.split()) for piece in text.split(divider)]
    return pieces[pieces[0] == "" : len(pieces) - (pieces[-1] == "")]


class Paragraphs(Instruction, id="length_constraints:number_paragraphs"):
    """Just so many paragraphs, none blank, with `***` between them."""

    num_paragraphs: PositiveInt

    def followed(self, text: str) -> bool:
        pieces = between(text, "***")
        return len(pieces) == self.num_paragraphs and all(pieces)


class FirstWord(Instruction, id="length_constraints:nth_paragraph_first_word"):
    """Just so many paragraphs, with blank lines between them, and the first word of one of them."""

    num_paragraphs: PositiveInt
    nth_paragraph: PositiveInt
    first_word: Words

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "FirstWord":
        if self.nth_paragraph > self.num_paragraphs:
            raise ValueError(f"nth_paragraph: {self.nth_paragraph} is more than num_paragraphs, {self.num_paragraphs}")
        return self

    def followed(self, text: str) -> bool:
        paragraphs = [each.lstrip(" \t\r\n\"'“‘") for each in text.split("\n\n") if each.strip()]
        if len(paragraphs) != self.num_paragraphs:
            return False
        first = rf"{re.escape(self.first_word)}(?![\w-])"
        return re.match(first, paragraphs[self.nth_paragraph - 1], re.IGNORECASE) is not None


# ---- what stands in it


class Placeholders(Instruction, id="detectable_content:number_placeholders"):
    """At least so many `[placeholders]`, with something in the brackets."""

    num_placeholders: PositiveInt

    def followed(self, text: str) -> bool:
        return sum(bool(each.strip()) for each in re.findall(r"\[([^\[\]\n]*+)\]", text)) >= self.num_placeholders


class Postscript(Instruction, id="detectable_content:postscript"):
    """A postscript: its marker, and words behind it. In `P.P.S.` there is no `P.S.`."""

    postscript_marker: Words

    def followed(self, text: str) -> bool:
        marker = re.escape(self.postscript_marker).replace(r"\.", r"\.\s?")
        whole = r"(?!\w)" if self.postscript_marker[-1].isalnum() else ""
        found = re.search(rf"(?<!\w)(?<!p\.)(?<!p\.\s){marker}{whole}", text, re.IGNORECASE)
        return found is not None and re.compile(r"\w").search(text, found.end()) is not None


class Bullets(Instruction, id="detectable_format:number_bullet_lists"):
    """Just so many lines that begin with `* ` or `- ` and go on."""

    num_bullets: PositiveInt

    def followed(self, text: str) -> bool:
        lines = [line.split(maxsplit=1) for line in text.split("\n")]
        bullets = [line for line in lines if len(line) == 2 and line[0] in {"*", "-"} and line[1].strip("*- \t\r")]
        return len(bullets) == self.num_bullets


class Highlights(Instruction, id="detectable_format:number_highlighted_sections"):
    """At least so many `*highlights*` of Markdown, of one to three asterisks, each on one line."""

    num_highlights: PositiveInt

    def followed(self, text: str) -> bool:
        found = re.findall(r"(?<!\*)(\*{1,3})(?!\s)[^*\n]++(?<!\s)\1(?!\*)", text)
        return len(found) >= self.num_highlights


class Sections(Instruction, id="detectable_format:multiple_sections"):
    """At least so many numbers behind the name of a section, each at the beginning of a line."""

    section_spliter: Words
    num_sections: PositiveInt

    def followed(self, text: str) -> bool:
        heading = re.compile(rf"\W*{re.escape(self.section_spliter)}\s?(\d+)")
        return len({found[1] for line in text.split("\n") if (found := heading.match(line))}) >= self.num_sections


class Title(Instruction, id="detectable_format:title"):
    """A `<<title>>` that is not blank, on one line."""

    def followed(self, text: str) -> bool:
        return any(each.strip() for each in re.findall(r"<<([^<>\n]*+)>>", text))


# ---- what the whole of it is


class Json(Instruction, id="detectable_format:json_format"):
    """One JSON object or list and nothing else, in a fenced block or by itself."""

    def followed(self, text: str) -> bool:
        inner = text.strip()
        if inner.startswith("```") and inner.endswith("```"):
            inner = re.sub(r"^json\b", "", inner[3:-3], flags=re.IGNORECASE).strip()
        return inner.startswith(("{", "[")) and JsonGrader(fenced=False).grade(Problem("", ()), inner).score == 1.0


class Constrained(Instruction, id="detectable_format:constrained_response"):
    """One of the three answers that IFEval gives to choose from, and not another one too."""

    OPTIONS: ClassVar = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

    def followed(self, text: str) -> bool:
        return sum(option in text for option in self.OPTIONS) == 1


class TwoResponses(Instruction, id="combination:two_responses"):
    """Two different texts with `******` between them."""

    def followed(self, text: str) -> bool:
        pieces = between(text, "******")
        return len(pieces) == 2 and all(pieces) and pieces[0].lower() != pieces[1].lower()


class RepeatPrompt(Instruction, id="combination:repeat_prompt"):
    """The request first, word for word, and then something else."""

    prompt_to_repeat: Words

    def followed(self, text: str) -> bool:
        said, request = text.strip().lower(), self.prompt_to_repeat.lower()
        return said.startswith(request) and re.search(r"\w", said[len(request) :]) is not None


class End(Instruction, id="startend:end_checker"):
    """The last words, quotation marks behind them aside."""

    end_phrase: Words

    def followed(self, text: str) -> bool:
        return text.rstrip().rstrip('"').rstrip().lower().endswith(self.end_phrase.rstrip('"').lower())


class Quotation(Instruction, id="startend:quotation"):
    """Double quotation marks around all of it."""

    def followed(self, text: str) -> bool:
        whole = text.strip()
        return whole[0] == whole[-1] == '"' and whole[1:-1].strip() != ""
