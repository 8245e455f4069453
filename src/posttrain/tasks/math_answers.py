r"""Which part of a completion is its answer, and what no library is asked about it.

math-verify reads LaTeX generously: it takes `6=5` for 5, `1 1/2` for 1, `101_2` for 101, `dayMon` for Monday and
`5\text{ million}` for 5, and an integral for its value, so that repeating the question is an answer. What is refused here is
refused before it is asked.
"""

import re

from posttrain.answer import answer_of, tagged
from posttrain.tasks.numeric import last_number, number

MAX_LETTERS = 300
MAX_BRACKETS = 60
MAX_BOXES = 4  # different ones; more of them are a list of guesses

_TEXT = r"\\(?:text|mathrm|textbf|mbox|textrm)\s*\{([^{}]*)\}"
_WRAPPED = re.compile(r"\$\$?(.*?)\$?\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_UNIT = re.compile(rf"(?<=[\d}})])\s*(?:\\[ ,;])?(?:{_TEXT}|(?<=\s)([A-Za-z]{{2,}}(?: [A-Za-z]+)?))\s*(\^\{{?[23]\}}?)?$")
_NOT_A_UNIT = re.compile(
    r"\d|\b(?:or|and|not|is|isn|if|plus|minus|negative|times|squared|cubed|factorial|[kKM]|bn|mn|(?:hundred|thousand|[mbtr]+illion"
    r"|dozen|score|lakh|crore|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|hundredth|thousandth)s?|half|halves)\b"
)
_PERCENT = re.compile(r"\s*(?:\\text\s*\{\s*percent\s*\}|\bpercent)$")
_WORDS = re.compile(rf"{_TEXT}|([A-Za-z][A-Za-z' -]*[A-Za-z])")
_SAID = re.compile(r"(?i)\banswer\**(?:\s+is\b|\s*:|\s*=)\s*:?")
_BECAUSE = re.compile(r"(?i),?\s+(?:since|because|so|which|where)\b")
_SPACE_BEHIND = re.compile(r"(?:\\[,;!: ]|\\q?quad|\s)+$")
_OPTION = re.compile(r"(?:\\(?:text|mathrm|textbf|mathbf|mbox|textrm)\s*\{)?\s*\(?\s*([A-Z])\s*\)?\s*\}?")
_NAME = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z]\))?'*")
_DECIMAL = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+|\d*)\.(\d+)")
_UNFINISHED = re.compile(
    r"(?<=[\w})!])\s*[-+*]|\\(?:times|cdot)(?!\s*10\s*\^)|\\sqrt|√|\\div|\\pm|\||\^\s*\{?\s*-?(?:\d+\s*/|\\[dt]?frac)"
    r"|frac\s*\{[^{}]*\\[dt]?frac|\\(?:equiv|approx|sim)\b"
)
_LISTED = re.compile(r";|,(?!\d{3}(?!\d))")
_OPERATOR = re.compile(
    r"\\(?:(?:o?i+nt|sum|prod|lim|[dt]?binom|choose|det|gcd|lcm|[lr]?floor|[lr]?ceil|[bp]?mod|exp|phantom|[hv]phantom)(?![a-zA-Z])"
    r"|[dt]?frac\s*\{(?:d|\\partial)(?![a-z])|begin\s*\{vmatrix)|!|(?:\\|\b)(?:log|ln|lg|(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?)(?![a-z])"
)
_BRACKETED = r"(?:\\left)?\s*[(\[]\s*[-+]?(?:[\d.,]+|\\[dt]?frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d))\s*(?:\\right)?\s*[)\]]"
_BESIDE = re.compile(rf"(?:[\d}})\]]|\\right[)\]])\s*{_BRACKETED}|(?<!sqrt){_BRACKETED}\s*\d|(?<!frac)(?<!frac\s)\d\s*\{{\s*\d")


def answers(text: str) -> list[str]:
    r"""The answers that a completion commits to: its different `\boxed{}`, else one answer by its last words, else none.

    A thinking block is not searched; answer tags hold nothing but the answer. The last words are what follows `answer is` or
    `answer:` on the last line, else its last `$...$`, else its last number, else what follows `answer is` on the last line that
    has it.
    """
    inner = tagged(text)
    text = answer_of(text)
    if "\\boxed" in text:
        return boxed(text)
    if inner is not None and not _SAID.search(inner):
        return [inner] if inner.strip() else []
    lines = [line[-MAX_LETTERS:] for line in text[-4000:].splitlines() if line.strip()] or [""]
    said = next((line for line in reversed(lines) if _SAID.search(line)), "")
    inline, last = re.findall(r"\$([^$]+)\$", lines[-1]), last_number(lines[-1])
    if said and (said == lines[-1] or (not inline and not re.search(r"\d", lines[-1]))):
        found = _BECAUSE.split(_SAID.split(said)[-1])[0]
    elif inline:
        found = inline[-1]
    else:
        found = "" if last is None else f"{last:f}"
    return [found] if found.strip() else []


def boxed(text: str) -> list[str]:
    r"""The different contents of `\boxed{}`, in order; none where the last box is not closed or there are too many."""
    found: list[str] = []
    place = text.find("\\boxed")
    while place >= 0:
        content = _braced(text, place + len("\\boxed"))
        if content is None:
            return []
        if "".join(content.split()) not in {"".join(each.split()) for each in found}:
            found.append(content)
        if len(found) > MAX_BOXES:
            return []
        place = text.find("\\boxed", place + len("\\boxed") + len(content))
    return found


def _braced(text: str, start: int) -> str | None:
    start += len(text[start : start + 8]) - len(text[start : start + 8].lstrip())
    depth = 0
    for place in range(start, min(len(text), start + 2000)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + 1 : place] if place > start else None
    return None


