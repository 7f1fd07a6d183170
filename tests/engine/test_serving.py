"""Many requests in one engine: too few pages, order, aborts, failures, interruptions. Nobody notices the others."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import oarsmith
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.engine.choice import Choice
from oarsmith.engine.request import Request
from oarsmith.errors import ConfigError, DataError, ModelError
from oarsmith.models.decoder import Decoder

from .accounts import account, finish

Tiny = Callable[[str], Path]
PROMPTS = [[5, 17, 88, 3], [9], list(range(20, 33)), [150, 2, 2, 7, 61, 61], [44, 45], list(range(20, 40))]
GREEDY = Sampling(max_new_tokens=20)
DRAWN = Sampling(max_new_tokens=20, temperature=1.1, top_k=50, repetition_penalty=1.2, seed=5)


@pytest.fixture
def model(tiny_model: Tiny) -> Decoder:
    return oarsmith.load_model(tiny_model("llama"), dtype="fp32", device="cpu")


def tight(model: Decoder, **options: int) -> Engine:
    """Pages of 4 tokens, 16 of them: two or three requests that are answered to the end."""
    return Engine(model, **{"batch_size": 4, "num_pages": 16, "block_size": 4, "max_step_tokens": 8, **options})


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_too_few_pages_cost_time_only(model: Decoder, sampling: Sampling) -> None:
    engine = tight(model)
    assert engine.generate(PROMPTS, sampling) == Engine(model).generate(PROMPTS, sampling)
    assert engine.runner.scheduler.num_preempted > 0
    account(engine)


def test_what_can_never_fit_is_refused(model: Decoder) -> None:
    engine = tight(model, num_pages=5)
    with pytest.raises(DataError, match=r"prompt 1.*up to 30 tokens need 8 pages of 4 tokens; the cache has 5"):
        engine.generate([[1], list(range(1, 12))], GREEDY)
    assert engine.generate([1], GREEDY) == Engine(model).generate([1], GREEDY), "the others are not kept from trying"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_ten_thousand_aborts(tiny_model: Tiny, name: str) -> None:
    """At random moments: waiting, in the middle of a prompt, of an answer, after a preemption, several answers."""
    model, draw = oarsmith.load_model(tiny_model(name), dtype="fp32", device="cpu"), random.Random(1)
    engine, prompts, alive, found, aborted = tight(model), dict[str, list[int]](), set[str](), {}, 0
    greedy, drawn = Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, n=3, temperature=1.0, seed=1)
    while aborted < 10_000:
        for _ in range(draw.randint(0, 8)):
            prompt = [draw.randint(1, 3) for _ in range(draw.randint(1, 24))]
            id = engine.add(prompt, draw.choice((greedy, greedy, drawn)), priority=draw.randint(0, 2))
            prompts[id] = prompt
            alive.add(id)
        for _ in range(draw.randint(0, 3)):
            for output in engine.step():
                assert output.error is None and output.id in alive
                if output.completion is not None:
                    alive.remove(output.id)
                    found[output.id] = output.completion
        account(engine)
        for id in draw.sample(sorted(alive), min(len(alive), draw.randint(0, 8))):
            alive.remove(id)
            aborted += engine.abort(id)
            assert not engine.abort(id)
        account(engine)
    found |= finish(engine)
    assert len(found) > 300 and engine.runner.scheduler.num_preempted > 20
    # Those that were not given up have the answers they have alone.
    alone = Engine(model, batch_size=3, prefix_caching=False)
    for id in draw.sample(sorted(found), 200):
        sampling = drawn if found[id].others else greedy
        assert alone.generate(prompts[id], sampling)[0] == found[id]


def test_the_order_is_priority_then_arrival(model: Decoder) -> None:
    """Thousands wait; they are answered as they came, the important ones first."""
    engine, draw = Engine(model, batch_size=16, block_size=4), random.Random(2)
    wanted = [(-draw.randint(0, 2), number) for number in range(2000)]
    for priority, number in wanted:
        engine.add([1 + number % 100], Sampling(max_new_tokens=1), priority=-priority, id=str(number))
    ended = []
    while engine.busy:
        ended += [output.id for output in engine.step() if output.completion is not None]
    assert ended == [str(number) for _, number in sorted(wanted)]


def test_the_last_one_loses_its_pages(model: Decoder) -> None:
    """By priority, then by arrival; it is the first to come back."""
    engine = tight(model, num_pages=9)
    sampling = Sampling(max_new_tokens=16)
    for id, priority in (("a", 1), ("b", 0), ("c", 1)):
        engine.add(list(range(1, 9)), sampling, priority=priority, id=id)
    ended = []
    while engine.busy:
        ended += [output.id for output in engine.step() if output.completion is not None]
    assert ended == ["a", "c", "b"] and engine.runner.scheduler.num_preempted >= 1


def test_a_long_prompt_does_not_hold_up_an_answer(model: Decoder) -> None:
    engine = Engine(model, batch_size=2, max_step_tokens=4)
    engine.add([1, 2], Sampling(max_new_tokens=30), id="short")
    engine.step()
    engine.add(list(range(1, 33)), Sampling(max_new_tokens=2), id="long")
    steps = []
    while engine.busy:
        steps.append([output.id for output in engine.step()])
    assert all("short" in step for step in steps[:29])
    assert [index for index, step in enumerate(steps) if "long" in step] == [10, 11], "three tokens beside each"


def test_damaged_logits_fail_the_request_alone(model: Decoder) -> None:
    """One token's embedding is not a number: only prompts with it fail, and their pages are not found again."""
    expected = Engine(model).generate(PROMPTS, GREEDY)
    broken = [20, 21, 22, 23, 199 - 1, 24]
    with torch.no_grad():
        kept = model.embedding.weight[198].clone()
        model.head.weight.data = model.head.weight.detach().clone()
        model.embedding.weight[198] = torch.nan
    engine = tight(model)
    found = []
    with pytest.raises(ModelError, match="prompt 2: the model's logits are not finite"):
        for index, completion in engine.as_completed([*PROMPTS[:2], broken, *PROMPTS[2:]], GREEDY):
            found.append((index, completion))
    assert [completion for _, completion in sorted(found, key=lambda pair: pair[0])] == expected
    engine.add(broken, GREEDY, id="bad")
    (output,) = engine.step()
    assert output.id == "bad" and isinstance(output.error, ModelError) and output.choice is None
    with torch.no_grad():
        model.embedding.weight[198] = kept
    assert engine.generate(broken, GREEDY) == Engine(model).generate(broken, GREEDY)
    account(engine)


