"""Rows that say how good answers are: parsed, dropped and counted by reason, or refused with file and line."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_data_files import _in_an_empty_folder, read, write
from test_data_formats import ANY, parse

from posttrain.data.format import Format, Unusable, detect
from posttrain.data.source import Raw
from posttrain.errors import DataError
from posttrain.text import Labelled, Message, Preference, Ranking, Steps

__all__ = ["_in_an_empty_folder"]

HI, YES, NO = Message("user", "hi"), Message("assistant", "yes"), Message("assistant", "no")
WHERE = "f.jsonl:3"
FIX = "correct the row, or name another column in format.fields"


def plain(*messages):
    return [message.as_dict() for message in messages]


def asking(text):
    return Message("user", text)


def unusable(value, kind):
    with pytest.raises(Unusable) as caught:
        parse(value, kind)
    return str(caught.value)


def refused(value, kind, **settings):
    with pytest.raises(DataError) as caught:
        Format.model_validate({"kind": kind, **settings}).parse(Raw(value, WHERE))
    assert str(caught.value).startswith(f"{WHERE}: ")
    return str(caught.value).removeprefix(f"{WHERE}: ")


# preference


def pair(**more):
    return {"prompt": "hi", "chosen": "yes", "rejected": "no", **more}


@pytest.mark.parametrize(("margin", "read_as"), [(None, 0), (0, 0), (2, 2), (0.25, 0.25)])
def test_a_margin_is_how_much_better_chosen_must_be(margin, read_as):
    assert parse(pair(margin=margin), "preference") == Preference((HI,), (YES,), (NO,), 1.0, read_as, WHERE)
    assert parse(pair(), "preference").margin == 0
    assert parse(pair(gap=margin), "preference", margin="gap").margin == read_as


@pytest.mark.parametrize(
    ("margin", "found"),
    [(-1, "-1 (integer)"), (True, "true (true or false)"), ("2", '"2" (text)'), (float("nan"), "nan (number)"), (1e999, "inf (number)")],
)
def test_a_margin_below_zero_or_without_end_is_refused(margin, found):
    assert refused(pair(margin=margin), "preference") == f'column "margin": expected a number from 0 up, found {found}; {FIX}'


def test_a_probability_is_still_one():
    assert refused(pair(prefer=1.5), "preference").startswith('column "prefer": expected a probability from 0 to 1, found 1.5 (number)')


def test_pairs_without_two_different_answers_are_dropped():
    assert unusable(pair(rejected="yes"), "preference") == "chosen and rejected are the same"
    assert unusable(pair(chosen=""), "preference") == "empty chosen"
    assert unusable(pair(rejected=[]), "preference") == "empty rejected"
    assert unusable(pair(rejected="  "), "preference") == "empty rejected"
    assert unusable(pair(chosen=plain(HI)), "preference") == "no assistant message to learn from"
    assert unusable({"chosen": plain(HI, YES), "rejected": plain(HI)}, "preference") == "no assistant message to learn from"
    more = plain(HI, YES, asking("and?"), NO)
    assert unusable({"chosen": plain(HI, YES), "rejected": more}, "preference") == "no assistant message to learn from"


def test_pairs_that_answer_different_prompts_are_dropped():
    def alone(chosen, rejected):
        return unusable({"chosen": chosen, "rejected": rejected}, "preference")

    apart, system = "chosen and rejected share no prompt", Message("system", "be kind")
    assert alone("yes", "no") == apart
    assert alone(plain(HI, YES), plain(asking("ho"), NO)) == apart
    assert alone(plain(system, HI, YES), plain(system, asking("ho"), NO)) == apart
    assert alone(plain(HI, YES, asking("a"), NO), plain(HI, YES, asking("b"), NO)) == apart


def test_conversations_that_begin_with_another_prompt_than_their_column_are_dropped():
    other = plain(asking("ho"), YES)
    assert unusable(pair(chosen=other, rejected=plain(asking("ho"), NO)), "preference") == "chosen begins with another prompt"
    assert unusable(pair(chosen=plain(HI, YES), rejected=other), "preference") == "rejected begins with another prompt"
    system = plain(Message("system", "be kind"), HI, YES)
    assert unusable(pair(chosen=system), "preference") == "chosen begins with another prompt"


def test_one_side_may_repeat_the_prompt_where_the_other_does_not():
    wanted = Preference((HI,), (YES,), (NO,), where=WHERE)
    assert parse(pair(chosen=plain(HI, YES)), "preference") == wanted
    assert parse(pair(rejected=plain(HI, NO)), "preference") == wanted


def test_answers_that_go_on_after_their_first_turn_are_kept_whole():
    chosen = (YES, asking("sure?"), YES)
    assert parse({"chosen": plain(HI, *chosen), "rejected": plain(HI, NO)}, "preference").chosen == chosen


# labelled


def answer(**more):
    return {"prompt": "hi", "completion": "yes", **more}


@pytest.mark.parametrize(("label", "good"), [(True, True), (False, False), (1, True), (0, False), (1.0, True), (0.0, False)])
def test_a_label_is_true_or_false_or_one_or_nought(label, good):
    assert parse(answer(label=label), "labelled") == Labelled((HI,), (YES,), good, WHERE)


def test_labels_are_words_where_the_good_one_is_named():
    format = Format.model_validate({"kind": "labelled", "good": "positive"})
    assert [format.parse(Raw(answer(label=word), WHERE)).good for word in ("positive", "negative")] == [True, False]


def test_a_labelled_answer_is_texts_messages_or_a_whole_conversation():
    wanted = Labelled((HI,), (YES,), True, WHERE)
    for prompt in ("hi", HI.as_dict(), plain(HI)):
        for completion in ("yes", YES.as_dict(), plain(YES), plain(HI, YES)):
            assert parse({"prompt": prompt, "completion": completion, "label": 1}, "labelled") == wanted
    assert parse({"q": "hi", "a": "yes", "up": 1}, "labelled", prompt="q", completion="a", label="up") == wanted


def test_labels_that_say_nothing_known_are_refused_with_the_remedy():
    assert refused(answer(label="positive"), "labelled") == (
        'column "label": expected true, false, 1 or 0, found "positive" (text); say which label is the good one, as in '
        "format: {kind: labelled, good: positive}, or learn from every completion: format: prompt_completion"
    )
    for label, found in [(2, "2 (integer)"), (0.5, "0.5 (number)"), (float("nan"), "nan (number)"), ([1], "a list")]:
        assert refused(answer(label=label), "labelled") == f'column "label": expected true, false, 1 or 0, found {found}; {FIX}'
    assert refused(answer(label=" Positive"), "labelled", good="positive") == (
        'column "label": " Positive" (text) is not written as format.good is, "positive" (text); write both alike'
    )
    assert refused(answer(label=True), "labelled", good="positive") == (
        f'column "label": expected text, found true (true or false); {FIX}'
    )


def test_labelled_answers_that_say_nothing_are_dropped():
    for nothing in (None, "", " ", []):
        assert unusable(answer(prompt=nothing, label=1), "labelled") == "empty prompt"
        assert unusable(answer(completion=nothing, label=1), "labelled") == "empty completion"
    for nothing in (None, ""):
        assert unusable(answer(label=nothing), "labelled") == "empty label"
    assert unusable(answer(completion=plain(HI), label=1), "labelled") == "no assistant message to learn from"
    other = plain(asking("ho"), YES)
    assert unusable(answer(completion=other, label=1), "labelled") == "completion begins with another prompt"


# ranking


def ranked(*completions, **more):
    return {"prompt": "hi", "completions": list(completions) or ["yes", "no"], **more}


@pytest.mark.parametrize(
    ("said", "scores"),
    [
        ({"scores": [1, -0.5]}, (1, -0.5)),
        ({"ranks": [1, 2]}, (-1, -2)),
        ({"ranks": [7, 3]}, (-7, -3)),
        ({"best": 0}, (1, 0)),
        ({"best": "no"}, (0, 1)),
        ({"best": plain(YES)}, (1, 0)),
        ({"best": plain(HI, NO)}, (0, 1)),
    ],
)
def test_a_ranking_is_scores_or_ranks_or_the_best(said, scores):
    assert parse(ranked(**said), "ranking") == Ranking((HI,), ((YES,), (NO,)), scores, WHERE)


def test_ranked_completions_are_texts_messages_or_whole_conversations():
    row = parse(ranked("yes", NO.as_dict(), plain(YES, HI, NO), plain(HI, NO), scores=[1, 2, 3, 2]), "ranking")
    assert row.completions == ((YES,), (NO,), (YES, HI, NO), (NO,))
    mapped = {"question": "hi", "answers": ["yes", "no"], "stars": [5, 1]}
    row = parse(mapped, "ranking", prompt="question", completions="answers", scores="stars")
    assert row == Ranking((HI,), ((YES,), (NO,)), (5, 1), WHERE)


def test_rankings_that_rank_nothing_are_dropped():
    assert unusable(ranked(scores=[2, 2]), "ranking") == "all completions are ranked the same"
    assert unusable(ranked("yes", "yes", best="yes"), "ranking") == "all completions are ranked the same"
    assert unusable(ranked("yes", "no", "yes", scores=[2, 0, 1]), "ranking") == "equal completions are ranked differently"
    assert unusable(ranked("yes", plain(YES), best=0), "ranking") == "equal completions are ranked differently"
    assert parse(ranked("yes", "no", "yes", scores=[2, 0, 2]), "ranking").scores == (2, 0, 2)
    assert unusable(ranked("yes", scores=[2]), "ranking") == "fewer than two completions"
    assert unusable({**ranked(), "completions": [], "scores": []}, "ranking") == "empty completions"
    assert unusable(ranked("yes", None, scores=[1, 2]), "ranking") == "empty completion"
    assert unusable(ranked("yes", " ", scores=[1, 2]), "ranking") == "empty completion"
    assert unusable(ranked("yes", plain(HI), scores=[1, 2]), "ranking") == "no assistant message to learn from"
    assert unusable(ranked("yes", plain(asking("ho"), NO), scores=[1, 2]), "ranking") == "completion begins with another prompt"
    assert unusable(ranked(scores=None), "ranking") == "empty scores"
    assert unusable(ranked(ranks=[]), "ranking") == "empty ranks"
    assert unusable(ranked(best=None), "ranking") == "empty best"
    assert unusable(ranked(prompt="", best=0), "ranking") == "empty prompt"


def test_rankings_of_a_wrong_form_are_refused():
    assert refused({**ranked(scores=[1, 2]), "completions": "yes"}, "ranking") == (
        f'column "completions": expected a list, found "yes" (text); {FIX}'
    )
    assert refused(ranked("yes", 3, scores=[1, 2]), "ranking") == (
        f"completions[1]: expected text, a message or a list of messages, found 3 (integer); {FIX}"
    )
    assert refused(ranked(scores=0.5), "ranking") == f'column "scores": expected a list, found 0.5 (number); {FIX}'
    assert refused(ranked(scores=[1, 2, 3]), "ranking") == (
        'column "scores" has 3, but column "completions" has 2; correct the row: one for each'
    )
    for score, found in [(float("nan"), "nan (number)"), (-1e999, "-inf (number)"), (None, "null"), (True, "true (true or false)")]:
        assert refused(ranked(scores=[1, score]), "ranking") == f"scores[1]: expected a finite number, found {found}; {FIX}"
    assert refused(ranked(scores=[1, 10**400]), "ranking").startswith("scores[1]: expected a finite number, found 1000")
    for rank, found in [(0, "0 (integer)"), (1.5, "1.5 (number)"), (True, "true (true or false)")]:
        assert refused(ranked(ranks=[rank, 2]), "ranking") == (
            f"ranks[0]: expected a rank: 1 for the best, 2 for the next, found {found}; {FIX}"
        )
    for best, found in [(2, "2 (integer)"), (-1, "-1 (integer)"), ("maybe", '"maybe" (text)'), (True, "true (true or false)")]:
        assert refused(ranked(best=best), "ranking") == (
            f'column "best": expected an index from 0 to 1, or one of the completions, found {found}; {FIX}'
        )


def test_a_ranking_has_just_one_way_to_rank():
    assert refused(ranked(), "ranking") == (
        'format ranking reads one of the columns "scores", "ranks", "best"; this row has "prompt", "completions"; '
        "map one: format.fields.scores: <its column>"
    )
    assert refused(ranked(ratings=[1, 2]), "ranking").endswith("map one: format.fields.scores: ratings")
    assert refused(ranked(winner=1), "ranking").endswith("map one: format.fields.best: winner")
    both = ranked(scores=[1, 2], best=0)
    assert refused(both, "ranking") == (
        'format ranking reads one of the columns "scores", "ranks", "best"; this row has "scores", "best"; '
        "choose one: format.fields.scores: scores"
    )
    assert parse(both, "ranking", best="best").scores == (1, 0)
    assert refused(both, "ranking", fields={"ranks": "places"}) == (
        'format ranking needs the column "places"; this row has "prompt", "completions", "scores", "best"; '
        "format.fields.ranks must name a column that every row has"
    )
    with pytest.raises(ValidationError, match="format ranking reads one of scores, ranks, best; fields maps scores and best"):
        Format.model_validate({"kind": "ranking", "fields": {"scores": "a", "best": "b"}})


# graded


def test_a_graded_answer_is_a_ranking_of_one():
    assert parse(answer(score=-2), "graded") == Ranking((HI,), ((YES,),), (-2,), WHERE)
    assert parse(answer(stars=4.5, completion=plain(HI, YES)), "graded", score="stars") == Ranking((HI,), ((YES,),), (4.5,), WHERE)


def test_graded_answers_without_a_score_or_an_answer():
    assert unusable(answer(score=None), "graded") == "empty score"
    assert unusable(answer(completion="", score=1), "graded") == "empty completion"
    assert unusable(answer(completion=plain(HI), score=1), "graded") == "no assistant message to learn from"
    assert unusable(answer(completion=plain(asking("ho"), YES), score=1), "graded") == "completion begins with another prompt"
    for score, found in [(float("inf"), "inf (number)"), ("4", '"4" (text)'), (False, "false (true or false)")]:
        assert refused(answer(score=score), "graded") == f'column "score": expected a finite number, found {found}; {FIX}'


# steps


@pytest.mark.parametrize("column", ["steps", "completions"])
def test_steps_are_texts_with_a_label_each(column):
    value = {"prompt": "hi", column: ["a", "b", "c"], "labels": [True, 0.25, 0]}
    assert parse(value, "steps") == Steps((HI,), ("a", "b", "c"), (1, 0.25, 0), WHERE)
    value = {"prompt": plain(HI), "lines": ["a"], "ok": [False]}
    assert parse(value, "steps", **{column: "lines", "labels": "ok"}) == Steps((HI,), ("a",), (0,), WHERE)


def test_steps_without_text_are_dropped():
    def said(**more):
        return unusable({"prompt": "hi", "steps": ["a"], "labels": [1], **more}, "steps")

    assert (said(prompt=""), said(steps=[]), said(steps=None), said(labels=None)) == (
        "empty prompt",
        "empty steps",
        "empty steps",
        "empty labels",
    )
    assert said(steps=[" "]) == said(steps=[None]) == "empty step"


def test_steps_of_a_wrong_form_are_refused():
    def said(**more):
        return refused({"prompt": "hi", "steps": ["a", "b"], "labels": [1, 0], **more}, "steps")

    assert said(labels=[1]) == 'column "labels" has 1, but column "steps" has 2; correct the row: one for each'
    assert said(steps="a\nb") == f'column "steps": expected a list, found "a\\nb" (text); {FIX}'
    assert said(steps=["a", 3]) == f"steps[1]: expected text, found 3 (integer); {FIX}"
    for label, found in [(-1, "-1 (integer)"), (1.5, "1.5 (number)"), ("yes", '"yes" (text)'), (None, "null"), (float("nan"), "nan (number)")]:
        assert said(labels=[1, label]) == f"labels[1]: expected true, false or a number from 0 to 1, found {found}; {FIX}"


# columns


@pytest.mark.parametrize(
    ("kind", "value", "remedy"),
    [
        ("preference", {"prompt": "hi", "winner": "yes", "rejected": "no"}, "chosen: winner"),
        ("labelled", answer(sentiment="positive"), "label: sentiment"),
        ("labelled", answer(labels=1), "label: labels"),
        ("labelled", {"question": "hi", "completion": "yes", "label": 1}, "prompt: question"),
        ("graded", answer(rating=1), "score: rating"),
        ("ranking", {"prompt": "hi", "responses": ["a", "b"], "best": 1}, "completions: responses"),
        ("steps", {"prompt": "hi", "steps": ["a"], "correct": [1]}, "labels: correct"),
        ("steps", {"prompt": "hi", "lines": ["a"], "labels": [1]}, "steps: lines"),
    ],
)
def test_a_column_of_another_name_is_guessed(kind, value, remedy):
    assert refused(value, kind).endswith(f": format.fields.{remedy}")


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("chosen rejected", "preference"),
        ("prompt completion label", "labelled"),
        ("prompt completion score", "graded"),
        ("prompt completions scores", "ranking"),
        ("prompt completions ranks id", "ranking"),
        ("prompt completions best", "ranking"),
        ("prompt completions labels", "steps"),
        ("prompt steps labels", "steps"),
        ("prompt completion steps", "prompt_completion"),
        ("prompt completions", "problem"),
        ("prompt answer steps", "problem"),
        ("prompt answer label score", "problem"),
        ("text label", "text"),
    ],
)
def test_the_format_of_a_comparison_is_found_from_the_columns(columns, kind):
    assert detect(Raw(dict.fromkeys(columns.split(), "x"), WHERE)).kind == kind


def test_comparisons_are_read_from_a_file_and_what_is_dropped_is_counted():
    name = write(ranked(scores=[1, 2]), ranked(scores=[2, 2]), ranked(scores=[3, 3]), json.dumps(ranked(scores=[5, 4])))
    loaded = read(name)
    assert (loaded.formats, loaded.usable, [row.scores for row in loaded.rows[0]]) == (["ranking"], 2, [(1, 2), (5, 4)])
    assert {reason: (each.count, each.first) for reason, each in loaded.dropped.items()} == {
        "all completions are ranked the same": (2, "train.jsonl:2")
    }


NUMBERS = st.integers() | st.floats() | st.booleans()
NAMES = ["prompt", "completion", "completions", "chosen", "rejected", "prefer", "margin", "label", "score", "scores", "ranks", "best", "steps", "labels"]


@given(
    kind=st.sampled_from(["preference", "labelled", "ranking", "graded", "steps"]),
    drawn=st.lists(ANY | NUMBERS | st.lists(ANY | NUMBERS, min_size=2, max_size=3) | st.text(min_size=1), min_size=14, max_size=14),
    absent=st.sets(st.sampled_from(NAMES), max_size=4),
)
@settings(max_examples=500, deadline=None)
def test_any_values_in_the_columns_of_a_comparison_give_a_row_a_reason_or_a_message(kind, drawn, absent):
    value = {name: each for name, each in zip(NAMES, drawn, strict=True) if name not in absent}
    try:
        said = Format.model_validate(kind).parse(Raw(value, WHERE)).where + ": "
    except Unusable as reason:
        said = f"{WHERE}: {reason}"
    except DataError as error:
        said = str(error)
    assert re.match(r"f\.jsonl:3: ", said)
