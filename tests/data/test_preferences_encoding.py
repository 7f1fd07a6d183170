"""Judged answers as ids: what inference is given comes first, every token said is predicted, every cut is counted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import oarsmith
import remote_tokenizers
from oarsmith.data.answer_samples import AnswerEncoder, AnswerOptions
from oarsmith.data.answer_sets import build_answers
from oarsmith.data.answers import make_answer_batch, with_references
from oarsmith.data.loader import Loader
from oarsmith.data.preferences import read_judged
from oarsmith.data.records import Record
from oarsmith.errors import ConfigError, DataError

TEMPLATES = ["qwen2_5", "qwen3", "llama3_1", "ax_mistral_v3_tekken", "gemma", "phi3", "cohere2"]


def encode(tokenizer, options=None, **row):
    return AnswerEncoder(tokenizer, options or AnswerOptions(kind=None)).encode(read_judged(Record(row, "rows:1")))


def texts(row, tokenizer):
    return [tokenizer.decode(ids.tolist()) for ids in (row.prompt, *row.answers)]


def pair(src, good, bad, **more):
    return {"src": src, "response": [good, bad], "sort": [1, 0], **more}


def words(num, name="w"):
    return " ".join(f"{name}{n}" for n in range(num))


def test_prompt_is_what_generation_is_given_and_answers_end_their_turn(template_tokenizer):
    tokenizer = template_tokenizer("qwen2_5")
    row = encode(tokenizer, **pair(["Hi", "Why?"], "So.", "No!", tgt=["Yo"], context={"system": "Be brief."})).row
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Why?"},
    ]
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert row.prompt.tolist() == tokenizer.encode(given, add_special_tokens=False)
    assert texts(row, tokenizer)[1:] == ["So.<|im_end|>", "No!<|im_end|>"]
    assert row.labels == (1.0, 0.0) and row.spoken == () and row.where == "rows:1"


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_gives_both_answers_the_same_prompt(template_tokenizer, name):
    tokenizer = template_tokenizer(name)
    encoded = encode(tokenizer, **pair("Why?", "So it is.", " leading\nand more "))
    assert encoded.dropped is None
    given = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)
    assert encoded.row.prompt.tolist() == tokenizer.encode(given, add_special_tokens=False)
    assert all(ids[-1] in tokenizer.stop_ids for ids in encoded.row.answers)


def test_a_base_model_gets_the_text_and_eos(plain_tokenizer):
    row = encode(plain_tokenizer, prompt="The sky is", chosen=" blue", rejected=" green").row
    assert texts(row, plain_tokenizer) == ["The sky is", " blue</s>", " green</s>"]
    begin = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Why?\n\nAssistant:"
    row = encode(plain_tokenizer, chosen=begin + " So.", rejected=begin + " No.").row
    assert texts(row, plain_tokenizer) == [begin, " So.</s>", " No.</s>"]
    refused = encode(plain_tokenizer, prompt="q", chosen="a", rejected="b", tools=[{"name": "look_up"}])
    assert refused.row is None and "no chat template" in refused.dropped.reason


def test_a_chat_model_gets_plain_questions_and_dialogues_through_its_template(tokenizer):
    row = encode(tokenizer, prompt="Why?", chosen="So.", rejected="No.").row
    assert texts(row, tokenizer)[0].endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    begin = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Why?\n\nAssistant:"
    row = encode(tokenizer, chosen=begin + " So.", rejected=begin + " No.").row
    assert "<|im_start|>assistant\nYo<|im_end|>" in texts(row, tokenizer)[0] and "Human" not in texts(row, tokenizer)[0]
    assert texts(row, tokenizer)[1:] == ["So.<|im_end|>", "No.<|im_end|>"]


def test_what_was_rendered_already_is_not_rendered_again(tokenizer):
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    encoded = encode(tokenizer, prompt=prompt, chosen="So.", rejected="No.<|im_end|>\n")
    assert texts(encoded.row, tokenizer) == [prompt, "So.<|im_end|>", "No.<|im_end|>"]
    assert encoded.notes["prompts that begin with a control token taken as they are, without the chat template"] == 1


def test_tokens_that_merge_over_the_border(plain_tokenizer):
    merged = 0
    for prompt, answers in (("The sk", ("y is", "in")), ("It is th", ("e sea.", "at")), ("no", ("ne", "t"))):
        row = encode(plain_tokenizer, prompt=prompt, chosen=answers[0], rejected=answers[1]).row
        assert row.prompt.tolist() == plain_tokenizer.encode(prompt), "inference starts from no other ids"
        for answer, ids in zip(answers, row.answers, strict=True):
            found = [*row.prompt.tolist(), *ids[:-1].tolist()]
            assert plain_tokenizer.decode(found) == prompt + answer
            merged += found != plain_tokenizer.encode(prompt + answer)
    assert merged > 0, "no pair of this test merges"


def test_tokens_between_an_assistants_messages_are_not_predicted(tokenizer):
    call = {"function": {"name": "look_up", "arguments": {"of": "sky"}}}
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "It is grey today."},
        {"role": "assistant", "content": "Grey."},
    ]
    row = encode(
        tokenizer, prompt=[{"role": "user", "content": "Sky?"}], chosen=said, rejected="Blue.", tools=[tool]
    ).row
    spoken = tokenizer.decode(row.answers[0][row.spoken[0]].tolist())
    assert "look_up" in spoken and spoken.endswith("Grey.<|im_end|>") and "today" not in spoken
    assert "It is grey today." in texts(row, tokenizer)[1] and row.spoken[1].all()
    assert "look_up" in texts(row, tokenizer)[0], "tools are offered"


def test_thinking_templates_take_their_variables(template_tokenizer):
    tokenizer = template_tokenizer("qwen3")
    prompt = [{"role": "user", "content": "Why?"}]
    row = encode(
        tokenizer, prompt=prompt, chosen="a", rejected="b", chat_template_kwargs={"enable_thinking": False}
    ).row
    assert texts(row, tokenizer)[0].endswith("<think>\n\n</think>\n\n")


def test_models_whose_prompt_has_unspellable_tokens(tmp_path):
    glm = oarsmith.load_tokenizer(remote_tokenizers.directory("glm1", tmp_path))
    row = encode(glm, **pair(["Hi", "Why?"], "So", "No", tgt=["Yo"])).row
    assert row.prompt[-1] == glm.token_to_id("<sop>") and row.answers[0][-1] == glm.token_to_id("<eop>")
    steps = encode(glm, src="Hi", responses=["yo"], labels=[1]).row
    assert steps.prompt.tolist() == encode(glm, **pair("Hi", "So", "No")).row.prompt.tolist()


def test_steps_are_judged_at_the_separator(tokenizer, plain_tokenizer):
    given = {"prompt": "2+3?", "completions": ["First.\n", "It is 5."], "labels": [True, False]}
    for found in (tokenizer, plain_tokenizer):
        row = encode(found, **given).row
        assert found.decode(row.answers[0].tolist()) == "First.\nIt is 5.\n"
        assert np.isnan(row.labels).all()
        assert [found.decode(row.answers[0][: end + 1].tolist()) for end in row.step_ends] == [
            "First.\n",
            "First.\nIt is 5.\n",
        ]
        assert row.step_labels == (1.0, 0.0)
        (separator,) = found.encode("\n", add_special_tokens=False)
        assert row.answers[0][list(row.step_ends)].tolist() == [separator] * 2
    other = encode(tokenizer, AnswerOptions(kind=None, step_separator="ки"), **given).row
    assert tokenizer.decode(other.answers[0].tolist()) == "First.\nкиIt is 5.ки"


def test_whole_turns_go_first(tokenizer):
    row = pair(["one " * 40, "two " * 10, "Why?"], "So.", "No.", tgt=["a", "b"], context={"system": "Be brief."})
    whole = encode(tokenizer, **row).row
    options = AnswerOptions(kind=None, max_length=len(whole) - 1)
    encoded = encode(tokenizer, options, **row)
    assert encoded.notes == {"oldest turns dropped": 1}
    text = texts(encoded.row, tokenizer)
    assert "Be brief." in text[0] and "one" not in text[0] and "two two" in text[0]
    assert text[1:] == texts(whole, tokenizer)[1:]


def test_then_the_question_loses_its_beginning(tokenizer):
    row = pair(["old", "begin " + words(60) + " end"], "So.", "No.", tgt=["a"])
    options = AnswerOptions(kind=None, max_length=150, max_prompt_len=100)
    encoded = encode(tokenizer, options, **row)
    assert encoded.notes == {"oldest turns dropped": 1, "question cut at its beginning": 1}
    text = texts(encoded.row, tokenizer)
    assert 80 < len(encoded.row.prompt) <= 100 and "begin" not in text[0]
    assert text[0].startswith("<|im_start|>system") and text[0].endswith(" end<|im_end|>\n<|im_start|>assistant\n")
    # Nothing is cut from a long prompt that fits.
    assert not encode(tokenizer, replace(options, max_length=1000), **row).notes


def test_a_template_too_long_by_itself_gives_way(tokenizer):
    options = AnswerOptions(kind=None, max_length=60, max_prompt_len=12)
    row = pair("Why " * 30, "So.", "No.", context={"system": words(30)})
    encoded = encode(tokenizer, options, **row)
    assert encoded.notes == {"prompt cut at its beginning, template and all": 1}
    assert len(encoded.row.prompt) == 12 and texts(encoded.row, tokenizer)[0].endswith("<|im_start|>assistant\n")


def test_at_last_both_answers_in_proportion(tokenizer):
    row = pair("Why?", words(60, "a"), words(20, "b"))
    whole = encode(tokenizer, **row).row
    options = AnswerOptions(kind=None, max_length=len(whole) - 40)
    encoded = encode(tokenizer, options, **row)
    long, short = (len(ids) for ids in encoded.row.answers)
    assert encoded.notes == {"answers cut at their end": 2} and len(encoded.row) == options.max_length
    assert long == len(whole.answers[0]) * (long + short) // sum(map(len, whole.answers))
    for cut, ids in zip(encoded.row.answers, whole.answers, strict=True):
        assert cut.tolist() == ids[: len(cut)].tolist(), "no end of turn where there is none"
    assert encoded.row.prompt.tolist() == whole.prompt.tolist()


def test_models_that_need_copies_count_them(tokenizer):
    row = pair("Why " * 20, words(90, "a"), words(90, "b"))
    whole = encode(tokenizer, **row).row
    limit = whole.size(share=False)
    kept = encode(tokenizer, AnswerOptions(kind=None, share=False, max_length=limit), **row)
    assert not kept.notes
    cut = encode(tokenizer, AnswerOptions(kind=None, share=False, max_length=limit - 1), **row)
    assert cut.notes["answers cut at their end"] and cut.row.size(share=False) == limit - 1
    few = encode(tokenizer, AnswerOptions(kind=None, share=False, max_length=100, max_prompt_len=90), **row)
    assert len(few.row.prompt) <= 25 and few.row.size(share=False) <= 100


def test_what_is_alike_is_left_out(tokenizer):
    same = encode(tokenizer, **pair("Why?", "So.", "So."))
    assert same.row is None and same.dropped.reason == "the answers are the same"
    alike = pair("Why?", words(30) + " yes", words(30) + " no")
    limit = len(encode(tokenizer, **alike).row) - 20
    cut = encode(tokenizer, AnswerOptions(kind=None, max_length=limit), **alike)
    assert cut.row is None and cut.dropped.reason == "the answers are the same once they are cut"
    tiny = AnswerOptions(kind=None, max_length=30, max_prompt_len=29)
    none = encode(tokenizer, tiny, **pair("Why " * 30, words(30, "a"), words(3, "b")))
    assert none.row is None and none.dropped.reason == "no room for the answers behind the prompt"


def test_steps_are_kept_whole(tokenizer):
    given = {"src": "Why?", "responses": [words(20, "a"), words(20, "b"), words(20, "c")], "labels": [1, 1, 0]}
    whole = encode(tokenizer, **given).row
    limit = len(whole.prompt) + whole.step_ends[1] + 5
    encoded = encode(tokenizer, AnswerOptions(kind=None, max_length=limit), **given)
    assert encoded.notes == {"judged steps left out at the end": 1}
    assert encoded.row.step_ends == whole.step_ends[:2] and encoded.row.step_labels == (1.0, 1.0)
    assert len(encoded.row.answers[0]) == whole.step_ends[1] + 1
    room = len(whole.prompt) + whole.step_ends[0]
    short = AnswerOptions(kind=None, max_length=room, max_prompt_len=room - 1)
    assert encode(tokenizer, short, **given).row is None


def test_a_limit_that_leaves_no_room_is_refused():
    with pytest.raises(ConfigError, match="max_prompt_len 64 leaves no room"):
        AnswerOptions(max_length=64, max_prompt_len=64)
    assert AnswerOptions().prompt_limit(2) == 2048 and AnswerOptions(max_length=1000).prompt_limit(2) == 500


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


ROWS = [pair(f"q{n}", f"good {n} " + "x" * n, f"bad {n}") for n in range(12)]


def test_the_account_of_a_source(tmp_path, tokenizer):
    rows = [*ROWS, pair("q", "s", "s"), {**ROWS[0], "sort": [1, 1]}, {"prompt": "p", "completion": "c", "label": True}]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"rows.jsonl:14.*score 1"):
        build_answers(path, tokenizer, AnswerOptions())
    found = build_answers(path, tokenizer, AnswerOptions(on_malformed="skip", max_dropped_fraction=0.5))
    report = found.report
    assert (report.rows, report.kept, report.malformed.count, len(found)) == (15, 12, 2, 12)
    assert report.dropped["the answers are the same"].examples == [f"{path}:13"]
    assert "the row has one answer with a label, expected a pair" in report.malformed.examples[1]
    assert report.num_tokens == sum(map(len, found.rows)) and report.num_trained == sum(
        r.num_trained for r in found.rows
    )
    with pytest.raises(DataError, match="3 of 15 rows"):
        build_answers(path, tokenizer, AnswerOptions(on_malformed="skip", max_dropped_fraction=0.1))


def test_kto_rows_from_pairs(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", ROWS)
    found = build_answers(path, tokenizer, AnswerOptions(kind="point", mismatched=True))
    assert len(found) == 24 and found.report.rows == 24
    assert found.report.notes["pairs taken as two rows of one answer"] == 12
    answers = {}
    for row in found.rows:
        answers.setdefault(row.where, set()).add(tuple(row.answers[0].tolist()))
    for row in found.rows:
        assert row.labels[0] in (0.0, 1.0) and np.isnan(row.labels[1])
        assert tuple(row.answers[1].tolist()) not in answers[row.where]
        assert any(tuple(row.answers[1].tolist()) in of for of in answers.values())
    again = build_answers(path, tokenizer, AnswerOptions(kind="point", mismatched=True))
    assert again.fingerprint == found.fingerprint
    assert build_answers(path, tokenizer, AnswerOptions(kind="point")).fingerprint != found.fingerprint


@pytest.mark.parametrize("share", [True, False])
def test_the_loader_packs_by_what_a_row_takes(tmp_path, tokenizer, share):
    options = AnswerOptions(max_length=200, share=share)
    found = build_answers(write(tmp_path / "rows.jsonl", ROWS), tokenizer, options)
    sizes = [row.size(share=share) for row in found.rows]

    def loader(rows=found.rows):
        return Loader(
            rows,
            make=lambda chosen: make_answer_batch(chosen, share=share),
            lengths=sizes,
            rows_per_batch=1,
            capacity=200,
            packing=True,
            seed=3,
        )

    batches = [batch for _ in range(2) for batch in loader()]
    assert max(batch.num_tokens for batch in batches) <= 200 < sum(sizes)
    assert sorted(where for batch in loader() for where in batch.where) == sorted(row.where for row in found.rows)
    first, second = loader(), loader()
    iterator = iter(first)
    next(iterator)
    state = json.loads(json.dumps(first.state()))
    second.load_state(state)
    for ours, theirs in zip(iterator, second, strict=True):
        assert ours.where == theirs.where and ours.input_ids.equal(theirs.input_ids)
        assert ours.predictors_N.equal(theirs.predictors_N)
    with pytest.raises(DataError, match="the data has changed"):
        loader([replace(found.rows[0], margin=1.0), *found.rows[1:]]).load_state(state)
    with pytest.raises(DataError, match="a packed row 20"):
        Loader(found.rows, make=make_answer_batch, lengths=sizes, rows_per_batch=1, capacity=20, packing=True)


def test_references_are_attached_without_a_new_plan(tmp_path, tokenizer):
    found = build_answers(write(tmp_path / "rows.jsonl", ROWS), tokenizer, AnswerOptions())
    loader = Loader(found.rows, make=make_answer_batch, rows_per_batch=4, seed=1)
    next(iter(loader))
    known = np.random.default_rng(0).normal(size=(len(found), 2))
    referred = loader.with_samples(with_references(found.rows, known))
    assert referred.state() == loader.state()
    by_row = {row.where: known[number].tolist() for number, row in enumerate(found.rows)}
    for ours, theirs in zip(referred, loader, strict=True):
        assert ours.where == theirs.where
        assert ours.references_A.tolist() == [value for where in ours.where for value in by_row[where]]
    with pytest.raises(AssertionError, match="other samples"):
        loader.with_samples(found.rows[1:])
