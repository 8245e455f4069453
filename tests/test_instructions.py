"""Instructions that programs can check: each kind, the languages, the grader, the task of IFEval."""

import time

import pytest

from posttrain.errors import DataError
from posttrain.evaluation.audit import PROBES, cases_of
from posttrain.tasks import IfevalTask, InstructionsGrader, ProblemsTask
from posttrain.tasks.instructions import Instruction, sentences
from posttrain.tasks.languages import LANGUAGES, speaks
from posttrain.text import Message, Problem

PLAIN = "The cat sat on the mat, and it purred. Then it slept."
YES, NO, MAYBE = "My answer is yes.", "My answer is no.", "My answer is maybe."


def problem(*told, prompt="Write something."):
    """Of (id, kwargs) pairs."""
    facts = {"instruction_id_list": [id for id, _ in told], "kwargs": [settings for _, settings in told]}
    return Problem("p", (Message("user", prompt),), None, facts, "f.jsonl:1")


def said(text, *told, **settings):
    return InstructionsGrader(**settings).grade(problem(*told), text).score


# ---- each kind: (id, kwargs, what follows, what does not)

KINDS = [
    ("keywords:existence", {"keywords": ["cat", "Mat"]}, [PLAIN, "CATS on mats"], ["The cat sat.", "c a t mat", "dog"]),
    ("keywords:existence", {"keywords": ["c.t"]}, ["ac.tion"], ["cat", "c\\.t"]),
    ("keywords:frequency", {"keyword": "it", "frequency": 2, "relation": "at least"}, [PLAIN, "It sits"], ["It is", "i t i t"]),
    ("keywords:frequency", {"keyword": "it", "frequency": 2, "relation": "less than"}, ["It is", "no"], [PLAIN, "it it"]),
    ("keywords:forbidden_words", {"forbidden_words": ["Cat", "c++"]}, ["Cats and concat", "c+ +"], ["A cat.", "CAT", "not c++ either"]),
    ("keywords:letter_frequency", {"letter": "T", "let_frequency": 3, "let_relation": "at least"}, ["Tate t"], ["tt", "The t"]),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 2, "let_relation": "less than"}, ["no", "no!"], ["!!", "a! b!"]),
    ("punctuation:no_comma", {}, ["one and two; three"], ["one, two", "1,000", "一，二", "واحد، اثنان"]),
    ("language:response_language", {"language": "hi"}, ["यह एक बिल्ली है और वह सो रही है।"], [PLAIN, "ही मांजर आहे आणि ती झोपली आहे.", "123", "?"]),
    ("change_case:english_capital", {}, [PLAIN.upper(), "WORKS"], [PLAIN, PLAIN.upper() + " a", "EL GATO DE LA CASA", "123"]),
    ("change_case:english_lowercase", {}, [PLAIN.lower(), "etchings"], [PLAIN, PLAIN.lower() + " A", "el gato de la casa", "123", "x" * 2000]),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 3, "capital_relation": "at least"},
        ["A BIG-TIME U.S. firm", "**GO** TO \"HELL\""], ["BIG-TIME U.S. firm", "Go To Hell", "GOOd BAd Ok", "1 2 3"],
    ),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"},
        ["ONE word", "none"], ["TWO WORDS", "I AM"],
    ),
    (
        "length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"},
        [PLAIN, "One! Two", "**One.** Two"], ["One.", "Dr. No went", "1. One", ". . .", "One\n\nTwo", "No... way"],
    ),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, [PLAIN, "1. One.\n2. Two."], ["One go. Two go. Three", "One? Two? Three?"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["one two three", "one-two, 3"], ["one two", "onetwo - !"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["बिल्ली है", "one, two."], ["one two three", "a-b-c"]),
    (
        "length_constraints:number_paragraphs", {"num_paragraphs": 2},
        ["one\n***\ntwo", "***\none *** two\n***\n"], ["one\n\ntwo", "one *** two *** three", "one ***", "one *** *** two", "one *** *** "],
    ),
    (
        "length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "jasper"},
        ["One\n\nJasper: two", "\n\nOne\n\n\n\n\"Jasper's two\""],
        ["Jasper\n\ntwo", "One\nJasper two", "One\n\nJaspers two", "One\n\ntwo Jasper", "One\n\nJasper\n\nthree", "One\n\n**Jasper** two"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[a] and [b c]", "[[a]] [b](c)"], ["[a] and []", "[a] [ ]", "[a\n] [b]", "(a) (b)"]),
    (
        "detectable_content:postscript", {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Write!", "Bye. **p. s.** Write", "P.S.Write"], ["Bye.\nP.S.", "Bye. PS Write", "P.P.S. Write", "P. P.S. Write", "app.s. write"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["P.P.S. Write", "P.P.S Write", "p. p. s: write"], ["P.S. Write", "P.P.Something", "P.P.S", "P.P.S.!"]),
    (
        "detectable_format:number_bullet_lists", {"num_bullets": 2},
        ["* one\n* two", "Yes:\n  - one\n  * **two**\n---\n*Note* well", "- one\n\n- two\n- \n* * *"],
        ["* one", "* one\n* two\n* three", "*one\n*two", "1. one\n2. two", "• one\n• two", "so * one\nso * two"],
    ),
    (
        "detectable_format:number_highlighted_sections", {"num_highlights": 2},
        ["*one* and *two*", "**one**, ***two words***", "* a *one*\n* b **two**"],
        ["*one*", "***one***", "**one*", "* one * and * two *", "** **** **", "*one\ntwo* *three\nfour*", "****one*** ****two***", "_one_ _two_", "2 * 3 * 4 * 5"],
    ),
    (
        "detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\none\nSECTION 2\ntwo", "\"## SECTION 1: one\n**SECTION 2**\ntwo", "  SECTION1\nSECTION2\nSECTION 3"],
        ["SECTION 1\none", "SECTION 1\nSECTION 1", "SECTION 1 as in SECTION 2", "as in SECTION 1\nas in SECTION 2", "Section 1\nSection 2", "SECTION one\nSECTION two"],
    ),
    ("detectable_format:title", {}, ["<<One>>\ntwo", "It is <<One two>>."], ["One", "<One>", "<< >>", "<<>>", "<<One\n>>", "<<<<", ">>One<<"]),
    (
        "detectable_format:json_format", {},
        ['{"a": 1}', ' [1, 2]\n', '```json\n{"a": [1]}\n```', '```JSON {"a": 1} ```', '```\n[]\n```'],
        ["a", '"a"', "7", "null", '{"a": 1', "{'a': 1}", 'Here: {"a": 1}', '```json\n{"a": 1}\n``` so', '{"a": NaN}', "[" * 50_000, "```", "``````", "[So:\n```json\n{}\n```"],
    ),
    ("detectable_format:constrained_response", {}, [YES, f"Well. {MAYBE} So."], [f"{YES} {NO}", "\n".join((YES, NO, MAYBE)), "my answer is yes.", "yes", "My answer is"]),
    (
        "combination:two_responses", {},
        ["one\n******\ntwo", "******one******two******"], ["one two", "one\n***\ntwo", "one\n******\nOne ", "one ****** two ****** three", "one******", "one ****** ****** two", "one ****** ****** "],
    ),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say Hi. "}, ["Say Hi.\n\nHi!", " say hi. Hi"], ["Hi! Say Hi.", "Say Hi.", "Say Hi. !", "Say hey. Hi", "\"Say Hi.\" Hi"]),
    ("startend:end_checker", {"end_phrase": "The end."}, ["So. The End.", "\"So. the end.\" \n", "The end."], ["The end. So.", "The end", "So. The end.'", "The end!"]),
    ("startend:quotation", {}, ['"One"', ' "One." \n'], ["One", '"One', 'One"', '"', '""', '" "', "'One'", '"One" two']),
]  # fmt: skip


@pytest.mark.parametrize(("id", "settings", "right", "wrong"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_follows_an_instruction_is_1_and_what_comes_near_is_0(id, settings, right, wrong):
    instruction = Instruction.known[id].model_validate(settings)
    assert [text for text in right if not instruction.followed(text)] == []
    assert [text for text in wrong if instruction.followed(text)] == []
    assert len(wrong) >= 2
    assert said(right[0], (id, settings)) == 1.0
    assert {said(text, (id, settings)) for text in [wrong[0], "", " \n"]} == {0.0}


def test_all_25_kinds_are_tried():
    assert {id for id, *_ in KINDS} == set(Instruction.known)
    assert len(Instruction.known) == 25


@pytest.mark.parametrize(("text", "count"), [
    ("", 0), ("...", 0), ("One", 1), ("One.", 1), ("One. Two", 2), ("One.Two", 1), ('He said "Yes." She left.', 2), ("(One.) [Two!]", 2),
    ("Mr. A. B. Cee of the U.S. Navy met Dr. Dee, e.g. at 5 p.m. on deck. It cost 3.5.", 2), ("What?! No!!! ...", 2), ("Wait... what", 1),
    ("1. Do this.\n2. Do that.\n10. Rest.", 3), ("There are 3. Take one.", 2), ("Title\n\nOne. Two.", 2), ("* One.\n* Two.\n- Three", 3),
    ("यह है। वह है।", 2), ("これは一つ。これは二つ！三つ", 3), ("**One.** *Two.* __Three.__", 3), ("“One.” ‘Two.’", 2),
])  # fmt: skip
def test_sentences_are_counted_as_a_reader_would(text, count):
    assert sentences(text) == count


# ---- languages

SAID = {
    "ar": "القطة على السرير و هي تنام كل يوم في البيت", "bg": "Котката е на леглото и тя спи, но не се буди от това.", "bn": "বিড়ালটি বিছানায় ঘুমাচ্ছে।",
    "de": "Die Katze liegt auf dem Bett und schläft, aber nicht lange.", "en": PLAIN, "es": "El gato está en la cama y duerme todo el día.",
    "fa": "گربه در خانه است و هر روز می خوابد", "fi": "Kissa on sängyllä ja se nukkuu, mutta ei kauan.", "fr": "Le chat est sur le lit et il dort dans la maison.",
    "gu": "બિલાડી પલંગ પર સૂઈ રહી છે.", "he": "החתול ישן על המיטה.", "hi": "बिल्ली घर में है और वह सो रही है।", "it": "Il gatto è nel letto e non si sveglia più.",
    "ja": "猫はベッドの上で寝ています。", "kn": "ಬೆಕ್ಕು ಹಾಸಿಗೆಯ ಮೇಲೆ ಮಲಗಿದೆ.", "ko": "고양이가 침대에서 자고 있다.", "ml": "പൂച്ച കട്ടിലിൽ ഉറങ്ങുന്നു.",
    "mr": "मांजर घरात आहे आणि ती झोपली आहे.", "ne": "बिरालो घरमा छ र यो सुतेको छ।", "pa": "ਬਿੱਲੀ ਮੰਜੇ ਉੱਤੇ ਸੁੱਤੀ ਹੈ।",
    "pl": "Kot jest na łóżku i śpi, ale nie długo.", "pt": "O gato está na cama e não quer sair da casa.", "ru": "Кошка лежит на кровати, и она спит весь день.",
    "sw": "Paka yuko katika nyumba na analala kwa sababu ya usiku.", "ta": "பூனை படுக்கையில் தூங்குகிறது.", "te": "పిల్లి మంచం మీద నిద్రపోతోంది.",
    "th": "แมวนอนอยู่บนเตียง", "uk": "Кіт лежить на ліжку, і він спить цілий день.", "ur": "بلی گھر میں ہے اور وہ سو رہی ہے", "vi": "Con mèo đang ngủ trên giường của tôi.",
}  # fmt: skip


def test_each_language_is_taken_for_itself_and_for_no_other():
    assert set(SAID) == set(LANGUAGES)
    assert {language: [other for other in LANGUAGES if speaks(text, other)] for language, text in SAID.items()} == {
        language: [language] for language in LANGUAGES
    }


def test_the_case_of_letters_does_not_change_their_language():
    assert [language for language, text in SAID.items() if not speaks(text.upper(), language)] == []


def test_a_language_has_most_of_the_letters():
    assert speaks(f"{SAID['ko']} {SAID['ko']} Hello, cat", "ko")
    assert not speaks(f"{SAID['ko']} {PLAIN}", "ko")
    assert speaks(f"{SAID['ko']} {PLAIN}", "en")
    assert not speaks("猫睡在床上", "ja"), "Chinese"


def test_in_doubt_it_is_english_or_what_was_asked_for():
    assert [language for language in LANGUAGES if speaks("etchings", language)] == ["en"]
    assert [language for language in LANGUAGES if speaks("кот", language)] == ["bg", "ru", "uk"]
    assert [language for language in LANGUAGES if speaks("рыбы", language)] == ["ru"], "a letter of its own"
    assert [language for language in LANGUAGES if speaks("x" * 5000, language) or speaks("7!", language)] == []
    assert not speaks("Katten ligger fortfarande kvar under soffan, eftersom hunden skäller utanför huset varje morgon " * 3, "en"), "Swedish"


# ---- the grader

BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})
LOWER = ("change_case:english_lowercase", {})
SHORT = ("length_constraints:number_words", {"num_words": 9, "relation": "less than"})


def test_all_must_be_followed_or_their_share_counts():
    told = (BULLETS, LOWER, SHORT)
    for text, all_of_them, share in [("* one\n* two", 1, 1), ("* One\n* two", 0, 2 / 3), ("One", 0, 1 / 3), (PLAIN, 0, 0), ("", 0, 0)]:
        assert said(text, *told) == all_of_them
        assert said(text, *told, score="share") == pytest.approx(share)
    grade = InstructionsGrader().grade(problem(*told), "* One\n* two")
    assert grade.parts == {BULLETS[0]: 1.0, LOWER[0]: 0.0, SHORT[0]: 1.0}


def test_an_instruction_that_is_given_twice_is_one_part_and_counts_twice():
    least, most = ({"keyword": "cat", "frequency": count, "relation": how} for count, how in [(1, "at least"), (3, "less than")])
    told = [("keywords:frequency", least), ("keywords:frequency", most), SHORT]
    grade = InstructionsGrader(score="share").grade(problem(*told), "cat cat cat")
    assert grade.parts == {"keywords:frequency": 0.0, SHORT[0]: 1.0}
    assert grade.score == pytest.approx(2 / 3)
    assert InstructionsGrader().grade(problem(*told), "dog").parts == {"keywords:frequency": 0.0, SHORT[0]: 1.0}
    assert said("cat cat", *told) == 1.0


def test_loose_reads_on_without_the_first_line_the_last_or_the_asterisks():
    json = ("detectable_format:json_format", {})
    end = ("startend:end_checker", {"end_phrase": "Bye."})
    first = ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "one"})
    for text, told in [
        ('Sure:\n{"a": 1}', json), ('{"a": 1}\nDone.', json), ('Sure:\n{"a": 1}\nDone.', json), ("So. Bye.\nDone", end), ("So. **Bye.**", end),
        ("**One** two", first), ("Sure:\n**One** two", first), ("**One** two\n\nDone", first), ("Sure:\n\n**One** two\n\nDone", first),
    ]:  # fmt: skip
        assert (said(text, told), said(text, told, strict=False)) == (0.0, 1.0), text
    assert said('Sure:\n\n{"a": 1}', end, strict=False) == 0.0
    assert said("Sure", ("punctuation:no_comma", {}), strict=False) == 1.0
    assert said("One,", ("punctuation:no_comma", {}), strict=False) == 0.0, "a text that nothing is left of follows nothing"