def test_an_interrupted_step_is_computed_again(model: Decoder) -> None:
    expected, engine, calls = Engine(model).generate(PROMPTS, DRAWN), tight(model), 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls % 7 == 3:
            raise KeyboardInterrupt

    handle = model.layers[1].register_forward_pre_hook(interrupt)
    for prompt in PROMPTS:
        engine.add(prompt, GREEDY)
    interrupted = 0
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupted += 1
            account(engine)
    handle.remove()
    assert interrupted > 3
    assert engine.generate(PROMPTS, DRAWN) == expected


def test_an_interrupted_choice_loses_nobody(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of taking tokens: some have theirs, and some of those are done by it."""
    engine, sampling, calls = tight(model), Sampling(max_new_tokens=3, temperature=1.0, seed=1, n=3), 0
    accept = Request.accept

    def interrupt(request: Request, choice: Choice) -> None:
        nonlocal calls
        calls += 1
        accept(request, choice)
        if calls % 4 == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Request, "accept", interrupt)
    ids, ended = [engine.add(prompt, sampling) for prompt in PROMPTS], {}
    while engine.busy:
        try:
            outputs = engine.step()
        except KeyboardInterrupt:
            continue
        ended |= {output.id: output.completion for output in outputs if output.completion is not None}
        account(engine)
    found = [(ended[id].ids, *(o.ids for o in ended[id].others)) for id in ids]
    assert [[len(answer) for answer in answers] for answers in found] == [[3] * 3] * len(PROMPTS)


@pytest.mark.parametrize("name", ["llama", "phi3_long"])
def test_several_answers_share_a_prompt(tiny_model: Tiny, name: str) -> None:
    model = oarsmith.load_model(tiny_model(name), dtype="fp32", device="cpu")
    sampling = Sampling(max_new_tokens=20, temperature=1.0, seed=4, n=5, logprobs=1)
    results = [
        Engine(model, batch_size=8, block_size=4).generate(PROMPTS, sampling),
        tight(model).generate(PROMPTS, sampling),
        Engine(model, batch_size=1).generate(PROMPTS, sampling),
    ]
    for completions in zip(*results, strict=True):
        assert len({answer.ids for answer in (completions[0], *completions[0].others)}) == 5
        assert [c.ids for c in completions[1:]] == [completions[0].ids] * 2
        assert all([o.ids for o in c.others] == [o.ids for o in completions[0].others] for c in completions[1:])
    engine = Engine(model, batch_size=5, block_size=4)
    engine.add(list(range(1, 19)), sampling)
    engine.step()
    pool = engine.runner.scheduler.pool
    assert pool.num_pages - pool.num_free == 5, "18 tokens once"
    engine.step()
    assert pool.num_pages - pool.num_free == 5 + 4, "a last page for each"


def test_the_best_of_several_answers(model: Decoder) -> None:
    drawn = {"max_new_tokens": 12, "temperature": 1.3, "seed": 3, "logprobs": 0}
    (every,) = Engine(model).generate(PROMPTS[0], Sampling(**drawn, n=6))
    (best,) = Engine(model).generate(PROMPTS[0], Sampling(**drawn, n=2, best_of=6))

    def mean(completion: Completion) -> float:
        return sum(choice.logprob for choice in completion.logprobs) / completion.num_tokens

    ranked = sorted((every, *every.others), key=mean, reverse=True)
    assert [best.ids, *(other.ids for other in best.others)] == [answer.ids for answer in ranked[:2]]


def test_streams_share_the_engine(chain_model: Callable[..., Path]) -> None:
    engine = Engine(chain_model("one two three STOP four"), batch_size=2)
    streams = [engine.stream("\n") for _ in range(3)]
    given_up = engine.stream("\n")
    added = engine.add("\n")
    next(given_up)
    given_up.close()
    assert list(given_up) == [] and given_up.completion is None
    texts = [""] * 3
    for _ in range(20):
        for number, stream in enumerate(streams):
            texts[number] += next(stream, "")
    (expected,) = engine.generate("\n")
    assert texts == [expected.text] * 3 == ["one two three STOP four"] * 3
    outputs = [output for output in engine.step() if output.id == added]
    assert "".join(output.text for output in outputs) == expected.text and outputs[-1].completion == expected
    assert not engine.busy
    with pytest.raises(ConfigError, match="a stream is one answer"):
        engine.stream("\n", Sampling(n=2, temperature=1.0))


def test_a_forgotten_stream_and_a_left_loop_give_their_pages_back(chain_model: Callable[..., Path]) -> None:
    engine = Engine(chain_model("one two three STOP four"), prefix_caching=False)
    stream = engine.stream("\n")
    next(stream)
    del stream
    for _ in engine.as_completed(["\n"] * 30):
        break
    assert not engine.busy
    account(engine)
    assert engine.runner.scheduler.pool.num_free == engine.runner.scheduler.pool.num_pages


def test_known_prefixes_are_not_computed_again(model: Decoder) -> None:
    engine, plain = Engine(model, block_size=4), Engine(model, block_size=4, prefix_caching=False)
    prompt = list(range(1, 30))
    expected = plain.generate([prompt, [*prompt[:14], 3, 4, 5]], GREEDY)
    assert engine.generate(prompt, GREEDY) == expected[:1]
    scheduler = engine.runner.scheduler
    assert scheduler.num_found == 0
    assert engine.generate([prompt, [*prompt[:14], 3, 4, 5]], GREEDY) == expected
    assert scheduler.num_found == 28 + 12
    # A conversation goes on where its last answer ended.
    longer = [*prompt, *expected[0].ids, 7, 8]
    assert engine.generate(longer, GREEDY) == plain.generate(longer, GREEDY)
    assert scheduler.num_found == 28 + 12 + 48
    engine.forget()
    assert engine.generate(prompt, GREEDY) == expected[:1]
    assert scheduler.num_found == 28 + 12 + 48 and plain.runner.scheduler.num_found == 0


def test_what_others_compute_at_the_moment_is_waited_for(model: Decoder) -> None:
    """Many prompts with one beginning, all at once: it is computed once, by the first of them."""
    engine, beginning = Engine(model, block_size=4), list(range(1, 25))
    prompts = [[*beginning, 30 + number] for number in range(8)]
    assert engine.generate(prompts, GREEDY) == Engine(model, prefix_caching=False).generate(prompts, GREEDY)
    assert engine.runner.scheduler.num_found == 7 * 24


def test_the_first_token_may_be_the_last(model: Decoder) -> None:
    (answer,) = Engine(model).generate([5], Sampling(max_new_tokens=1))
    engine = tight(model)
    found = engine.generate([[5]] * 20, Sampling(stop_ids=answer.ids))
    assert all((a.ids, a.finish_reason) == (answer.ids, "stop") for a in found)
    account(engine)


def test_ids_and_sizes(model: Decoder) -> None:
    engine = tight(model)
    engine.add([1], id="x")
    with pytest.raises(ConfigError, match="a request with the id x is not finished"):
        engine.add([1], id="x")
    assert engine.abort("x") and not engine.abort("x") and not engine.busy and engine.step() == []
    with pytest.raises(DataError, match="y: the prompt is empty"):
        engine.add([], id="y")
    for name, value in (("num_pages", 0), ("block_size", 0), ("max_step_tokens", 3)):
        with pytest.raises(ConfigError, match=f"{name} must be at least"):
            tight(model, **{name: value})


def test_every_request_has_a_sampling_of_its_own(chain_model: Callable[..., Path]) -> None:
    """Words kept out, stops that wait for a least length, a constraint: each beside others without."""
    engine = Engine(chain_model("one two three STOP four"))
    plain = engine.generate("\n")[0].text
    two = engine.tokenizer.encode(" two")
    wanted = {
        "plain": Sampling(),
        "without": Sampling(bad_words=[" two"], max_new_tokens=6),
        "least": Sampling(stop=("one", "STOP"), min_new_tokens=5),
        "held": Sampling(regex="(yes|no)", max_new_tokens=6),
    }
    for id, sampling in wanted.items():
        engine.add("\n", sampling, id=id)
    found = finish(engine)
    assert found["plain"].text == plain
    assert two not in [list(found["without"].ids[at : at + len(two)]) for at in range(6)]
    assert found["least"].text == "one two three " and found["least"].num_tokens >= 5
    assert found["held"].text in ("yes", "no")


def test_a_higher_priority_takes_the_place_of_lower_ones(model: Decoder) -> None:
    """Rows or pages: the last of the lowest make way, as many as must, and go on afterwards."""
    sampling = Sampling(max_new_tokens=16)
    for options in ({"batch_size": 2}, {"num_pages": 8, "block_size": 4}):
        engine = Engine(model, prefix_caching=False, **options)
        expected = {id: engine.generate(prompt, sampling)[0].ids for id, prompt in LEVELS.items()}
        scheduler = engine.runner.scheduler
        for id in ("low 1", "low 2"):
            engine.add(LEVELS[id], sampling, id=id)
            engine.step()
        engine.add(LEVELS["high"], sampling, priority=1, id="high")
        outputs = engine.step()
        assert {request.id for request in scheduler.running} == {"low 1", "high"}
        assert "high" in {output.id for output in outputs}, "it was read at once"
        found = finish(engine)
        assert {id: found[id].ids for id in LEVELS} == expected
        assert scheduler.num_preempted > 0


LEVELS = {"low 1": [5, 17, 88, 3], "low 2": [9, 4], "high": list(range(20, 33))}


def test_nobody_makes_way_in_vain(model: Decoder) -> None:
    """Not for one that would not fit in any case, and not for one of the same priority."""
    engine = Engine(model, num_pages=12, block_size=4, batch_size=3)
    engine.add(list(range(1, 24)), Sampling(max_new_tokens=8), priority=2, id="highest")
    engine.add([1, 2], Sampling(max_new_tokens=8), id="low")
    engine.step()
    engine.add(list(range(101, 130)), Sampling(max_new_tokens=8), priority=1, id="high")
    engine.add([7, 8], Sampling(max_new_tokens=8), id="as low")
    for _ in range(3):
        engine.step()
        assert {request.id for request in engine.runner.scheduler.running} == {"highest", "low"}
    assert engine.runner.scheduler.num_preempted == 0
    finish(engine)


def test_a_search_makes_way_as_a_whole(model: Decoder) -> None:
    engine = Engine(model, batch_size=4)
    search, sampling = Sampling(max_new_tokens=12, num_beams=4), Sampling(max_new_tokens=4)
    expected = engine.generate([9, 4], search)[0].ids, engine.generate([5], sampling)[0].ids
    engine.add([9, 4], search, id="search")
    for _ in range(4):
        engine.step()
    engine.add([5], sampling, priority=1, id="high")
    engine.step()
    assert [request.id for request in engine.runner.scheduler.running] == ["high"]
    account(engine)
    found = finish(engine)
    assert (found["search"].ids, found["high"].ids) == expected


def test_a_higher_priority_is_read_before_a_long_prompt(model: Decoder) -> None:
    engine = Engine(model, batch_size=3, max_step_tokens=4)
    engine.add(list(range(1, 41)), Sampling(max_new_tokens=2), id="long")
    engine.step()
    engine.add(list(range(50, 58)), Sampling(max_new_tokens=1), id="equal")
    engine.add(list(range(60, 68)), Sampling(max_new_tokens=1), priority=1, id="high")
    assert [[output.id for output in engine.step()] for _ in range(2)] == [[], ["high"]]
    ended = [output.id for _ in range(20) for output in engine.step() if output.completion is not None]
    assert ended == ["long", "equal"]


def test_pages_behind_a_window_are_given_back(tiny_model: Tiny) -> None:
    """A window of 7 tokens: long texts live in a few pages, in a cache that could not hold one of them."""
    model = oarsmith.load_model(tiny_model("mistral"), dtype="fp32", device="cpu")
    prompts = [*PROMPTS, list(range(1, 50))]
    expected = Engine(model, prefix_caching=False).generate(prompts, DRAWN)
    engine = Engine(model, num_pages=10, block_size=4, batch_size=2, max_step_tokens=8)
    assert engine.generate(prompts, DRAWN) == expected
    account(engine)
    scheduler = engine.runner.scheduler
    for sampling in (GREEDY, Sampling(max_new_tokens=20, num_beams=2), Sampling(max_new_tokens=20, n=2, temperature=1)):
        engine.add(prompts[-1][:40], sampling)
        most = 0
        while engine.busy:
            engine.step()
            account(engine)
            tables = [request.table for request in scheduler.running]
            most = max([most, *(len(table.pages) - table.num_gone for table in tables)])
        assert most <= 4, "the window, and what a step brings"


def test_a_prefix_is_found_without_what_nobody_sees(tiny_model: Tiny) -> None:
    model = oarsmith.load_model(tiny_model("mistral"), dtype="fp32", device="cpu")
    prompt = list(range(1, 42))
    engine = Engine(model, num_pages=14, block_size=4, batch_size=1, max_step_tokens=8)
    (first,) = engine.generate(prompt, GREEDY)
    (other,) = engine.generate([9, 9, 9], Sampling(max_new_tokens=8))
    scheduler = engine.runner.scheduler
    pool = scheduler.pool
    # Its first pages are the ones that were given up.
    assert pool.open(60, prompt).pages == []
    found = scheduler.num_found
    assert engine.generate(prompt, GREEDY) == [first] and scheduler.num_found - found == 40
    assert other.num_tokens == 8


def test_the_size_of_the_cache_in_bytes(model: Decoder) -> None:
    # Keys and values of 2 layers with 2 heads of 8 numbers each, 4 bytes a number.
    page = 4 * 2 * 2 * 2 * 8 * 4
    for size, pages in ((10 * page, 10), (11 * page - 1, 10), (page, 1)):
        engine = Engine(model, block_size=4, cache_bytes=size)
        assert engine.runner.scheduler.pool.num_pages == pages
    guessing = Engine(model, block_size=4, cache_bytes=10 * page, speculative=model)
    assert guessing.runner.scheduler.pool.num_pages == 5, "a page holds keys of both"
    assert len(guessing.generate([5], GREEDY)[0].ids) == 20
    with pytest.raises(ConfigError, match="cache_bytes is 1,023; a page of 4 tokens has 1,024"):
        Engine(model, block_size=4, cache_bytes=page - 1).generate([5], GREEDY)
    with pytest.raises(ConfigError, match="num_pages and cache_bytes both"):
        Engine(model, num_pages=3, cache_bytes=10 * page)
