"""Beam search: token for token that of transformers, on shared pages, beside other requests."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import oarsmith
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.engine.beams import Beams
from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.models.decoder import Decoder
from oarsmith.text import load_tokenizer
from remote_tokenizers import FIXTURES
from tiny import tiny_decoder

from .accounts import account, finish

Tiny = Callable[[str], Path]
PROMPTS = [[5, 17, 88, 3], [9], list(range(20, 33)), [150, 2, 2, 7, 61, 61]]
SEARCH = Sampling(max_new_tokens=16, num_beams=4, n=4)


@pytest.fixture
def model(tiny_model: Tiny) -> Decoder:
    return oarsmith.load_model(tiny_model("llama"), dtype="fp32", device="cpu")


def answers(completion: Completion) -> list[tuple[tuple[int, ...], float]]:
    return [(answer.ids, answer.score) for answer in (completion, *completion.others)]


def same(found: list[Completion], expected: list[Completion]) -> None:
    for completion, other in zip(found, expected, strict=True):
        (ids, scores), (wanted, values) = (zip(*answers(each), strict=True) for each in (completion, other))
        assert ids == wanted
        assert scores == values or scores == pytest.approx(values, rel=1e-4)


class Reference:
    """transformers' generate on the same directory."""

    def __init__(self, path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def search(self, prompt: list[int], stop_ids: list[int], **options: Any) -> list[tuple[tuple[int, ...], float]]:
        config = self._model.generation_config
        config.eos_token_id, config.pad_token_id = stop_ids or None, 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        ended = []
        for row in found.sequences[:, len(prompt) :].tolist():
            ends = [place + 1 for place, token in enumerate(row) if token in stop_ids]
            ended.append(tuple(row[: ends[0]] if ends else row))
        return list(zip(ended, found.sequences_scores.tolist(), strict=True))


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_answers_are_those_of_transformers(tiny_model: Tiny, name: str) -> None:
    """With ends in the middle of answers, where the penalties and the rules for the end matter."""
    path, draw = tiny_model(name), random.Random(1)
    reference = Reference(path)
    engine = Engine(oarsmith.load_model(path, dtype="fp32", device="cpu"), block_size=4)
    (free,) = engine.generate(PROMPTS[0], SEARCH)
    frequent = [free.ids[5], free.ids[2], free.others[1].ids[7]]
    cases = [
        (beams, penalty, early, ends, repetition)
        for beams in (2, 4)
        for penalty in (1.0, 0.0, -1.5, 2.0)
        for early in (False, True, "never")
        for ends in (0, 1, 3)
        for repetition in (1.0, 1.3)
    ]
    lengths = set()
    for beams, penalty, early, ends, repetition in draw.sample(cases, 50):
        prompt, n = draw.choice(PROMPTS), draw.randint(1, beams)
        stop_ids = list(dict.fromkeys(frequent[:ends]))
        sampling = Sampling(
            max_new_tokens=14,
            num_beams=beams,
            n=n,
            length_penalty=penalty,
            early_stopping=early,
            stop_ids=stop_ids,
            repetition_penalty=repetition,
            min_new_tokens=2,
        )
        expected = reference.search(
            prompt,
            stop_ids,
            num_beams=beams,
            num_return_sequences=n,
            length_penalty=penalty,
            early_stopping=early,
            repetition_penalty=repetition,
            max_new_tokens=14,
            min_new_tokens=2,
        )
        (found,) = engine.generate(prompt, sampling)
        assert [ids for ids, _ in answers(found)] == [ids for ids, _ in expected], sampling
        assert [score for _, score in answers(found)] == pytest.approx([score for _, score in expected], rel=1e-4)
        for answer in (found, *found.others):
            assert answer.finish_reason == ("stop" if answer.ids[-1] in stop_ids else "length")
            lengths.add(answer.num_tokens)
        account(engine)
    assert {3, 14} < lengths


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3_long"])
def test_searches_beside_others(tiny_model: Tiny, name: str) -> None:
    """In a small cache, with prompts in pieces and pages that are lost: everybody has the answer they have alone."""
    model = oarsmith.load_model(tiny_model(name), dtype="fp32", device="cpu")
    wanted = [
        SEARCH,
        Sampling(max_new_tokens=16),
        Sampling(max_new_tokens=16, num_beams=2, length_penalty=0.5, early_stopping=True),
        Sampling(max_new_tokens=16, temperature=1.0, seed=1, n=2),
        Sampling(max_new_tokens=9, num_beams=3, n=2),
    ]
    requests = [(prompt, sampling) for prompt in PROMPTS for sampling in wanted]
    alone = Engine(model)
    expected = [alone.generate(prompt, sampling)[0] for prompt, sampling in requests]
    for drafter in (None, "ngram", model if name == "llama" else None):
        options = {} if drafter is None else {"speculative": drafter, "num_draft_tokens": 2}
        engine = Engine(model, batch_size=8, num_pages=28, block_size=4, max_step_tokens=24, **options)
        ids = [engine.add(prompt, sampling, priority=len(prompt) % 2) for prompt, sampling in requests]
        found: dict[str, Completion] = {}
        scheduler, draw = engine.runner.scheduler, random.Random(1)
        while engine.busy:
            found |= {output.id: output.completion for output in engine.step() if output.completion is not None}
            if scheduler.running and draw.random() < 0.2:
                scheduler.preempt(draw.choice(scheduler.running))
            account(engine)
        if drafter is model:
            drawn = [index for index, (_, sampling) in enumerate(requests) if sampling.greedy]
        else:
            drawn = list(range(len(requests)))
        same([found[ids[index]] for index in drawn], [expected[index] for index in drawn])
        assert scheduler.pool.num_free == 28


def test_pages_are_shared(model: Decoder) -> None:
    engine = Engine(model, batch_size=4, block_size=4, num_pages=44)
    engine.add(list(range(1, 19)), Sampling(max_new_tokens=20, num_beams=4))
    most = 0
    while engine.busy:
        engine.step()
        account(engine)
        pool = engine.runner.scheduler.pool
        most = max(most, pool.num_pages - pool.num_free)
    assert 5 <= most < 4 + 4 * 6, "what the beams have in common lies there once"


def test_what_a_search_tells(model: Decoder) -> None:
    """Nothing before its end; then log-probabilities of the model, before penalties."""
    sampling = Sampling(
        max_new_tokens=8, num_beams=3, n=3, logprobs=2, prompt_logprobs=1, repetition_penalty=1.5, length_penalty=0.0
    )
    engine = Engine(model)
    engine.add(PROMPTS[3], sampling)
    outputs = []
    while engine.busy:
        outputs += engine.step()
    (output,) = outputs
    assert output.choice is None and output.index == 0 and output.completion is not None
    assert len(output.completion.prompt_logprobs) == len(PROMPTS[3]) - 1
    for answer in (output.completion, *output.completion.others):
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*PROMPTS[3], *answer.ids]]))[0, len(PROMPTS[3]) - 1 :].log_softmax(-1)
        for row, choice, token in zip(logprobs, answer.logprobs, answer.ids, strict=False):
            assert choice.token == token and choice.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [index for index, _ in choice.top] == row.topk(2).indices.tolist()
    (plain,) = engine.generate(PROMPTS[3], Sampling(max_new_tokens=8, num_beams=3, logprobs=0, length_penalty=0.0))
    assert plain.score == pytest.approx(sum(choice.logprob for choice in plain.logprobs), abs=1e-4)