def test_loose_takes_each_instruction_by_itself():
    told = (("detectable_format:number_highlighted_sections", {"num_highlights": 1}), ("startend:end_checker", {"end_phrase": "Bye."}))
    assert said("So. **Bye.**", *told, strict=False) == 1.0, "highlighted as it is, and ended without asterisks"


def test_the_prompt_again_follows_nothing():
    comma = ("punctuation:no_comma", {})
    assert [said(text, comma, strict=strict) for text in ("Write something.", " Write\nsomething. ") for strict in (True, False)] == [0.0] * 4
    assert said("Write something. So", comma) == 1.0


@pytest.mark.parametrize(("facts", "why"), [
    ({}, "its `instruction_id_list` is no list of ids"),
    ({"instruction_id_list": [], "kwargs": []}, "its `instruction_id_list` is no list of ids"),
    ({"instruction_id_list": "punctuation:no_comma", "kwargs": [{}]}, "its `instruction_id_list` is no list of ids"),
    ({"instruction_id_list": [3], "kwargs": [{}]}, "its `instruction_id_list` is no list of ids"),
    ({"instruction_id_list": ["punctuation:no_comma"]}, "its `kwargs` is no list of a mapping for each id"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "its `kwargs` is no list of a mapping for each id"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["{}"]}, "its `kwargs` is no list of a mapping for each id"),
    ({"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}, "no instruction 'punctuation:no_coma'; did you mean 'punctuation:no_comma'?"),
    ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"marks": 3}]}, "its kwargs for punctuation:no_comma: marks: Extra inputs"),
])  # fmt: skip
def test_a_row_that_asks_for_nothing_known_is_refused_and_never_graded(facts, why):
    row = Problem("p", (Message("user", "?"),), None, facts)
    assert why in InstructionsGrader().gold_problem(row)
    grade = InstructionsGrader().grade(row, "yes")
    assert grade.score is None
    assert why[:30] in grade.failure


