"""Every format of preference data is read into the same judgement, and what is none is refused with its row."""

from __future__ import annotations

import json
import math

import pyarrow
import pyarrow.parquet
import pytest

from oarsmith.data.judged import pointwise, with_mismatched
from oarsmith.data.preferences import is_preference, read_judged
from oarsmith.data.records import Record, read_records
from oarsmith.errors import DataError

QUESTION, GOOD, BAD = "What color is the sky?", "It is blue.", "It is green."
USER = {"role": "user", "content": QUESTION}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def said(text):
    return {"role": "assistant", "content": text}


def read(**row):
    return read_judged(Record(row, "rows.jsonl:7"))


def refused(match, **row):
    with pytest.raises(DataError, match=match) as caught:
        read(**row)
    assert caught.value.where == "rows.jsonl:7"


PAIRS = {
    "paddlenlp": {"src": [QUESTION], "tgt": [], "response": [BAD, GOOD], "sort": [0, 1]},
    "paddlenlp text": {"src": QUESTION, "tgt": "", "response": [GOOD, BAD], "sort": [3, -2]},
    "trl plain": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "trl": {"prompt": [USER], "chosen": [said(GOOD)], "rejected": [said(BAD)]},
    "trl, one message": {"prompt": [USER], "chosen": said(GOOD), "rejected": said(BAD)},
    "trl implicit": {"chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "ultrafeedback": {
        "prompt": QUESTION,
        "prompt_id": "1",
        "chosen": [USER, said(GOOD)],
        "rejected": [USER, said(BAD)],
        "messages": [USER, said(GOOD)],
        "score_chosen": 8.0,
        "score_rejected": 4.0,
    },
    "prompt told twice": {"prompt": [USER], "chosen": [USER, said(GOOD)], "rejected": [USER, said(BAD)]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "sharegpt as json": {
        "conversations": [{"from": "human", "value": QUESTION}],
        "chosen": json.dumps({"from": "gpt", "value": GOOD}),
        "rejected": json.dumps([{"from": "gpt", "value": BAD}]),
    },
    "hh": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
    "safe-rlhf": {"prompt": QUESTION, "response_0": BAD, "response_1": GOOD, "better_response_id": 1},
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_pair_in_every_format(name):
    # Parquet and datasets give every row the union of all fields.
    judged = read(**PAIRS[name], margin=None, label=None)
    assert judged.kind == "pair" and judged.where == "rows.jsonl:7" and is_preference(PAIRS[name])
    assert judged.prompt.messages == (USER,) and judged.prompt.tools is None
    assert [answer.messages for answer in judged.answers] == [(said(GOOD),), (said(BAD),)]
    assert [answer.label for answer in judged.answers] == [1.0, 0.0]


def test_history_system_and_tools_come_along():
    tool = {"type": "function", "function": {"name": "look_up"}}
    call = {"function": {"name": "look_up", "arguments": "{}"}}
    rows = [
        {
            "src": ["Hi", QUESTION],
            "tgt": ["Hello!"],
            "context": {"system": "Be brief."},
            "response": [GOOD, BAD],
            "sort": [1, 0],
        },
        {"prompt": [SYSTEM, *EARLIER, USER], "chosen": GOOD, "rejected": [said(BAD)]},
        {"chosen": [SYSTEM, *EARLIER, USER, said(GOOD)], "rejected": [SYSTEM, *EARLIER, USER, said(BAD)]},
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello!"},
                {"from": "human", "value": QUESTION},
            ],
            "chosen": {"from": "gpt", "value": GOOD},
            "rejected": {"from": "gpt", "value": BAD},
        },
    ]
    for row in rows:
        judged = read(**row, tools=json.dumps([tool]))
        assert judged.prompt.messages == (SYSTEM, *EARLIER, USER)
        assert judged.prompt.tools == (tool,) and judged.prompt.document is None
    result = {"role": "tool", "content": "grey"}
    judged = read(
        prompt=[USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result],
        chosen=[{**said("Again."), "tool_calls": [call]}, result, said(GOOD)],
        rejected=[said(BAD)],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert judged.prompt.context == {"enable_thinking": False}
    ids = [
        m["tool_calls"][0]["id"] for m in (*judged.prompt.messages, *judged.answers[0].messages) if "tool_calls" in m
    ]
    assert ids == ["call00000", "call00001"], "calls are counted through prompt and answer"
    assert [message["role"] for message in judged.answers[0].messages] == ["assistant", "tool", "assistant"]


def test_dialogues_keep_their_text_for_models_without_a_template():
    begin = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Color of\n\nthe sky?\n\nAssistant:"
    judged = read(chosen=begin + " blue", rejected=begin + " green\n\nSorry.")
    assert judged.prompt.document == begin and judged.answers[1].text == " green\n\nSorry."
    assert judged.prompt.messages == (*EARLIER, {"role": "user", "content": "Color of\n\nthe sky?"})
    refused("differ before the last answer", chosen=begin + " x", rejected=begin.replace("Hello", "Ho") + " y")
    refused("does not end with an answer", chosen=begin + " x", rejected=begin + " y\n\nHuman: what?")
    refused(r"field 'rejected' is empty", chosen=begin + " x", rejected=begin + " ")


def test_a_prompt_that_two_texts_begin_with():
    judged = read(chosen="The sky is blue.", rejected="The sky is green.")
    assert judged.prompt.document == "The sky is" and not judged.prompt.messages
    assert [answer.text for answer in judged.answers] == [" blue.", " green."]
    # TRL cuts within the word here.
    assert read(chosen="It is gray.", rejected="It is green.").answers[1].text == " green."
    refused("do not begin with the same words", chosen="Blue.", rejected="Green.")
    refused("do not begin with the same words", chosen="Blue.", rejected="Blue.")


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"src": [QUESTION], "tgt": [], "response": [GOOD], "sort": [1]}, 1.0),
        ({"src": QUESTION, "response": [GOOD], "sort": [0]}, 0.0),
        ({"prompt": QUESTION, "completion": GOOD, "label": True}, 1.0),
        ({"prompt": [USER], "completion": [said(GOOD)], "label": False}, 0.0),
        ({"prompt": QUESTION, "completion": GOOD, "label": "false"}, 0.0),
        ({"messages": [USER, said(GOOD)], "label": True}, 1.0),
        (
            {
                "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": GOOD}],
                "kto_tag": False,
            },
            0.0,
        ),
    ],
)
def test_single_answers(row, label):
    judged = read(**row)
    assert judged.kind == "point" and judged.prompt.messages == (USER,)
    assert judged.answers[0].messages == (said(GOOD),) and judged.answers[0].label == label


