"""Whole answers of a tiny random model: what a sampling asks for holds in the text, and neighbours change nothing."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from oarsmith.engine import Engine, Sampling
from oarsmith.errors import ConfigError, MissingExtraError
from oarsmith.text import load_tokenizer
from remote_tokenizers import FIXTURES
from tiny import tiny_decoder

HOME = {
    "type": "object",
    "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}, "rooms": {"enum": [1, 2, "viele é"]}},
    "required": ["zip", "rooms"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_decoder(seed=4).eval(), load_tokenizer(FIXTURES / "qwen25_bpe_json"), batch_size=4)


def added(engine: Engine, samplings: list[Sampling], prompt: str = "The") -> list[str]:
    """Answers to the same prompt, each with a sampling of its own, in one engine at the same time."""
    ids = [engine.add(prompt, sampling) for sampling in samplings]
    texts = {}
    while engine.busy:
        for output in engine.step():
            assert output.error is None
            if output.completion is not None:
                texts[output.id] = output.completion.text
    return [texts[index] for index in ids]


def test_every_request_has_its_own_sampling(engine: Engine) -> None:
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    pattern = "(ja|nein), [a-f]{3}"
    samplings = [
        Sampling(json_schema=HOME, temperature=1.0, seed=1, max_new_tokens=200),
        Sampling(max_new_tokens=12),
        Sampling(regex=pattern, temperature=1.5, seed=2),
        Sampling(temperature=1.2, top_k=30, min_p=0.01, seed=3, max_new_tokens=20, presence_penalty=0.5),
        Sampling(choices=["rot", "grün", "日本"], temperature=1.0, seed=4, min_new_tokens=3),
        Sampling(json_schema=HOME, stop='"rooms"', max_new_tokens=200),
        Sampling(temperature=1.0, typical_p=0.4, seed=5, max_new_tokens=20, logit_bias={5: 3.0}),
    ]
    together = added(engine, samplings)
    assert together == [added(engine, [sampling])[0] for sampling in samplings]
    assert set(json.loads(together[0])) == {"zip", "rooms"}
    assert re.fullmatch(pattern, together[2])
    assert together[4] in ("rot", "grün", "日本")
    assert re.match(r'\s*\{\s*"zip"', together[5]) and "rooms" not in together[5]


def test_several_answers_to_a_prompt_are_each_held_to_it(engine: Engine) -> None:
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    (answer,) = engine.generate("The", Sampling(regex="[ab]{8}", temperature=1.0, seed=1, n=4))
    texts = [answer.text, *(other.text for other in answer.others)]
    assert len(texts) == 4 and all(re.fullmatch("[ab]{8}", text) for text in texts)
    assert len(set(texts)) > 1


def test_the_stream_of_a_constrained_answer(engine: Engine) -> None:
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    assert json.loads("".join(engine.stream("The", Sampling(json_schema=HOME, max_new_tokens=200))))["zip"].isdigit()


def test_a_schema_that_cannot_be_followed_is_refused_before_anything_runs(engine: Engine) -> None:
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    with pytest.raises(ConfigError, match="Invalid type: nope"):
        engine.generate("The", Sampling(json_schema={"type": "nope"}))
    assert not engine.busy


def test_bad_words_do_not_come(engine: Engine) -> None:
    free = Sampling(max_new_tokens=30)
    (ids,) = (answer.ids for answer in engine.generate("The", free))
    pair = ids[4:6]
    (held,) = engine.generate("The", Sampling(max_new_tokens=30, bad_words=[[ids[0]], pair]))
    assert ids[0] not in held.ids
    assert pair not in set(zip(held.ids, held.ids[1:], strict=False))
    word = "e"
    (index,) = engine.tokenizer.encode(word)
    forced = Sampling(max_new_tokens=5, logit_bias={index: 100.0})
    assert word in engine.generate("The", forced)[0].text
    kept = Sampling(max_new_tokens=5, logit_bias={index: 100.0}, bad_words=word)
    assert index not in engine.generate("The", kept)[0].ids


def test_the_least_length_holds_back_every_end(engine: Engine) -> None:
    eos = engine.tokenizer.stop_ids[0]
    wanted = {"max_new_tokens": 20, "logit_bias": {eos: 100.0}}
    (short,) = engine.generate("The", Sampling(**wanted))
    (longer,) = engine.generate("The", Sampling(**wanted, min_new_tokens=7))
    assert (short.num_tokens, longer.num_tokens) == (1, 8)
    assert longer.finish_reason == "stop"


def test_logprobs_of_an_answer_are_those_of_the_model(engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=6, logprobs=2, prompt_logprobs=1, temperature=1.3, top_k=3, seed=2)
    (answer,) = engine.generate([5, 6, 7, 8], sampling)
    ids = [*answer.prompt_ids, *answer.ids]
    with torch.inference_mode():
        logprobs_TV = engine.model(torch.tensor([ids]))[0].float().log_softmax(-1)
    assert answer.logprobs is not None and answer.prompt_logprobs is not None
    for place, choice in enumerate([*answer.prompt_logprobs, *answer.logprobs]):
        assert choice.token == ids[place + 1]
        assert choice.logprob == pytest.approx(float(logprobs_TV[place, choice.token]), abs=1e-4)
        assert choice.top[0][1] == pytest.approx(float(logprobs_TV[place].max()), abs=1e-4)


def test_constraints_say_how_to_get_them(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match="regex needs"):
        engine.generate("The", Sampling(regex="never seen"))