WRONG = [
    ("length_constraints:number_words", {"relation": "at least"}, "num_words: Field required"),
    ("length_constraints:number_words", {"num_words": None, "relation": "at least"}, "num_words: Field required"),
    ("length_constraints:number_words", {"num_words": "9", "relation": "at least"}, "num_words: Input should be a valid integer"),
    ("length_constraints:number_words", {"num_words": True, "relation": "at least"}, "num_words: Input should be a valid integer"),
    ("length_constraints:number_words", {"num_words": 0, "relation": "less than"}, "num_words: Input should be greater than 0"),
    ("length_constraints:number_words", {"num_words": 9, "relation": "about"}, "relation: Input should be 'at least' or 'less than'"),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 1, "nth_paragraph": 2, "first_word": "a"}, "is more than num_paragraphs"),
    ("keywords:existence", {"keywords": []}, "keywords: List should have at least 1 item"),
    ("keywords:existence", {"keywords": "cat"}, "keywords: Input should be a valid list"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat", " "]}, "forbidden_words.1: String should have at least 1 character"),
    ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "letter: String should have at most 1"),
    ("language:response_language", {"language": "tlh"}, "'tlh' is none of the languages that are told apart: ar, bg, bn,"),
    ("startend:end_checker", {"end_phrase": ""}, "end_phrase: String should have at least 1 character"),
]


