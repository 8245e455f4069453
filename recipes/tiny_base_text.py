"""Plain-text arithmetic for `assets/tiny-base` to grow up on: equations, worked story problems, facts in words.

A source of one's own, as any user writes one: `kind: tiny_base_text:ArithmeticText` in a recipe beside this file. Names, things
and sentences are made up here and shared with no data set, and no document has the form of a chat.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from posttrain.data.source import Raw, Source
from posttrain.draws import generator

T = TypeVar("T")
LARGEST = 199  # no number is above it: three digits occur and carry, and the tables that lie below can still be learnt whole
_words = str.split
# A template writes both tenses as [present|past]. {who} is the owner, by name or as a pronoun; {friend} somebody else.
GAIN = (
    "{who} [finds|found] {k} more near the river.", "{who} [picks|picked] up another {k} {things}.",
    "{who} [gets|got] {k} new {things} at the market.", "{who} [adds|added] {k} {things} to the pile.",
    "{who} [buys|bought] another {k} in town.", "{who} [wins|won] {k} {things} at the fair.",
    "{who} [makes|made] {k} {things} more.", "{who} [collects|collected] {k} extra {things}.",
    "an aunt [sends|sent] {k} further {things}.", "{k} {things} more [turn|turned] up behind the door.",
    )  # fmt: skip
LOSE = (
    "{who} [loses|lost] {k} of them on the way home.", "{who} [drops|dropped] {k} of the {things} into the well.",
    "{who} [uses|used] up {k} of them.", "{who} [throws|threw] {k} of them away.", "a fox [takes|took] {k} of the {things}.",
    "the wind [blows|blew] {k} of them away.", "{who} [sells|sold] {k} of them at the fair.",
    "{who} [leaves|left] {k} of the {things} behind.", "{who} [breaks|broke] {k} of {his} {things}.",
    "{who} [must|had to] part with {k} of the {things}.", "rain [spoils|spoiled] {k} of the {things}.",
)  # fmt: skip
GIVE = (
    "{who} [hands|handed] {k} of them to {friend}.", "{who} [gives|gave] {friend} {k} of the {things}.",
    "{friend} [gets|got] {k} of them from {name}.", "{who} [lends|lent] {k} of {his} {things} to {friend}.",
    "{friend} [asks|asked] for {k} of them, and {name} [hands|handed] them over.", "{who} [lets|let] {friend} have {k} of them.",
    "{who} [sends|sent] {k} of {his} {things} to {friend}.", "{who} [gives|gave] away {k} of them to {friend} as a present.",
    "{friend} [takes|took] {k} of the {things} from {name}.",
)  # fmt: skip
RECEIVE = (
    "{friend} [hands|handed] {name} {k} more.", "{friend} [brings|brought] {name} {k} {things}.",
    "{who} [gets|got] another {k} from {friend}.", "{who} [receives|received] {k} {things} from {friend}.",
    "a gift of {k} {things} [comes|came] from {friend}.", "{friend} [gives|gave] {name} another {k}.",
    "{friend} [lends|lent] {name} {k} {things}.", "{friend} [adds|added] {k} of {friend}'s own {things} to the pile.",
    "{who} [accepts|accepted] {k} {things} that {friend} [offers|offered].",
)  # fmt: skip
PACKS = (
    "{who} [buys|bought] {n} {packs} of {k} {things}.", "{who} [brings|brought] home {n} {packs} with {k} in each.",
    "{n} {packs} [arrive|arrived], each holding {k} {things}.", "{friend} [brings|brought] {n} {packs}, each with {k} {things}.",
    "{who} [finds|found] {n} {packs}, and every {pack} [has|had] {k} {things} in it.",
    "{who} [opens|opened] {n} new {packs} of {k}.", "{who} [gets|got] {n} {packs}; there [are|were] {k} {things} in each {pack}.",
    "{who} [wins|won] {n} full {packs}, with {k} {things} to a {pack}.", "{who} [orders|ordered] {n} {packs} holding {k} each.",
)  # fmt: skip
DOUBLE = (
    "{who} [doubles|doubled] what {he} [has|had].", "the pile [grows|grew] to twice its size.",
    "the {things} [become|became] twice as many.", "a kind fairy [doubles|doubled] the {things}.",
    "the {things} [double|doubled] in number.", "there [are|were] two times as many {things}.",
    "{friend} [brings|brought] as many {things} as {name} already [has|had].", "the count of {things} [doubles|doubled] at once.",
)  # fmt: skip
TRIPLE = (
    "{who} [triples|tripled] what {he} [has|had].", "the pile [grows|grew] to three times its size.",
    "the {things} [become|became] three times as many.", "a kind fairy [triples|tripled] the {things}.",
    "the {things} [triple|tripled] in number.", "there [are|were] three times as many {things}.",
    "{friend} [brings|brought] two more {things} for each one there.", "the count of {things} [triples|tripled] at once.",
)  # fmt: skip
SHARE = (
    "{who} [splits|split] them evenly between {k} children and [takes|took] one part.",
    "{who} [divides|divided] the {things} into {k} equal heaps and [keeps|kept] only one heap.",
    "the {things} [are|were] shared fairly by {k} friends, {name} being one of them.",
    "{who} [makes|made] {k} equal piles and [gives|gave] away all but one.",
    "{k} neighbours, {name} among them, [split|split] the {things} equally.",
    "{who} [puts|put] equal shares on {k} plates and [has|had] just one plate.",
    "{who} [shares|shared] out the {things} so that {k} people, {name} too, [get|got] the same.",
)  # fmt: skip
START = (
    "{name} [owns|owned] {k} {things}.", "{name} [starts|started] the day with {k} {things}.",
    "at first {name} [has|had] {k} {things}.", "{name} [keeps|kept] {k} {things} {place}.",
    "there [are|were] {k} {things} {place}, and {name} [owns|owned] them all.", "{name} [has|had] {k} {things} {place}.",
    "{k} {things} [belong|belonged] to {name}.", "{name} [counts|counted] {his} {things}: {k} in all.",
)  # fmt: skip
QUESTION = (
    "How many {things} [are|were] there then?", "How many {things} [has|had] {name} got in the end?", "How many [are|were] left?",
    "What [is|was] the number of {things} at last?", "How many {things} [belong|belonged] to {name} after that?",
    "How many {things} [does|did] {name} end up with?", "Find how many {things} {name} [has|had] at the end.",
    "How many {things} [does|did] {he} have finally?", "Count the {things} of {name} at the end.",
)  # fmt: skip
THEN = ("", "", "", "", "then ", "later ", "next ", "after that ", "in the evening ", "soon ", "the day after, ")
PLACES = ("on a shelf", "in the kitchen", "under the bed", "in a chest", "by the window", "in the shed", "at home", "in a box")
GIRLS = _words("""Lena Maya Nora Vera Greta Ida Ruth Clara Helga Julia Lotte Marta Polly Sonia Wilma Zoe Alice Betty Dora Erna
    Flora Hilda Irma Jenny Lucy Mabel Nelly Paula Rita Susan Tilda Ursula Wanda Yvonne""")
BOYS = _words("""Otto Emil Karl Oscar Peter Bruno David Felix George Henry Ivan Jonas Luke Max Nils Oliver Ralph Simon Theo
    Walter Adam Bill Carlo Edgar Fred Gustav Harold Jacob Keith Martin Ned Percy Robert Tom""")
PEOPLE = [(name, "she", "her") for name in GIRLS] + [(name, "he", "his") for name in BOYS]
THINGS = _words("""pears plums lemons acorns pebbles buttons ribbons candles spoons cups bricks nuts figs tickets pencils feathers
    nails beads seeds onions carrots rings corks dolls flowers kites lamps letters maps turnips walnuts whistles tiles hats bells
    keys badges crayons magnets beans biscuits buns bows sticks chairs socks stones blocks""")
CONTAINERS = _words("bag basket packet crate jar tray bundle tin sack carton bucket drawer parcel chest net")
SMALL = _words("""zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen""")
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")

# Two people or two amounts: the numbers drawn are n * k = m, a > m, b < a; results are r and s.
ASIDES = (
    ("{name} [has|had] {a} {things} and {friend} [has|had] {b} more than that. How many [do|did] both have?", "a + b, a + r"),
    ("{friend} [counts|counted] {a} {things}, and {name} {b} fewer. How many [are|were] there with both?", "a - b, a + r"),
    ("{name} [picks|picked] {a} {things}, {friend} only {b}. How many more [does|did] {name} have?", "a - b"),
    ("{n} children [take|took] {k} {things} each from a heap of {a}. How many [stay|stayed] in the heap?", "n * k, a - r"),
    ("{name} [lays|laid] out {m} {things} in rows of {k}. How many rows [are|were] there?", "m / k"),
    ("How many {things} [are|were] in {n} {packs} of {k}?", "n * k"),
    ("{m} {things} [are|were] put into {n} {packs}, the same in each. How many [go|went] into one {pack}?", "m / n"),
    ("One of the {things} [costs|cost] {k} pence. How many pence [do|did] {n} of them cost?", "n * k"),
    ("{name} [has|had] {k} {things}, {friend} {n} times as many. How many [do|did] they have together?", "k * n, k + r"),
    ("{name} [wants|wanted] {a} {things} and [has|had] {n} {packs} of {k}. How many [are|were] still wanted?", "n * k, a - r"),
)  # fmt: skip
# Heading, what stands before the work, between its lines, and after it. The plainest stand there twice.
LAYOUTS = (
    ("Problem: ", "\nWork:\n", "\n", "\nAnswer: {answer}"), ("Problem: ", "\nWork:\n", "\n", "\nAnswer: {answer}"),
    ("", "\n", "\n", ""), ("", "\n", "\n", ""), ("", "\n", "\n", "\nSo it is {answer}."), ("Q: ", "\nA:\n", "\n", "\n{answer}"),
    ("Q: ", "\nA: ", ", ", ". It is {answer}."), ("Exercise. ", "\nSolution: ", "; ", "\nResult: {answer}"),
    ("", "\nWe work it out:\n", "\n", "\nThe answer is {answer}."), ("Question: ", "\n", "\n", "\nAnswer: {answer}"),
    ("* ", " ", ", ", ""),
)  # fmt: skip
# Said of numbers up to LARGEST; capitals are the same numbers in words. a + b = s, f * g = p, a = 10 t + o.
FACTS = (
    "{A} and {B} make {S}.", "{A} plus {B} is {S}.", "{S} take away {B} leaves {A}.", "{S} minus {A} is {B}.", "{s} reads {S}.",
    "{F} times {G} is {P}.", "{P} shared among {F} is {G} each.", "{P} divided by {F} is {G}.", "{G} taken {F} times gives {P}.",
    "{A} is written {a}.", "In words {p} is {P}.", "The number {B} looks like this: {b}.", "{s} is more than {a}.",
    "{a} is less than {s}.", "{s} is {b} more than {a}.", "{a} is {b} less than {s}.", "The largest of {a}, {s} and {b} is {s}.",
    "The smaller of {s} and {b} is {b}.", "In {a} the tens are {t} and the ones {o}.", "{t} tens and {o} ones make {a}.",
    "After {a} comes {after}.", "Before {after} comes {a}.", "Half of {twice} is {a}.", "Twice {a} is {twice}.",
    "Three times {b} is {thrice}.", "A third of {thrice} is {b}.", "Count by {f}: {multiples}.", "Count on from {a}: {onward}.",
    "Count back from {s}: {backward}.", "To add {a} and {b}: {a} + {bt} = {abt} and {abt} + {bo} = {s}.",
    "To take {b} from {s}: {s} - {bt} = {sbt} and {sbt} - {bo} = {a}.",
)  # fmt: skip


def _tenses(templates: Sequence[str]) -> list[list[str]]:
    """`[is|was]` -> what the present (0) and the past (1) say."""
    return [[re.sub(r"\[(.*?)\|(.*?)\]", rf"\{tense + 1}", template) for template in templates] for tense in (0, 1)]


WORDINGS = {kind: _tenses(templates) for kind, templates in {
    "start": START, "question": QUESTION, "gain": GAIN, "lose": LOSE, "give": GIVE, "receive": RECEIVE,
    "packs": PACKS, "double": DOUBLE, "triple": TRIPLE, "share": SHARE, "aside": [text for text, _ in ASIDES],
}.items()}  # fmt: skip
_below_hundred = SMALL + [ten + (f"-{SMALL[one]}" if one else "") for ten in TENS for one in range(10)]
WORDS = _below_hundred + ["one hundred" + (f" and {_below_hundred[rest]}" if rest else "") for rest in range(100)]


class Dice:
    """The draws of one document. They leave their generator in blocks: one at a time would take ten times as long."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._block: list[float] = []

    def roll(self) -> float:
        """Uniform in [0, 1)."""
        if not self._block:
            self._block = self._rng.random(128).tolist()
        return self._block.pop()

    def between(self, low: int, high: int) -> int:
        """Uniform, both ends included."""
        return low + int(self.roll() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.roll() * len(options))]