def test_one_beam_more_is_never_worse_than_none(model: Decoder) -> None:
    """A search that keeps everything finds the likeliest answer of all."""
    small = tiny_decoder(seed=3, vocab_size=5).eval()
    (found,) = Engine(small, batch_size=25).generate([1, 2], Sampling(max_new_tokens=3, num_beams=25, n=25))
    ids = torch.cartesian_prod(*[torch.arange(5)] * 3)
    with torch.inference_mode():
        logprobs = small(torch.cat((torch.tensor([[1, 2]]).expand(125, -1), ids[:, :2]), 1))[:, 1:].log_softmax(-1)
    totals = logprobs.gather(2, ids[:, :, None]).sum((1, 2))
    best = totals.topk(25)
    assert [answer for answer, _ in answers(found)] == [tuple(row) for row in ids[best.indices].tolist()]


def test_stops_constraints_and_bad_words() -> None:
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    tokenizer = load_tokenizer(FIXTURES / "qwen25_bpe_json")
    engine = Engine(tiny_decoder(seed=4).eval(), tokenizer)
    (free,) = engine.generate("The", Sampling(max_new_tokens=12, num_beams=3))
    assert free.text == tokenizer.decode(free.ids, skip_special_tokens=True)
    stop = free.text[4:6]
    (cut,) = engine.generate("The", Sampling(max_new_tokens=12, num_beams=3, n=3, stop=stop, length_penalty=-2.0))
    for answer in (cut, *cut.others):
        whole = tokenizer.decode(answer.ids, skip_special_tokens=True)
        assert answer.text == whole.partition(stop)[0]
        assert (answer.finish_reason == "stop") == (stop in whole)
    assert "stop" in {answer.finish_reason for answer in (cut, *cut.others)}
    (kept,) = engine.generate("The", Sampling(max_new_tokens=12, num_beams=3, bad_words=[[free.ids[3]]]))
    assert free.ids[3] not in kept.ids
    choices = ["abcd", "abxy", "q"]
    (held,) = engine.generate("The", Sampling(max_new_tokens=20, num_beams=4, n=4, choices=choices))
    found = [answer.text for answer in (held, *held.others)]
    # Spelled by other tokens a text is another answer; where there are few answers, there are no more.
    assert set(found) <= set(choices) and len(found) == 4
    (only,) = engine.generate("The", Sampling(max_new_tokens=20, num_beams=4, n=4, choices=["q"]))
    assert only.text == "q" and only.others == ()