@pytest.mark.parametrize(("id", "settings", "why"), WRONG)
def test_a_setting_that_is_missing_or_of_another_type_is_named(id, settings, why):
    found = InstructionsGrader().gold_problem(problem(SHORT, (id, settings)))
    assert found.startswith(f"its kwargs for {id}: ")
    assert why in found
    assert InstructionsGrader().grade(problem((id, settings)), "yes").score is None


def test_what_is_null_counts_as_not_there():
    """In some copies of the data set each row has all keys."""
    everything = {name: None for each in Instruction.known.values() for name in each.model_fields}
    assert said("one", ("punctuation:no_comma", everything)) == 1.0
    assert said("one", ("length_constraints:number_words", {**everything, **SHORT[1]})) == 1.0


def test_a_row_is_refused_with_its_place(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "?", "instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]}\n')
    task = ProblemsTask.model_validate({"source": str(file), "grader": {"kind": "instructions"}})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: grader instructions cannot grade this problem: there is no instruction"):
        task.check()


# ---- the task


@pytest.fixture(scope="module")
def shipped():
    return IfevalTask().problems()


def test_every_shipped_row_can_be_graded_and_nothing_earns_nothing(shipped):
    grader = InstructionsGrader()
    assert len(shipped) == 271
    assert [grader.gold_problem(each) for each in shipped] == [None] * 271
    assert {id for each in shipped for id in each.facts["instruction_id_list"]} == set(Instruction.known)
    for strict in (True, False):
        for settings in ({"score": "all"}, {"score": "share"}):
            some = InstructionsGrader(strict=strict, **settings)
            assert {some.grade(each, text).score for each in shipped for text in ("", " \n\t")} == {0.0}


HOSTILE = [
    PLAIN, PLAIN.lower(), "* one\n* two\n* three", '{"a": "[b]"}', "\ud800", "\x00", "\u202e7", "\r\n\r\n\v\x1c\u2028", "***\n" * 99, "*\n*", "\n*", "*",
]  # fmt: skip


def test_loose_is_never_below_strict(shipped):
    strict, loose = InstructionsGrader(score="share"), InstructionsGrader(score="share", strict=False)
    for each in shipped:
        for text in [*HOSTILE, f'"{each.prompt[0].content}"\n\nP.P.S. <<a>> [b] *c*']:
            low, high = strict.grade(each, text), loose.grade(each, text)
            assert (low.failure, high.failure) == (None, None)
            assert set(low.parts) == set(high.parts) == set(each.facts["instruction_id_list"])
            assert all(0 <= low.parts[id] <= high.parts[id] <= 1 for id in low.parts)
            assert low.score <= high.score


LONG = [
    *"*[](){}<>.,!?\"'`#-_ \n\r\t\x00aAx9éя漢ह\u0300\ud800İß", "a ", "[a", "<<", "<<a>", "**a ", "* ", "*a\n", "-\n", "\n\n", "\nSECTION 1", "P. ", "P.S.",
    "a-", "A.", '",', "\\", "```", "1. ", "so. ", "***a", "\n*", "है ", "x\u2028", "My answer is ", '{"a":', "[[],", "(.", ".)",
]  # fmt: skip


@pytest.mark.parametrize(("id", "settings", "right", "wrong"), KINDS, ids=lambda value: value if isinstance(value, str) else "")
def test_100_000_characters_of_anything_are_read_in_no_time_to_speak_of(id, settings, right, wrong):
    instruction = Instruction.known[id].model_validate(settings)
    for unit in filter(None, [*LONG, *right, *wrong]):
        text = (unit * (100_000 // len(unit) + 1))[:100_000] + "x"
        began = time.process_time()
        instruction.followed(text)
        assert time.process_time() - began < 5, unit  # minutes where it takes the square of the length


FOLLOWED_BY_ANYTHING = {
    "change_case:capital_word_frequency", "change_case:english_lowercase", "detectable_content:number_placeholders", "keywords:forbidden_words",
    "keywords:frequency", "keywords:letter_frequency", "length_constraints:number_sentences", "length_constraints:number_words",
    "punctuation:no_comma",
}  # fmt: skip
"""Kinds that may ask for no more than that something is not there, or is short, or long."""


def test_a_probe_is_paid_only_where_the_prompt_asks_for_what_any_text_has(shipped):
    """What `posttrain audit ifeval` finds are prompts that ask for next to nothing, no mistakes of the grader."""
    grader, paid = InstructionsGrader(), {name: set() for name in PROBES}
    for case in cases_of(shipped, "{}"):
        for name, probe in PROBES.items():
            grades = [grader.grade(case.problem, text) for text in probe(case)]
            if min(grade.score for grade in grades) >= 1:
                assert set(case.problem.facts["instruction_id_list"]) <= FOLLOWED_BY_ANYTHING, (name, case.problem.id)
                paid[name].add(case.problem.id)
    assert [name for name in ("nothing", "blank lines", "the question again", "the form alone") if paid[name]] == []
    assert max(map(len, paid.values())) / len(shipped) < 0.14
