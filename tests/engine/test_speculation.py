"""Guessed tokens: answers are those of plain decoding, or distributed as those; nothing remains of wrong guesses."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch

import oarsmith
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.engine.filters import draw_after
from oarsmith.engine.pace import Pace
from oarsmith.engine.served import Served
from oarsmith.engine.speculation import Text
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.facts import ModelFacts
from oarsmith.text import load_tokenizer
from oracle_drafter import OracleDrafter
from remote_tokenizers import FIXTURES
from tiny import tiny_decoder

from .accounts import account, finish

Tiny = Callable[[str], Path]
PROMPTS = [[5, 17, 88, 3], [9], [7, 8, 9] * 4, [150, 2, 2, 7, 61, 61], [44, 45] * 5, list(range(20, 36))]
GREEDY = Sampling(max_new_tokens=24, logprobs=2)
DRAWN = Sampling(max_new_tokens=24, temperature=0.4, top_k=20, repetition_penalty=1.1, seed=5, logprobs=0)
SEVERAL = Sampling(max_new_tokens=20, temperature=0.5, top_p=0.9, seed=3, n=3)


@pytest.fixture
def model(tiny_model: Tiny) -> Decoder:
    return oarsmith.load_model(tiny_model("llama"), dtype="fp32", device="cpu")


def relative_of(model: Decoder, size: float = 0.02) -> Decoder:
    """A decoder that mostly, but not always, thinks alike."""
    other = Decoder(model.spec, model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for index, parameter in enumerate(other.parameters()):
            noise = torch.empty(parameter.shape).normal_(generator=torch.Generator().manual_seed(index))
            parameter.add_(noise * size * parameter.std())
    return other


def texts(completions: Sequence[Completion]) -> list[tuple[tuple[int, ...], ...]]:
    return [(answer.ids, *(other.ids for other in answer.others)) for answer in completions]


def same(found: Sequence[Completion], expected: Sequence[Completion]) -> None:
    assert texts(found) == texts(expected)
    assert [answer.finish_reason for answer in found] == [answer.finish_reason for answer in expected]
    for answer, other in zip(found, expected, strict=True):
        for choice, wanted in zip(answer.logprobs or (), other.logprobs or (), strict=True):
            assert choice.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert [token for token, _ in choice.top] == [token for token, _ in wanted.top]


# Many rows; few, with pages that run out and prompts in pieces.
SHAPES = (
    {"batch_size": 8},
    {"batch_size": 3, "num_pages": 14, "block_size": 4, "max_step_tokens": 15},
)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, SEVERAL], ids=["greedy", "drawn", "several"])
@pytest.mark.parametrize("name", ["llama", "mistral", "phi3_long", "gpt2"])
def test_answers_are_those_of_plain_decoding(tiny_model: Tiny, name: str, sampling: Sampling) -> None:
    """By likeness, and by guesses that are mostly right: the same tokens, also those that are drawn."""
    model = oarsmith.load_model(tiny_model(name), dtype="fp32", device="cpu")
    expected = Engine(model).generate(PROMPTS, sampling)
    for shape in SHAPES:
        engine = Engine(model, speculative="ngram", **shape)
        same(engine.generate(PROMPTS, sampling), expected)
        assert engine.runner.num_drafted > 0
        account(engine)
        if sampling.n == 1:
            oracle = Engine(model, speculative="ngram", num_draft_tokens=4, **shape)
            oracle.runner._drafter = OracleDrafter(expected, model.spec.vocab_size)
            same(oracle.generate(PROMPTS, sampling), expected)
            assert 0 < oracle.runner.num_accepted < oracle.runner.num_drafted
            account(oracle)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, SEVERAL], ids=["greedy", "drawn", "several"])
def test_a_model_guesses(model: Decoder, sampling: Sampling) -> None:
    """Greedy answers stay what they are; drawn ones do not depend on what else there is."""
    draft = relative_of(model)
    engine = Engine(model, speculative=draft)
    found = engine.generate(PROMPTS, sampling)
    assert 0.3 < engine.runner.num_accepted / engine.runner.num_drafted < 1
    if sampling is GREEDY:
        same(found, Engine(model).generate(PROMPTS, sampling))
    again = Engine(model, speculative=draft, **SHAPES[1])
    same(again.generate(PROMPTS, sampling), found)
    assert again.runner.scheduler.num_preempted > 0
    account(again)
    # What it begins with is found, in both caches.
    same(engine.generate(PROMPTS, sampling), found)
    # One after another.
    alone = Engine(model, speculative=draft, batch_size=1, prefix_caching=False)
    same(alone.generate(PROMPTS, sampling), found)


def test_a_model_that_is_the_same_is_always_right(model: Decoder) -> None:
    engine = Engine(model, speculative=model, batch_size=2, block_size=4)
    for sampling in (GREEDY, DRAWN):
        engine.generate(PROMPTS, sampling)
    assert engine.runner.num_accepted >= 0.99 * engine.runner.num_drafted > 100
    # The last guess of a step is not read by the one who made it before the next step; pages wait for that.
    longer = [[*prompt, *answer.ids] for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True)]
    engine.generate([ids[:60] for ids in longer], GREEDY)
    assert engine.runner.num_accepted >= 0.99 * engine.runner.num_drafted


def penalized(logits: torch.Tensor, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The sampling of the next test, written out once more."""
    logits = logits.clone()
    for token in {*prompt, *answer}:
        logits[token] = logits[token] / 1.3 if logits[token] > 0 else logits[token] * 1.3
    for token, count in Counter(answer).items():
        logits[token] -= 0.2 * count
    if answer and answer[-1] == 2:
        logits[3] = -math.inf
    probs = (logits / 1.2).softmax(-1)
    order = probs.argsort(descending=True)
    kept = probs[order].cumsum(0) - probs[order] < 0.95
    return torch.zeros_like(probs).index_put((order[kept],), probs[order[kept]]) / probs[order[kept]].sum()


