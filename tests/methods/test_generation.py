"""Evaluation by generation: which questions are asked, with which tokens, and what is kept."""

import json

import pytest

import oarsmith
from oarsmith.data.conversations import to_conversation
from oarsmith.data.records import Record
from oarsmith.data.samples import SampleOptions, encode_conversation
from oarsmith.engine import Sampling
from oarsmith.errors import DataError
from oarsmith.methods.generation import Question, _encode, generate_and_score, read_questions
from oarsmith.text.choose import with_named_template
from tiny import TOKENIZER, read_lines, tiny_decoder


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROWS = [
    {"src": ["Hi", "And now?"], "tgt": ["Hello", "Bye"], "context": {"system": "Be short."}},
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    },
    {"text": "only a document"},
    {"messages": [{"role": "assistant", "content": "nobody asked"}]},
]


def test_questions(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS)
    found = read_questions(source)
    assert [question.reference for question in found] == ["Bye", "3", "b"]
    assert [len(question.messages) for question in found] == [4, 1, 1]
    assert found[0].messages[0] == {"role": "system", "content": "Be short."}
    assert found[1].messages[0]["content"] == "Add\n1 2"
    assert found[2].where.endswith(":3")
    assert [q.reference for q in read_questions(source, only={f"{source}:2"})] == ["3"]


def test_no_question(tmp_path):
    with pytest.raises(DataError, match="no row has a question"):
        read_questions(write(tmp_path / "rows.jsonl", ROWS[3:]))


@pytest.mark.parametrize("template", ["chatml", "none"])
def test_prompts_are_those_of_training(template):
    """The prompt's tokens are the ones that training puts before the answer."""
    tokenizer = with_named_template(oarsmith.load_tokenizer(TOKENIZER), template)
    row = {"src": "What is 1 plus 2?", "tgt": "It is 3."}
    (sample,) = encode_conversation(to_conversation(Record(row, "x:1")), tokenizer, SampleOptions()).samples
    first = int(sample.weights.nonzero()[0][0])
    question = Question(({"role": "user", "content": row["src"]},), row["tgt"], "x:1")
    assert _encode(question, tokenizer) == sample.ids[:first].tolist()


def test_answers_are_scored_and_kept(chain_model, tmp_path):
    model = oarsmith.load_model(chain_model("It is 3.")).train()
    tokenizer = with_named_template(oarsmith.load_tokenizer(TOKENIZER), "chatml")
    asked = [
        Question(({"role": "user", "content": f"question {n}"},), reference, f"rows:{n}")
        for n, reference in enumerate(["It is 3.", "It is 4."])
    ]
    output = tmp_path / "generated_output.json"
    scores = generate_and_score(model, tokenizer, asked, Sampling(max_new_tokens=10), output_file=output)
    assert read_lines(output) == [{"output": "It is 3.", "tgt": "It is 3."}, {"output": "It is 3.", "tgt": "It is 4."}]
    assert scores.rouge1 == pytest.approx((1 + 2 / 3) / 2)
    assert scores.count == 2
    assert model.training, "the mode is restored"


def test_a_prompt_without_room_gets_no_answer():
    model = tiny_decoder()
    tokenizer = with_named_template(oarsmith.load_tokenizer(TOKENIZER), "chatml")
    asked = [Question(({"role": "user", "content": "word " * 400},), "an answer", "rows:1")]
    scores = generate_and_score(model, tokenizer, asked, Sampling(max_new_tokens=2))
    assert scores.rouge1 == 0