@pytest.mark.parametrize(
    "row",
    [
        {"src": [QUESTION], "tgt": [], "responses": ["Look up.", "It is red."], "labels": ["+", "-"]},
        {"src": QUESTION, "responses": ["Look up.", "It is red."], "labels": [1, 0]},
        {"prompt": QUESTION, "completions": ["Look up.", "It is red."], "labels": [True, False]},
    ],
)
def test_judged_steps(row):
    judged = read(**row)
    assert judged.kind == "steps" and judged.prompt.messages == (USER,)
    assert judged.answers[0].steps == (("Look up.", 1.0), ("It is red.", 0.0))
    assert math.isnan(judged.answers[0].label)


def test_margins():
    assert read(**PAIRS["trl"], margin=1.5).margin == 1.5
    assert read(**PAIRS["ultrafeedback"]).margin == 0.0, "scores are no margins"
    refused("field 'margin' is the string", **PAIRS["trl"], margin="2")


def test_what_is_no_judgement():
    paddle = PAIRS["paddlenlp"]
    refused(r"both answers have the score 2 in 'sort'", **{**paddle, "sort": [2, 2.0]})
    refused(r"field 'response\[1\]' is empty", **{**paddle, "response": [GOOD, " "]})
    refused(r"field 'src' is empty", **{**paddle, "src": [""]})
    refused(r"'src' has 1 turns and 'tgt' 1 answers", **{**paddle, "tgt": ["x"]})
    refused(r"3 answers and 'sort' 2 scores", **{**paddle, "response": [GOOD, BAD, BAD]})
    refused(r"field 'sort\[0\]' is true", **{**paddle, "sort": [True, False]})
    refused(r"field 'sort\[0\]' is the number 2", src=QUESTION, response=[GOOD], sort=[2])
    refused("field 'chosen' is empty", **{**PAIRS["trl plain"], "chosen": ""})
    refused("the answer in 'rejected' is empty", **{**PAIRS["trl"], "rejected": [said(" ")]})
    asked = {"role": "user", "content": "And the sea?"}
    refused("after the prompt, 'chosen' has user", prompt=[USER], chosen=[asked], rejected=[said(BAD)])
    refused(
        "after the prompt, 'chosen' has assistant and user", prompt=[USER], chosen=[said(GOOD), asked], rejected=BAD
    )
    refused("the prompt ends with", chosen=[USER, said(BAD), USER, said(GOOD)], rejected=[USER, said(BAD)])
    refused("'chosen' has nothing", prompt=[USER], chosen=[USER], rejected=[USER, said(BAD)])
    refused("the prompt ends with an assistant", prompt=[USER, said("Hm")], chosen=[said(GOOD)], rejected=[said(BAD)])
    refused("there is no prompt", chosen=[said(GOOD)], rejected=[said(BAD)])
    refused("gives a message a loss weight", prompt=[USER], chosen=[{**said(GOOD), "weight": 0}], rejected=[said(BAD)])
    refused(r"field 'chosen\[1\].role' is the string 'oracle'", prompt=[USER], chosen={"role": "oracle"}, rejected=BAD)
    refused("better_response_id' is the number 2", **{**PAIRS["safe-rlhf"], "better_response_id": 2})
    refused("2 steps and 'labels' 1 labels", src=QUESTION, responses=["a", "b"], labels=[1])
    refused(r"field 'labels\[0\]' is the string 'maybe'", src=QUESTION, responses=["a"], labels=["maybe"])
    refused("field 'chat_template_kwargs' sets tools", **PAIRS["trl"], chat_template_kwargs={"tools": []})
    refused("fit no known format of preference data", src=QUESTION, tgt=GOOD)
    assert not is_preference({"src": QUESTION, "tgt": GOOD, "response": None})