@pytest.mark.parametrize("by", ["model", "likeness"])
def test_drawn_answers_have_the_distribution(by: str) -> None:
    """Chi-square over all answers of four tokens of four, against exact probabilities."""
    model = tiny_decoder(seed=2, vocab_size=4).eval()
    with torch.no_grad():
        model.head.weight.mul_(0.3)
    prompt, size, count = [1, 3, 0, 2, 1, 3], 4, 6000
    sampling = Sampling(
        max_new_tokens=4,
        temperature=1.2,
        top_p=0.95,
        repetition_penalty=1.3,
        frequency_penalty=0.2,
        bad_words=[[2, 3]],
        ignore_eos=True,
        seed=1,
    )
    draft = relative_of(model, size=3.0) if by == "model" else "ngram"
    engine = Engine(model, speculative=draft, num_draft_tokens=2, batch_size=256)
    found = Counter(answer.ids for answer in engine.generate([prompt] * count, sampling))
    assert 0.1 < engine.runner.num_accepted / engine.runner.num_drafted < 0.95

    answers = list(product(range(size), repeat=4))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer[:3]] for answer in answers]))[:, len(prompt) - 1 :]
    probability = [
        math.prod(float(penalized(rows[place], prompt, answer[:place])[token]) for place, token in enumerate(answer))
        for answer, rows in zip(answers, logits, strict=True)
    ]
    assert sum(probability) == pytest.approx(1, abs=1e-5)
    assert all(p > 0 for p, answer in zip(probability, answers, strict=True) if found[answer])
    cells = [(p * count, found[answer]) for p, answer in zip(probability, answers, strict=True)]
    common, rare = [cell for cell in cells if cell[0] >= 5], [cell for cell in cells if cell[0] < 5]
    common.append((sum(p for p, _ in rare), sum(n for _, n in rare)))
    chi = sum((n - p) ** 2 / p for p, n in common)
    freedom = len(common) - 1
    assert freedom > 40 and abs(chi - freedom) < 4 * math.sqrt(2 * freedom), (chi, freedom)


def test_a_draw_after_a_guess_is_a_draw() -> None:
    """Over all guesses and a fine grid of the deciding number: exactly p, and the guess as often as can be."""
    generator, grid = torch.Generator().manual_seed(0), 4000
    for zeros in (0, 2):
        p, q = torch.rand(2, 7, generator=generator, dtype=torch.float64).unbind()
        p[:zeros], q[-zeros or 7 :] = 0, 0
        p, q = p / p.sum(), q / q.sum()
        found, kept = torch.zeros(7, dtype=torch.float64), 0.0
        for guess in range(7):
            if q[guess] == 0:
                continue
            drawn = Counter(draw_after(p, guess, q, (step + 0.5) / grid) for step in range(grid))
            kept += float(q[guess]) * drawn[guess] / grid
            for token, number in drawn.items():
                found[token] += q[guess] * number / grid
        torch.testing.assert_close(found, p, atol=1e-3, rtol=0)
        assert kept == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-3)
    assert {draw_after(p, guess, p, 1 - 1e-16) for guess in range(2, 7)} == set(range(2, 7))


