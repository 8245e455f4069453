"""Beginnings of film reviews and how they go on, with what their author thought of the film: the controlled-sentiment experiment.

`python recipes/rlhf_sentiment_data.py SENTIMENT_TRAIN SENTIMENT_TEST REVIEWS OUT_FOLDER` reads rows of `id`, `text` and `label`:
sentences (sentence polarity v1.0) and reviews (polarity v2.0), both by Bo Pang and Lillian Lee. The sentences teach a reward what
is positive, those of the reviews teach a policy to write. The first 1,500 reviews are to learn from, the others to test with; a
test sentence that begins like one to learn from is left out. Running it again gives the same bytes.
"""

import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from posttrain.draws import key

Row = dict[str, Any]
TRAIN_REVIEWS = 1_500
PER_REVIEW = 4  # sentences of a review, so that the files stay small
SENTENCE_BEGINNING, REVIEW_BEGINNING = 3, 4  # words
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "jr", "sr", "vs", "etc", "prof", "gen", "capt", "lt", "sgt", "no"}
ORDINARY = re.compile(r"""[a-z0-9][a-z0-9 ,.!?'"():;&$%/-]*[.!?]""")


def read(path: str) -> list[Row]:
    data = Path(path).read_bytes()
    text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def save(path: Path, rows: list[Row]) -> None:
    with path.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def split(name: str, words: list[str], beginning: int, label: str) -> Row:
    """A sentence as a prompt of its first words and a completion of the rest."""
    asked, said = " ".join(words[:beginning]), " ".join(words[beginning:])
    prompt, completion = [{"role": "user", "content": asked}], [{"role": "assistant", "content": said}]
    return {"id": name, "prompt": prompt, "completion": completion, "label": label}


def plain(text: str) -> str:
    """Letters and digits alone, as the two corpora set spaces differently."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def sentences(text: str) -> Iterator[str]:
    """The text cut after full stops, exclamation and question marks that end no abbreviation or initial."""
    words: list[str] = []
    for word in text.split():
        words.append(word)
        stem = word.rstrip(".!?")
        if stem != word and stem not in ABBREVIATIONS and not re.fullmatch(r"(\w\.)*[a-z]", stem):
            yield " ".join(words)
            words = []
    yield " ".join(words)


def is_whole(sentence: str) -> bool:
    """Whether a sentence has 8 to 40 words, ordinary characters alone, and closes what it opens."""
    quotes_pair = sentence.count('"') % 2 == 0 and sentence.count("(") == sentence.count(")")
    return 8 <= len(sentence.split()) <= 40 and quotes_pair and ORDINARY.fullmatch(sentence) is not None


def review_rows(reviews: list[Row], seen: set[str]) -> Iterator[Row]:
    """Some sentences of each review in their order; none that was `seen`, and none twice."""
    for review in reviews:
        found = []
        for index, sentence in enumerate(sentences(review["text"])):
            if is_whole(sentence) and plain(sentence) not in seen:
                seen.add(plain(sentence))
                found.append(split(f"{review['id']}-{index}", sentence.split(), REVIEW_BEGINNING, review["label"]))
        kept = {row["id"] for row in sorted(found, key=lambda row: key(0, "review sentences", row["id"]))[:PER_REVIEW]}
        yield from (row for row in found if row["id"] in kept)


def main(sentiment_train: str, sentiment_test: str, reviews: str, folder: str) -> None:
    parts = {"train": read(sentiment_train), "test": read(sentiment_test)}
    seen = {plain(row["text"]) for rows in parts.values() for row in rows}
    for part, rows in parts.items():
        long = [(row, words) for row in rows if len(words := row["text"].split()) >= 8]
        made = [split(row["id"], words, SENTENCE_BEGINNING, row["label"]) for row, words in long]
        save(Path(folder) / f"sentiment_{part}.jsonl.gz", made)
    all_reviews = read(reviews)
    train = list(review_rows(all_reviews[:TRAIN_REVIEWS], seen))
    known = {row["prompt"][0]["content"] for row in train}
    test = [row for row in review_rows(all_reviews[TRAIN_REVIEWS:], seen) if row["prompt"][0]["content"] not in known]
    save(Path(folder) / "reviews_train.jsonl.gz", train)
    save(Path(folder) / "reviews_test.jsonl.gz", test)


if __name__ == "__main__":
    main(*sys.argv[1:])