def test_aborts_and_interruptions(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of reading, of choosing, of taking seats: nothing is lost, and every page comes back."""
    draw, engine = random.Random(1), Engine(model, batch_size=5, num_pages=26, block_size=4, max_step_tokens=9)
    prompts, found, calls = dict[str, list[int]](), dict[str, Completion](), 0
    sampling = Sampling(max_new_tokens=7, num_beams=3, n=2)
    sit = Beams.sit

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 13 == 5:
            raise KeyboardInterrupt

    def sitting(beams: Beams) -> None:
        sit(beams)
        if beams.seats[0].table is not None:
            interrupt()

    monkeypatch.setattr(Beams, "sit", sitting)
    handle = model.layers[1].register_forward_pre_hook(interrupt)
    for _ in range(250):
        if draw.random() < 0.4:
            prompt = [draw.randint(1, 3) for _ in range(draw.randint(1, 16))]
            id = engine.add(prompt, draw.choice((sampling, GREEDY)), priority=draw.randint(0, 1))
            prompts[id] = prompt
        try:
            found |= {output.id: output.completion for output in engine.step() if output.completion is not None}
        except KeyboardInterrupt:
            account(engine)
        if draw.random() < 0.1 and (open_ids := sorted(prompts.keys() - found.keys())):
            id = draw.choice(open_ids)
            if engine.abort(id):
                del prompts[id]
        account(engine)
    handle.remove()
    monkeypatch.undo()
    found |= finish(engine)
    assert len(found) > 20 and found.keys() == prompts.keys() and engine.runner.scheduler.num_preempted > 20
    alone = Engine(model, prefix_caching=False)
    for id, answer in found.items():
        same([answer], alone.generate(prompts[id], GREEDY if answer.score is None else sampling))


GREEDY = Sampling(max_new_tokens=7)


def test_damaged_logits_end_the_search_alone(model: Decoder) -> None:
    expected = Engine(model).generate(PROMPTS[1], SEARCH)
    with torch.no_grad():
        model.head.weight.data = model.head.weight.detach().clone()
        model.embedding.weight[198] = torch.nan
    engine = Engine(model)
    engine.add([5, 198], SEARCH, id="bad")
    good = engine.add(PROMPTS[1], SEARCH)
    outputs = []
    while engine.busy:
        outputs += engine.step()
        account(engine)
    assert [(output.id, type(output.error)) for output in outputs] == [("bad", ModelError), (good, type(None))]
    same([outputs[1].completion], expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 2, "temperature": 1.0}, "temperature is 1.0 and num_beams 2: a beam search does not draw"),
        ({"num_beams": 2, "best_of": 2}, "best_of is 2 and num_beams 2"),
        ({"num_beams": 2, "n": 3}, "n must be at most 2"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"num_beams": 2, "early_stopping": "often"}, 'early_stopping must be true, false or "never"'),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty must be a number"),
    ],
)
def test_what_cannot_be_searched(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)


def test_what_does_not_fit(model: Decoder) -> None:
    with pytest.raises(DataError, match="4 beams needs as many rows; the cache has 3"):
        Engine(model, batch_size=3).generate([1], SEARCH)
    with pytest.raises(DataError, match="4 times prompt and answer of up to 16 tokens need 16 pages of 4 tokens"):
        Engine(model, num_pages=15, block_size=4).generate([1], SEARCH)
    with pytest.raises(ConfigError, match="a stream is one answer"):
        Engine(model).stream([1], SEARCH)
