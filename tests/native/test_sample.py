"""The compiled sampler takes the tokens that the PyTorch one takes."""

from __future__ import annotations

import math
import random
from array import array
from pathlib import Path

import pytest
import torch
from torch import Tensor

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith.compiling import BuildError
from oarsmith.engine.draws import Draws
from oarsmith.engine.native_backend import sampling_row
from oarsmith.engine.sampler import choose
from oarsmith.engine.sampling import Sampling
from oarsmith.engine.state import SamplingState
from oarsmith.native.library import load
from oarsmith.native.lower import lower
from oarsmith.native.sample import Row, Sampled
from oarsmith.native.step import Step

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    folder: Path = tmp_path_factory.mktemp("model")
    program, arena = lower(Bench("llama", ROWS["llama"], folder).model(), "fp32")
    return Step(program, arena, threads=3, num_pages=1, page_size=16, num_sequences=1)


def take(step: Step, logits_NV: Tensor, rows: list[Row]) -> list[Sampled]:
    size = logits_NV.shape[1] * 4
    return step.sample([logits_NV.data_ptr() + size * index for index in range(len(rows))], rows)


def setting(draw: random.Random, size: int) -> Sampling:
    """Some filters, penalties and biases, or none."""
    chosen = {
        "temperature": draw.choice([0.0, 0.3, 0.7, 1.0, 1.7]),
        "top_k": draw.choice([0, 1, 5, 40, size, size + 5]),
        "top_p": draw.choice([0.1, 0.6, 0.95, 0.9999]),
        "min_p": draw.choice([0.02, 0.3]),
        "typical_p": draw.choice([0.2, 0.9]),
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": -0.3,
        "logit_bias": {3: 4.0, 7: -100.0},
        "min_new_tokens": 9,
        "logprobs": draw.choice([0, 3, size + 9]),
    }
    kept = {name: value for name, value in chosen.items() if draw.random() < 0.4}
    return Sampling(**{"temperature": 1.0, **kept})


class Some:
    """A constraint of which half the tokens are left."""

    def __init__(self, size: int) -> None:
        self.mask = bytearray(index % 2 for index in range(size))

    def allowed(self) -> bytearray:
        return self.mask

    def accept(self, token: int) -> None: ...

    def fork(self) -> Some:
        return self


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 8.0])
def test_tokens_and_probabilities(step: Step, spread: float) -> None:
    draw, generator = random.Random(int(spread * 10)), torch.Generator().manual_seed(3)
    size, different, compared = step.program.facts.vocab_size, 0, 0
    for turn in range(40):
        logits_NV = torch.randn(5, size, generator=generator) * spread
        if turn % 2:
            logits_NV = (logits_NV * 2).round() / 2  # many ties
        twins = []
        for row in range(5):
            sampling, answer = setting(draw, size), [draw.randrange(size) for _ in range(6)]
            pair = []
            for _ in range(2):
                grammar = Some(size) if row == 4 else None
                state = SamplingState(
                    sampling, [1, 2, 3, 3], Draws(f"{turn} {row}"), vocab_size=size, grammar=grammar, stop_ids=[2, 11]
                )
                for token in answer:
                    state.accept(token)
                pair.append(state)
            twins.append(pair)
        expected = choose(logits_NV, [state for state, _ in twins])
        found = take(step, logits_NV, [sampling_row(state) for _, state in twins])
        for one, other in zip(expected, found, strict=True):
            compared += 1
            different += one.token != other.token
            if one.token == other.token and one.logprob is not None:
                assert other.logprob == pytest.approx(one.logprob, abs=1e-5)
                assert [value for _, value in other.top] == pytest.approx([value for _, value in one.top], abs=1e-5)
    # Sums in another order: a draw at the very border of two tokens may fall to the other side.
    assert different <= compared // 100


def test_what_is_no_number_is_told(step: Step) -> None:
    size = step.program.facts.vocab_size
    logits_NV = torch.randn(5, size)
    logits_NV[0, 17], logits_NV[1, size - 1], logits_NV[2] = math.nan, math.inf, -math.inf
    logits_NV[3, :50] = -math.inf
    found = take(step, logits_NV, [Row() for _ in range(5)])
    assert [one.token for one in found[:3]] == [None] * 3
    assert [one.token for one in found[3:]] == logits_NV[3:].argmax(-1).tolist()


def test_all_that_is_left_may_not_be_banned(step: Step) -> None:
    size = step.program.facts.vocab_size
    logits_NV = torch.randn(1, size)
    everything = array("q", [*range(size), *range(size)])
    assert take(step, logits_NV, [Row(banned=everything)])[0].token == int(logits_NV.argmax())