def plain(answer: str) -> str:
    """The same answer without dollar signs, inner boxes, stars, a final full stop, and with numbers in one spelling."""
    answer = _SPACE_BEHIND.sub("", answer).strip("* \n\t").rstrip(".,;").strip("* \n\t")
    for _ in range(2):
        wrapped = _WRAPPED.fullmatch(answer)
        answer = next(filter(None, wrapped.groups()), "").strip() if wrapped else answer
    if answer.startswith("\\boxed{") and answer.endswith("}"):
        answer = answer[len("\\boxed{") : -1].strip()
    answer = _PERCENT.sub(r"\\%", answer.replace("\\varnothing", "\\emptyset"))
    answer = re.sub(r"(?<=\d)(?:\\[,! ]|\{,\}|~)(?=\d{3}(?!\d))", ",", answer)
    return re.sub(r"(?<![\d/])(\d+)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", answer)


def latex(answer: str) -> str:
    """For the library: without its unit, and every decimal as the fraction that it is, so that nothing is rounded."""
    core, _ = unit(answer)

    def exact(found: re.Match[str]) -> str:
        whole, part = found[1].replace(",", ""), found[2]
        return rf"\frac{{{int(whole + part)}}}{{{10 ** len(part)}}}"

    return _DECIMAL.sub(exact, core.replace("−", "-"))


def unit(answer: str) -> tuple[str, str]:
    """An answer and the unit it ends in, if it does."""
    found = _UNIT.search(answer)
    if not found:
        return answer, ""
    words = (found[1] or found[2] or "").strip(" .").lower()
    return answer[: found.start()], words + re.sub(r"[{}]", "", found[3] or "")


def option(answer: str) -> str | None:
    r"""The letter of an answer that is the label of a choice, such as `\text{(C)}`."""
    found = _OPTION.fullmatch(answer.strip())
    return found[1] if found else None


def words(answer: str) -> str | None:
    """The words of an answer that is nothing else."""
    found = _WORDS.fullmatch(answer.strip())
    said = " ".join((found[1] or found[2] or "").split()).casefold() if found else ""
    return said if len(said) > 1 and not re.search(r"[\d\\]", said) else None


def refused(gold: str, answer: str) -> bool:
    """Whether an answer is not worth asking about: too long, hedged, unfinished, or of another form than the gold."""
    gold_unit, own_unit = unit(gold)[1], unit(answer)[1]
    core, gold_core = unit(answer)[0].strip(), unit(gold)[0].strip()
    return (
        not core
        or len(answer) > MAX_LETTERS
        or core.count("{") + core.count("(") > MAX_BRACKETS
        or any(letter.isdigit() and not letter.isascii() for letter in answer)
        or bool(_NOT_A_UNIT.search(own_unit.partition("^")[0]))
        or bool(gold_unit and own_unit and gold_unit != own_unit)
        or bool(re.search(_TEXT, core) and not re.search(_TEXT, gold) and not re.fullmatch(_TEXT, core))
        or bool(re.search(r"\d(?:\s|\\[ ,;:!]|\\q?quad)+\d", core))
        or (":" in core + gold_core and "".join(core.split()) != "".join(gold_core.split()))  # 10:30 is no third of anything
        or bool(_bases(core) and _bases(core) != _bases(gold_core))
        or ("\\emptyset" in core) != ("\\emptyset" in gold_core)
        or bool(_BESIDE.search(core) and not _BESIDE.search(gold_core))  # the library adds what stands side by side
        or ("\\{" in core and gold_core[:1] in {"(", "["})
        or _wrong_equation(gold_core, core)
        or bool(_OPERATOR.search(core) and not _OPERATOR.search(gold_core))
        or (_is_number(gold_core) and bool(_UNFINISHED.search(core) or _LISTED.search(core)))
        or _wrong_percent(gold_core, core)
    )


def _bases(core: str) -> set[str]:
    return set(re.findall(r"\d\s*_\s*\{?\s*(\d+)", core))


def _is_number(core: str) -> bool:
    """Whether a gold is one, in brackets, with its name or as a power of whole numbers, too."""
    left, equals, right = core.partition("=")
    core = right.strip() if equals and _NAME.fullmatch(left.strip()) else core
    core = re.sub(r"\s*\^\s*\{?\\circ\}?$", "", core)
    if "," not in core:
        core = re.sub(r"^(?:\(|\\?\{)\s*|\s*(?:\)|\\?\})$", "", core)
    if re.fullmatch(r"\d+\s*\^\s*\{?\d+\}?", core):
        return True
    fraction = re.fullmatch(r"-?(?:\\[dt]?frac\s*\{?\d+\}?\s*\{?\d+\}?|\d+/\d+)", core)
    return fraction is not None or number(core.removesuffix("%").removesuffix("\\")) is not None


def _wrong_equation(gold: str, answer: str) -> bool:
    """`6=5` and `2+2=5` are not 5; `x=5` is. An equation asked for is compared as one."""
    if "=" not in answer or "=" in gold:
        return "=" in gold and answer.count("=") > gold.count("=")
    left, *others = re.split(r"(?<![<>!])=", answer)
    return len(others) != 1 or not _NAME.fullmatch(left.strip())


def _wrong_percent(gold: str, answer: str) -> bool:
    """50% is 0.5, and is 50 where a percentage was asked for; 0.5% is not 0.5."""
    own, other = (number(re.sub(r"\s*\\?%$", "", side)) for side in (answer, gold))
    if gold.endswith("%") == answer.endswith("%") or own is None or other is None:
        return False
    return own == other and abs(own) <= 1