def test_every_container(tmp_path):
    rows = [{**PAIRS["paddlenlp"], "context": {"system": "Be brief."}}, PAIRS["paddlenlp"]]
    wanted = [read_judged(Record(row, "")).prompt.messages for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.jsonl", "a.json", "a.parquet", "set"):
        assert [read_judged(record).prompt.messages for record in read_records(tmp_path / name)] == wanted, name
    cells = [QUESTION, json.dumps([BAD, GOOD]), "[0, 1]"]
    quoted = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    (tmp_path / "a.csv").write_text(f"src,response,sort\n{quoted}\n")
    (record,) = read_records(tmp_path / "a.csv")
    assert read_judged(record).answers[0].messages == (said(GOOD),)


def test_pairs_as_two_rows():
    judged = read(**PAIRS["trl"])
    good, bad = pointwise(judged)
    assert (good.kind, bad.kind) == ("point", "point") and good.prompt is judged.prompt and bad.where == judged.where
    assert (good.answers, bad.answers) == (judged.answers[:1], judged.answers[1:])


def test_mismatched_answers_are_another_prompts():
    rows = [
        read_judged(Record({"prompt": f"q{n // 2}", "completion": f"a{n}", "label": n % 2 == 0}, f"rows:{n}"))
        for n in range(8)
    ]
    paired = with_mismatched(rows)
    others = [row.answers[1].text for row in paired]
    # Row -i; rows 0 and 4, and what has the same prompt there (q0: rows 0 and 1), go on to the next other prompt.
    assert others == ["a2", "a7", "a6", "a5", "a6", "a3", "a2", "a1"]
    for row, new in zip(rows, paired, strict=True):
        assert new.answers[0] == row.answers[0] and math.isnan(new.answers[1].label)
    assert [row.answers[1].text for row in with_mismatched(rows)] == others
    with pytest.raises(DataError, match="all rows have the same"):
        with_mismatched(rows[:2])
    lonely = [*rows[:2] * 20, rows[5]]
    assert [row.answers[1].text for row in with_mismatched(lonely)][:40] == ["a5"] * 40


@pytest.mark.slow
def test_prompts_and_rows_are_trls():
    trl = pytest.importorskip("trl.data_utils")
    datasets = pytest.importorskip("datasets")
    for name in ("trl implicit", "trl"):
        theirs = trl.maybe_extract_prompt(dict(PAIRS[name]))
        ours = read(**PAIRS[name])
        assert list(ours.prompt.messages) == theirs["prompt"]
        assert [list(answer.messages) for answer in ours.answers] == [theirs["chosen"], theirs["rejected"]]
    plain = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    theirs, ours = trl.extract_prompt(plain), read(**plain)
    assert ours.prompt.document == theirs["prompt"]
    assert [answer.text for answer in ours.answers] == [theirs["chosen"], theirs["rejected"]]
    rows = [PAIRS["trl plain"], {"prompt": "q", "chosen": "c", "rejected": "r"}]
    theirs = trl.unpair_preference_dataset(datasets.Dataset.from_list(rows)).to_list()
    ours = [row for pair in rows for row in pointwise(read(**pair))]
    assert sorted((row["prompt"], row["completion"], row["label"]) for row in theirs) == sorted(
        (row.prompt.document, row.answers[0].text, bool(row.answers[0].label)) for row in ours
    )