def result(left: int, sign: str, right: int) -> int:
    """Natural numbers only: anything else is a mistake in this file."""
    if sign == "/":
        assert left % right == 0
        return left // right
    value = left + right if sign == "+" else left - right if sign == "-" else left * right
    assert value >= 0
    return value


def equation(left: int, sign: str, right: int) -> str:
    return f"{left} {sign} {right} = {result(left, sign, right)}"


def operands(dice: Dice, sign: str) -> tuple[int, int]:
    """Small numbers often, since those of everyday stories are, and large ones too, since a carry needs practice."""
    reach = dice.pick((10, 20, 20, 30, 50, 50, 100, 100, LARGEST - 1))
    if sign in "+-":
        left, second = dice.between(1, reach), dice.pick((10, 20, reach, reach))
        return left, dice.between(1, min(second, LARGEST - left if sign == "+" else left))
    times = dice.pick((2, 2, 3, 3, 4, 5, 6, 7, 8, 9))
    other = dice.between(1, min(reach, LARGEST // times))
    if sign == "/":
        return other * times, times
    return (times, other) if dice.roll() < 0.4 else (other, times)


@dataclass(frozen=True, slots=True)
class Step:
    """An event of a story: its kind, its numbers, its worked equations, and how many things there are after it."""

    kind: str
    k: int
    n: int
    work: tuple[str, ...]
    after: int


def happen(dice: Dice, before: int) -> Step:
    """A next event that leaves between 1 and LARGEST things."""
    parts = [part for part in range(2, 10) if before % part == 0 and before > part]
    if parts and dice.roll() < 0.25:
        return _change("share", before, "/", dice.pick(parts))
    while True:
        kind = dice.pick(("gain", "lose", "give", "receive", "packs", "packs", "double", "triple"))
        if kind == "packs":
            n, k = dice.between(2, 9), dice.between(2, 9)
            step = Step(kind, k, n, (equation(n, "*", k), equation(before, "+", n * k)), before + n * k)
        elif kind in ("gain", "receive"):
            step = _change(kind, before, "+", dice.between(2, 20))
        elif kind in ("double", "triple"):
            step = _change(kind, before, "*", 2 if kind == "double" else 3)
        elif before > 1:
            step = _change(kind, before, "-", dice.between(1, min(before - 1, 20 if dice.roll() < 0.8 else before)))
        else:
            continue
        if step.after <= LARGEST:
            return step


def _change(kind: str, before: int, sign: str, k: int) -> Step:
    return Step(kind, k, 0, (equation(before, sign, k),), result(before, sign, k))


def walk(dice: Dice, start: int, length: int) -> list[Step]:
    """Events one after the other, each from where the one before left off."""
    steps = [happen(dice, start)]
    while len(steps) < length:
        steps.append(happen(dice, steps[-1].after))
    return steps


def drill(dice: Dice) -> str:
    """A page of equations: of any sign or of one, families of three numbers, a table, or chains that carry a result on."""
    form, between = dice.roll(), dice.pick(("\n", "\n", "\n", "; "))
    if form < 0.5:
        signs = "+-*/" if form < 0.4 else dice.pick("+-*/")
        drawn = [dice.pick(signs) for _ in range(dice.between(10, 18))]
        return between.join(equation(left, sign, right) for sign in drawn for left, right in [operands(dice, sign)])
    if form < 0.6:
        return "\n\n".join("\n".join(family(dice)) for _ in range(dice.between(3, 5)))
    if form < 0.65:
        sign, by, first = dice.pick("+*"), dice.between(2, 9), dice.between(1, 11)
        return between.join(equation(left, sign, by) for left in range(first, first + 10))
    chains = [walk(dice, dice.between(1, 40), dice.between(2, 5)) for _ in range(dice.between(2, 4))]
    return "\n\n".join("\n".join(line for step in steps for line in step.work) for steps in chains)


def family(dice: Dice) -> list[str]:
    """What three numbers have to do with each other."""
    there, back = dice.pick((("+", "-"), ("*", "/")))
    left, right = operands(dice, there)
    whole = result(left, there, right)
    asked = ((left, there, right), (right, there, left), (whole, back, left), (whole, back, right))
    return [equation(*numbers) for numbers in asked]


def story(dice: Dice) -> str:
    """One problem with its work: events that change how many things somebody has, or (15%) two people or amounts compared."""
    (name, he, his), friend = dice.pick(PEOPLE), dice.pick(PEOPLE)[0]
    while friend == name:
        friend = dice.pick(PEOPLE)[0]
    words = {"name": name, "he": he, "his": his, "friend": friend, "things": dice.pick(THINGS), "place": dice.pick(PLACES)}
    words |= {"pack": (pack := dice.pick(CONTAINERS)), "packs": pack + "s"}
    tense = dice.pick((0, 1))
    if dice.roll() < 0.15:
        return aside(dice, words, tense)
    start = dice.between(2, 20) if dice.roll() < 0.9 else dice.between(21, 60)
    steps = walk(dice, start, dice.pick((1, 1, 2, 2, 2, 3, 3, 4)))
    sentences, question = tell(dice, words, tense, start, steps)
    if dice.roll() < 0.25:
        return alongside(dice, words, tense, sentences, steps, question)
    work = [line for step in steps for line in step.work]
    return exercise(dice, " ".join([*sentences, question]), work, steps[-1].after)


def tell(dice: Dice, words: dict[str, str], tense: int, start: int, steps: Sequence[Step]) -> tuple[list[str], str]:
    """A sentence for the start and for each step, and the question. In one story of 16 the numbers are written as words."""
    shown = WORDS if dice.roll() < 1 / 16 else range(LARGEST + 1)
    sentences = [_sentence(dice.pick(WORDINGS["start"][tense]).format(**words, k=shown[start]))]
    clear = True  # whether "she" can only be the owner
    for step in steps:
        template = dice.pick(WORDINGS[step.kind][tense])
        who = words["he"] if clear and dice.roll() < 0.5 else words["name"]
        event = template.format(**words, who=who, k=shown[step.k], n=shown[step.n])
        sentences.append(_sentence(dice.pick(THEN) + event))
        clear = "{friend}" not in template
    return sentences, dice.pick(WORDINGS["question"][tense]).format(**words)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def exercise(dice: Dice, problem: str, work: Sequence[str], answer: int) -> str:
    """Problem first, work after it, as exercise books do; the work's last line has the answer where no line of its own has."""
    heading, opening, between, closing = dice.pick(LAYOUTS)
    return heading + problem + opening + between.join(work) + closing.format(answer=answer)


def alongside(
    dice: Dice, words: dict[str, str], tense: int, sentences: Sequence[str], steps: Sequence[Step], question: str
) -> str:
    """Each event with its equations beside it, line by line or as prose that calculates as it goes."""
    events, answer = list(zip(sentences[1:], steps, strict=True)), steps[-1].after
    if dice.roll() < 0.4:
        lines = [line for sentence, step in events for line in (sentence, *step.work)]
        return "\n".join([sentences[0], *lines, f"{question} {answer}"])
    form = dice.pick((", so {he} {has} {work}.", ". That makes {work}.", ". Now {work}.", " ({work})."))
    has, things = ("has", "had")[tense], words["things"] if answer > 1 else words["things"][:-1]
    told = [sentence[:-1] + form.format(he=words["he"], has=has, work=", and ".join(step.work)) for sentence, step in events]
    return " ".join([sentences[0], *told, f"In the end {words['name']} {has} {answer} {things}."])


def aside(dice: Dice, words: dict[str, str], tense: int) -> str:
    """A problem of two people or two amounts."""
    chosen = dice.between(0, len(ASIDES) - 1)
    n, k = dice.between(2, 9), dice.between(2, 9)
    a = n * k + dice.between(2, 12)
    numbers = {"n": n, "k": k, "m": n * k, "a": a, "b": dice.between(2, min(a - 1, 12))}
    work = []
    for step in ASIDES[chosen][1].split(", "):
        left, sign, right = step.split()
        work.append(equation(numbers[left], sign, numbers[right]))
        numbers["r"] = result(numbers[left], sign, numbers[right])
    return exercise(dice, _sentence(WORDINGS["aside"][tense][chosen].format(**words, **numbers)), work, numbers["r"])


def fact(dice: Dice) -> str:
    """A sentence about numbers: words and digits, order, counting, tens and ones, sums in the head."""
    template, a = dice.pick(FACTS), dice.between(1, 99)
    b = dice.between(11, 60) if "{bt}" in template else dice.between(1, dice.pick((10, 20, 60)))
    f, g = dice.between(2, 9), dice.between(2, 10)
    s, p, bt = a + b, f * g, b // 10 * 10
    digits = {"a": a, "b": b, "s": s, "f": f, "g": g, "p": p, "t": a // 10, "o": a % 10, "after": a + 1, "twice": 2 * a}
    digits |= {"thrice": 3 * b, "bt": bt, "bo": b - bt, "abt": a + bt, "sbt": s - bt}
    words = {"A": WORDS[a], "B": WORDS[b], "S": WORDS[s], "F": WORDS[f], "G": WORDS[g], "P": WORDS[p]}
    runs = {"multiples": range(f, 7 * f, f), "onward": range(a, a + 6), "backward": range(s, max(s - 6, -1), -1)}
    counted = {name: ", ".join(map(str, numbers)) for name, numbers in runs.items()}
    return _sentence(template.format(**digits, **words, **counted))


class ArithmeticText(Source):
    """Equations, worked story problems and facts about numbers, made as they are read; document i depends on (seed, i) alone."""

    documents: PositiveInt
    """How many documents there are, of about 220 characters (110 tokens) each."""
    seed: NonNegativeInt = 0
    """Another seed makes other documents."""
    drills: NonNegativeFloat = 0.35
    """Share of pages of equations: calculating is most of what a small model lacks, and a page holds 15 equations."""
    stories: NonNegativeFloat = 0.55
    """Share of worked stories: the most, as telling which sum is meant takes many wordings, and their work repeats the sums."""
    prose: NonNegativeFloat = 0.10
    """Share of facts in words; few, as they only tie number words, order and place value to the digits."""

    @model_validator(mode="after")
    def _something_to_write(self) -> Self:
        if self.drills + self.stories + self.prose == 0:
            raise ValueError("drills, stories and prose are all 0, so there is nothing to write; give one of them a share")
        return self

    def document(self, index: int) -> str:
        """The text of document `index`, counted from 0."""
        dice = Dice(generator(self.seed, "arithmetic text", index))
        form = dice.roll() * (self.drills + self.stories + self.prose)
        if form < self.drills:
            return drill(dice)
        if form < self.drills + self.stories:
            first = story(dice)
            return f"{first}\n\n{story(dice)}" if len(first) < dice.pick((120, 180)) else first
        return " ".join(fact(dice) for _ in range(dice.between(4, 7)))

    def label(self) -> str:
        return "arithmetic text"

    def all_rows(self) -> Iterator[Raw]:
        for index in range(self.documents):
            yield Raw({"text": self.document(index)}, f"{self.label()}:{index + 1}")

    def fingerprint(self) -> str:
        """Settings and this file: the documents are a function of both."""
        settings = {name: getattr(self, name) for name in sorted(type(self).model_fields) if name != "weight"}
        return hashlib.sha256(repr(settings).encode() + Path(__file__).read_bytes()).hexdigest()
