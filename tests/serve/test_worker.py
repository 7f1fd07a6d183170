"""The worker: what comes and goes at any moment leaves nothing behind; and the engine's death reaches everybody."""

import asyncio
import random

import pytest

from oarsmith.engine import Engine, Sampling
from oarsmith.errors import OarsmithError
from oarsmith.serve.callers import Call, Caller, LimitError, current_call
from oarsmith.serve.worker import BusyError, ClosedError, Worker

pytestmark = pytest.mark.usefixtures("few_threads")
NUM_ANSWERS = 10_000
COUNT = [{"role": "user", "content": "count"}]
LONG = Sampling(max_new_tokens=200, ignore_eos=True)


@pytest.fixture(scope="module")
def model(chain_model):
    return chain_model("one two three")


def engine_of(model, **options):
    return Engine(model, **{"num_threads": 1, "batch_size": 8, "block_size": 16, "num_pages": 64, **options})


def free_pages(engine):
    return engine.runner.scheduler.pool.num_free


def test_answers_given_up_at_random_moments_leave_nothing(model):
    draw = random.Random(7)

    async def one(worker, ids):
        answer = worker.submit(ids, Sampling(max_new_tokens=draw.choice((1, 3, 40))))
        try:
            fate = draw.random()
            if fate < 0.4:
                return
            if fate < 0.7:
                await asyncio.sleep(draw.random() * 0.02)
                return
            async for _ in answer:
                if draw.random() < 0.3:
                    return
        finally:
            answer.close()
            answer.close()

    async def main():
        engine = engine_of(model)
        ids = engine.encode(COUNT)
        worker = Worker(engine, max_waiting=200)
        endings = []
        worker.on_end = lambda answer, ending: endings.append(ending)
        worker.start()
        every = await worker.call(free_pages)
        gate = asyncio.Semaphore(100)

        async def held():
            async with gate:
                await one(worker, ids)

        await asyncio.gather(*(held() for _ in range(NUM_ANSWERS)))
        while await worker.call(lambda engine: engine.busy):
            await asyncio.sleep(0.01)
        assert worker.num_open == 0
        assert await worker.call(free_pages) == every
        assert len(endings) == NUM_ANSWERS and {"aborted", "stop"} <= set(endings)
        assert await worker.close(1.0)
        assert not worker.alive

    asyncio.run(main())


def test_a_full_queue_refuses_and_counts_what_is_open(model):
    async def main():
        engine = engine_of(model, batch_size=2)
        ids = engine.encode(COUNT)
        worker = Worker(engine, max_waiting=1)
        worker.start()
        answers = [worker.submit(ids, LONG) for _ in range(3)]
        assert not worker.ready and worker.accepting
        with pytest.raises(BusyError):
            worker.submit(ids, LONG)
        answers[0].close()
        worker.submit(ids, LONG).close()
        assert not await worker.close(0.0)
        for answer in answers[1:]:
            with pytest.raises(ClosedError):
                await answer.completion()
        with pytest.raises(ClosedError):
            worker.submit(ids, LONG)

    asyncio.run(main())


def test_what_is_open_when_the_service_ends_is_finished(model):
    async def main():
        engine = engine_of(model)
        worker = Worker(engine, max_waiting=100)
        worker.start()
        answers = [worker.submit(engine.encode(COUNT), Sampling(max_new_tokens=20)) for _ in range(50)]
        assert await worker.close(60.0)
        assert {(await answer.completion()).text for answer in answers} == {"one two three"}

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_engines_death_reaches_everybody(model):
    async def main():
        engine = engine_of(model)
        ids = engine.encode(COUNT)
        worker = Worker(engine, max_waiting=100)
        died = []
        worker.on_death = lambda: died.append(True)
        worker.start()
        answers = [worker.submit(ids, LONG) for _ in range(20)]

        def kill(engine):
            raise RuntimeError("a bug")

        with pytest.raises(ClosedError):
            await asyncio.wait_for(worker.call(kill), 20)
        for answer in answers:
            with pytest.raises(OarsmithError):
                await asyncio.wait_for(answer.completion(), 20)
        assert died == [True] and not worker.alive and worker.num_open == 0
        with pytest.raises(ClosedError):
            worker.submit(ids, LONG)
        with pytest.raises(ClosedError):
            await worker.call(lambda engine: None)
        # Its exception is told by this test's end, not in the next one.
        await asyncio.to_thread(worker._thread.join, 10)

    asyncio.run(main())


def test_an_answer_counts_for_the_caller_that_asked(model):
    async def main():
        engine = engine_of(model)
        ids = engine.encode(COUNT)
        worker = Worker(engine, max_waiting=100)
        worker.start()
        caller = Caller("a", concurrency=1, tokens_per_minute=1000)
        call = Call("1", caller, keep_text=True)
        current_call.set(call)
        answer = worker.submit(ids, Sampling(max_new_tokens=20))
        with pytest.raises(LimitError):
            worker.submit(ids, LONG)
        completion = await answer.completion()
        assert caller.num_open == 0
        assert (call.num_prompt_tokens, call.num_tokens) == (len(ids), completion.num_tokens)
        assert (call.prompts, call.answers) == ([ids], ["one two three"])
        await worker.close(1.0)

    asyncio.run(main())


def test_a_request_that_breaks_something_ends_nothing_else(model, monkeypatch):
    async def main():
        engine = engine_of(model)
        ids, add = engine.encode(COUNT), engine.add

        def broken(prompt, sampling, **more):
            if sampling.seed == 13:
                raise RuntimeError("a fault")
            return add(prompt, sampling, **more)

        monkeypatch.setattr(engine, "add", broken)
        worker = Worker(engine, max_waiting=10)
        worker.start()
        with pytest.raises(OarsmithError, match="cannot be taken"):
            await worker.submit(ids, Sampling(seed=13)).completion()
        assert (await worker.submit(ids, Sampling()).completion()).text == "one two three"
        assert worker.alive and worker.num_open == 0
        await worker.close(1.0)

    asyncio.run(main())