def test_likenesses_are_found() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids = [draw.randint(0, 2) for _ in range(draw.randint(1, 40))]
        shortest = draw.randint(1, 3)
        longest, count = draw.randint(shortest, 5), draw.randint(1, 6)
        expected: list[int] = []
        for size in range(longest, shortest - 1, -1):
            ends = [end for end in range(size, len(ids)) if ids[end - size : end] == ids[-size:]]
            if ends:
                full = [end for end in ends if end + count <= len(ids)]
                end = full[-1] if full else ends[0]
                expected = ids[end : end + count]
                break
        text = Text()
        for cut in (len(ids) // 2, len(ids)):
            text.extend(ids[:cut])
        assert text.continuation(count, shortest, longest) == expected, (ids, shortest, longest, count)


def test_who_guesses_badly_guesses_less() -> None:
    pace = Pace(8)
    sizes = []
    for guessed_right in (0, 0, 0, 0):
        sizes.append(pace.size)
        pace.learn(pace.size, guessed_right)
    assert sizes == [8, 4, 2, 1] and pace.size == 0
    waits = []
    for _ in range(6):
        waits.append(0)
        while pace.size == 0:
            pace.learn(0, 0)
            waits[-1] += 1
        pace.learn(pace.size, 0)
    assert waits == [4, 8, 16, 32, 64, 64]
    while pace.size == 0:
        pace.learn(0, 0)
    sizes = []
    for _ in range(5):
        sizes.append(pace.size)
        pace.learn(pace.size, pace.size)
    assert sizes == [1, 2, 4, 8, 8]
    pace.learn(8, 3)
    assert pace.size == 4


@pytest.mark.parametrize("by", ["ngram", "model"])
def test_stops_limits_and_constraints(by: str) -> None:
    """Each as without guesses, side by side with requests that have none of them."""
    pytest.importorskip("llguidance", reason="pip install 'oarsmith[constrained]'")
    model, tokenizer = tiny_decoder(seed=4).eval(), load_tokenizer(FIXTURES / "qwen25_bpe_json")
    plain = Engine(model, tokenizer)
    (free,) = plain.generate("The The The", Sampling(max_new_tokens=30))
    wanted = [
        Sampling(max_new_tokens=30),
        Sampling(max_new_tokens=1),
        Sampling(max_new_tokens=2),
        Sampling(max_new_tokens=30, stop_ids=free.ids[7:8]),
        Sampling(max_new_tokens=30, stop=free.text[9:14]),
        Sampling(max_new_tokens=30, min_new_tokens=20, logit_bias={tokenizer.stop_ids[0]: 90}),
        Sampling(max_new_tokens=40, bad_words=[free.ids[2:4]], repetition_penalty=1.3, prompt_logprobs=1),
        Sampling(max_new_tokens=60, regex="([ab]{3}-){6}[ab]{3}"),
        Sampling(max_new_tokens=80, json_schema={"type": "array", "items": {"enum": ["xyz"]}, "minItems": 4}),
    ]
    expected = [plain.generate("The The The", sampling)[0] for sampling in wanted]
    engine = Engine(model, tokenizer, speculative="ngram" if by == "ngram" else relative_of(model, 0.01))
    ids = [engine.add("The The The", sampling) for sampling in wanted]
    choices: dict[str, list[int]] = {id: [] for id in ids}
    found: dict[str, Completion] = {}
    streamed = dict.fromkeys(ids, "")
    while engine.busy:
        for output in engine.step():
            assert output.error is None and output.choice is not None
            choices[output.id].append(output.choice.token)
            streamed[output.id] += output.text
            if output.completion is not None:
                found[output.id] = output.completion
    assert [found[id] for id in ids] == [
        Completion(**{**vars(answer), "prompt_logprobs": found[id].prompt_logprobs})
        for id, answer in zip(ids, expected, strict=True)
    ]
    assert [tuple(choices[id]) for id in ids] == [answer.ids for answer in expected], "every token is told of"
    assert [streamed[id] for id in ids] == [answer.text for answer in expected]
    assert engine.runner.num_accepted > 20
    account(engine)


@pytest.mark.parametrize("by", ["ngram", "model"])
def test_aborts_and_interruptions(model: Decoder, by: str) -> None:
    """At random moments; those that stay have the answers they have alone, and every page comes back."""
    drafter = "ngram" if by == "ngram" else relative_of(model)
    draw, drawn = random.Random(1), Sampling(max_new_tokens=12, temperature=0.5, seed=1)
    engine = Engine(model, speculative=drafter, batch_size=4, num_pages=16, block_size=4, max_step_tokens=20)
    calls, prompts = 0, dict[str, list[int]]()

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 11 == 3:
            raise KeyboardInterrupt

    handles = [model.layers[1].register_forward_pre_hook(interrupt)]
    found: dict[str, Completion] = {}
    for _ in range(150):
        for _ in range(draw.randint(0, 3)):
            prompt = [draw.randint(1, 3) for _ in range(draw.randint(1, 24))]
            prompts[engine.add(prompt, draw.choice((GREEDY, drawn)), priority=draw.randint(0, 2))] = prompt
        try:
            found |= {output.id: output.completion for output in engine.step() if output.completion is not None}
        except KeyboardInterrupt:
            account(engine)
        for id in draw.sample(sorted(prompts.keys() - found.keys()), draw.randint(0, 2) if len(prompts) > 4 else 0):
            if engine.abort(id):
                del prompts[id]
        account(engine)
    for handle in handles:
        handle.remove()
    found |= finish(engine)
    assert len(found) > 20 and engine.runner.scheduler.num_preempted > 20
    alone = Engine(model, speculative=drafter, batch_size=1, prefix_caching=False)
    for id, answer in found.items():
        sampling = GREEDY if answer.logprobs is not None else drawn
        assert alone.generate(prompts[id], sampling)[0].ids == answer.ids


def test_a_draft_model_with_a_shorter_context_guesses_as_far_as_it_goes(model: Decoder) -> None:
    short = tiny_decoder(vocab_size=199, max_position_embeddings=24).eval()
    engine = Engine(model, speculative=short, block_size=4)
    expected = Engine(model).generate(PROMPTS, GREEDY)
    same(engine.generate(PROMPTS, GREEDY), expected)
    same(engine.generate(PROMPTS, GREEDY), expected)


def test_a_draft_model_may_be_padded_otherwise(model: Decoder) -> None:
    tokenizer = load_tokenizer(FIXTURES / "qwen25_bpe_json")
    large = tiny_decoder(seed=4, vocab_size=1200).eval()
    for size in (1120, 1280):
        engine = Engine(large, speculative="ngram")
        draft = tiny_decoder(seed=4, vocab_size=size).eval()
        engine._draft_model = Served(ModelFacts.of(draft.spec), make=partial(lambda own: own, draft))
        same(engine.generate([[5, 1190, 7]], GREEDY), Engine(large).generate([[5, 1190, 7]], GREEDY))
        assert engine.runner.num_drafted > 0
    assert tokenizer.vocab_size < 1120


def test_damaged_guesses_harm_nobody(model: Decoder) -> None:
    draft = relative_of(model)
    with torch.no_grad():
        draft.embedding.weight[9] = torch.nan
    same(Engine(model, speculative=draft).generate(PROMPTS, GREEDY), Engine(model).generate(PROMPTS, GREEDY))


def test_what_cannot_guess_is_refused(model: Decoder, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another vocabulary"):
        Engine(model, speculative=tiny_decoder().eval())
    with pytest.raises(ConfigError, match="training mode"):
        Engine(model, speculative=tiny_decoder(vocab_size=199).train())
    with pytest.raises(ConfigError, match="num_draft_tokens must be at least 1"):
        Engine(model, speculative="ngram", num_draft_tokens=0)
    with pytest.raises(ConfigError, match="ngram_max must be at least 3"):
        Engine(model, speculative="ngram", ngram_min=3, ngram_max=2)
    with pytest.raises(ConfigError, match="max_step_tokens must be at least 40"):
        Engine(model, speculative="ngram", max_step_tokens=39)
    oarsmith.save_model(model, tmp_path / "draft")
    same(Engine(model, speculative=tmp_path / "draft").generate([5], GREEDY), Engine(model).generate([5], GREEDY))
