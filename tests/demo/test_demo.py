"""The shipped demo data: its shape, that nothing held out is trained on, and that the scorer can say both things."""

import difflib
import json
import re

import pytest

from oarsmith import demo


def _rows() -> list[dict[str, str | list[str]]]:
    return [json.loads(line) for line in demo.train_path().read_text(encoding="utf-8").splitlines()]


def _train_rows() -> list[dict[str, str | list[str]]]:
    return [row for row in _rows() if "text" not in row]


def test_replayed_text_is_plain_documents() -> None:
    replayed = [row for row in _rows() if "text" in row]
    assert 10 <= len(replayed) <= 20
    assert all(set(row) == {"text"} and len(row["text"]) > 200 for row in replayed)


def _turns(row: dict[str, str | list[str]]) -> list[tuple[str, str]]:
    src, tgt = row["src"], row["tgt"]
    if isinstance(src, str):
        assert isinstance(tgt, str)
        return [(src, tgt)]
    assert isinstance(tgt, list)
    return list(zip(src, tgt, strict=True))


def _all_turns() -> list[tuple[str, str]]:
    return [turn for row in _train_rows() for turn in _turns(row)]


def test_train_rows_have_the_promised_number_and_shape() -> None:
    rows = _train_rows()
    assert 100 <= len(rows) <= 200
    assert sum(isinstance(row["src"], list) for row in rows) >= 10
    for row in rows:
        assert set(row) == {"src", "tgt"}
        for text in (text for turn in _turns(row) for text in turn):
            assert text == text.strip() != ""


def test_no_question_is_trained_twice() -> None:
    questions = [question for question, _ in _all_turns()]
    assert len(set(questions)) == len(questions)


def test_heldout_questions_are_worded_unlike_any_training_question() -> None:
    heldout = [item.question.lower() for item in demo.load_heldout()]
    assert len(heldout) >= 12
    assert len(set(heldout)) == len(heldout)
    trained = [question.lower() for question, _ in _all_turns()]
    for question in heldout:
        nearest = max(trained, key=lambda other: difflib.SequenceMatcher(None, question, other).ratio())
        ratio = difflib.SequenceMatcher(None, question, nearest).ratio()
        assert ratio <= 0.85, f"{question!r} is nearly the training question {nearest!r} ({ratio:.2f})"


def test_every_heldout_fact_is_taught_in_several_wordings() -> None:
    answers = [answer for _, answer in _all_turns()]
    for item in demo.load_heldout():
        right = [answer for answer in answers if demo.is_right(answer, item)]
        assert len(right) >= 6, f"{item.question!r}: only {len(right)} training answers would be right"


def test_general_rows_keep_a_fair_share() -> None:
    own = re.compile(
        r"skiff|oarsmith|boathouse|larkspur|own machine|smollm|apache|calm|river at dawn|lifebuoy"
        r"|marigold|dark green|tomas|twelve pounds",
        re.IGNORECASE,
    )
    rows = _train_rows()
    general = [row for row in rows if not any(own.search(answer) for _, answer in _turns(row))]
    assert 0.4 <= len(general) / len(rows) <= 0.6


def test_scorer_says_right_and_wrong() -> None:
    item = demo.HeldOut("When?", must=(("seven", "7"), ("morning",)), must_not=("ten",))
    assert demo.is_right("At SEVEN in the morning, as often.", item)
    assert demo.is_right("Every morning at 7.", item)
    assert not demo.is_right("At seventeen in the morning.", item)
    assert not demo.is_right("At seven in the evening.", item)
    assert not demo.is_right("In the morning at seven or ten.", item)
    assert not demo.is_right("", item)


def test_score_of_all_wrong_and_all_right_answers() -> None:
    items = demo.load_heldout()
    right = [next(answer for _, answer in _all_turns() if demo.is_right(answer, item)) for item in items]
    assert demo.score(right) == 1.0
    assert demo.score(["I am an AI language model."] * len(items)) == 0.0
    assert demo.score([right[0], *["?"] * (len(items) - 1)]) == pytest.approx(1 / len(items))


def test_score_refuses_a_wrong_number_of_answers() -> None:
    with pytest.raises(ValueError, match="1 answers for"):
        demo.score(["Skiff"])


def test_unrelated_text_shares_no_subject_with_the_training_rows() -> None:
    text = demo.unrelated_text()
    assert 6_000 <= len(text.encode()) <= 10_000
    lowered = text.lower()
    for word in ("skiff", "oarsmith", "larkspur", "boathouse", "marigold", "tomas", "rowing"):
        assert word not in lowered
