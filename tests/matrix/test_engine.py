"""The engine's distributions are the forward pass's, in every family.

Whole prompts, chunks, pages that were lost, known prefixes, guessed tokens, windows and rotations that end within the
answer.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from oarsmith import Engine, Sampling
from oarsmith.engine import Completion
from oarsmith.errors import ConfigError
from oarsmith.models.caching import CacheRules
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec_position import DynamicScaling, Rope, SteppedScaling
from oracle_drafter import OracleDrafter

from .bench import Bench
from .rows import ROWS

# fp32, sums in another order; logits are of size 1 to 30.
TOLERANCE = 1e-4
NEW = 24


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@torch.no_grad()
def answer_logprobs(model: Decoder, prompt: list[int], answer: list[int]) -> Tensor:
    """Distributions of an answer's tokens without pages: a forward pass over all of it where that says the same."""
    ids, start = [*prompt, *answer[:-1]], len(prompt) - 1
    scalings = {p.scaling for layer in model.spec.layers if isinstance(p := layer.attention.position, Rope)}
    if CacheRules.of(model.spec).reread_after is not None:
        rows = [model(torch.tensor([ids[: end + 1]]))[0, -1] for end in range(start, len(ids))]
        return torch.stack(rows).log_softmax(-1)
    if not any(isinstance(scaling, (DynamicScaling, SteppedScaling)) for scaling in scalings):
        return model(torch.tensor([ids]))[0, start:].log_softmax(-1)
    cache, rows = model.new_cache(1, len(ids)), []
    for piece in (prompt, *([token] for token in answer[:-1])):
        hidden = model.hidden(torch.tensor(piece), cache.extend([len(piece)]), cache)
        rows.append(model.logits(hidden[-1:])[0])
    return torch.stack(rows).log_softmax(-1)


def table(choices: tuple, size: int) -> Tensor:
    found = torch.full((len(choices), size), torch.nan)
    for row, choice in enumerate(choices):
        ids, values = zip(*choice.top, strict=True)
        found[row, list(ids)] = torch.tensor(values)
        assert choice.logprob == found[row, choice.token]
    return found


def check(model: Decoder, completion: Completion) -> None:
    size = model.spec.vocab_size
    prompt, answer = list(completion.prompt_ids), list(completion.ids)
    close = {"rtol": 0, "atol": TOLERANCE}
    assert len(answer) == NEW
    torch.testing.assert_close(table(completion.logprobs, size), answer_logprobs(model, prompt, answer), **close)
    if completion.prompt_logprobs is not None:
        expected = model(torch.tensor([prompt]))[0, :-1].log_softmax(-1)
        torch.testing.assert_close(table(completion.prompt_logprobs, size), expected, **close)


@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_distributions(row: str, tmp_path: Path) -> None:
    bench = Bench(row, ROWS[row], tmp_path)
    model = bench.model()
    size, rules = model.spec.vocab_size, CacheRules.of(model.spec)
    prompts = [bench.document(length, seed) for seed, length in enumerate((9, 23, 33, 10, 24))]
    prompts = [prompt[: model.spec.max_positions - NEW] for prompt in prompts]
    everything = Sampling(max_new_tokens=NEW, ignore_eos=True, logprobs=size, prompt_logprobs=size)
    plain = Engine(model, batch_size=5).generate(prompts, everything)
    for completion in plain:
        check(model, completion)

    # Chunks of at most 7 tokens over pages of 4; two of the three that run at a time have to leave again and again.
    tight = Engine(model, batch_size=3, num_pages=18, block_size=4, max_step_tokens=7)
    for completion in tight.generate(prompts, everything):
        check(model, completion)
    scheduler = tight.runner.scheduler
    # Where every layer has a window, pages behind it are given back in time.
    assert scheduler.num_preempted > 0 or rules.window is not None
    assert scheduler.pool.num_free == 18

    # Tokens that are guessed, rightly but for every fourth: those leave nothing behind.
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True, logprobs=size)
    if rules.revocable:
        guessing = Engine(model, batch_size=3, num_pages=24, block_size=4, max_step_tokens=15, speculative="ngram")
        guessing.runner._drafter = OracleDrafter(plain, size)
        for completion, expected in zip(guessing.generate(prompts, sampling), plain, strict=True):
            check(model, completion)
            assert completion.ids == expected.ids
        assert 0 < guessing.runner.num_accepted < guessing.runner.num_drafted
    else:
        with pytest.raises(ConfigError, match="guesses could not be taken back"):
            Engine(model, speculative="ngram")

    # The same beginnings again: the first of them found, and one that goes on otherwise.
    roomy = Engine(model, batch_size=2, num_pages=60, block_size=4, max_step_tokens=16)
    other = [*prompts[2][:18], *bench.document(9, 77)][: len(prompts[2])] if bench.prefix_rule is None else prompts[2]
    for prompt in (prompts[2], prompts[2], other):
        check(model, roomy.generate(prompt, sampling)[0])
    assert (roomy.runner.scheduler.num_found > 0) == rules.prefixes
