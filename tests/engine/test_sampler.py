"""Filters against transformers' own, and the draws against their probabilities."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from oarsmith.engine import Sampling
from oarsmith.engine.sampler import HEAD, candidates, choose_alike, draw, penalize


def random_logits(rows, size, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def spread(probs_NC, ids_NC, size):
    """Candidates as a distribution over the whole vocabulary."""
    full_NV = torch.zeros(len(probs_NC), size, dtype=torch.float64).scatter_(1, ids_NC, probs_NC)
    return full_NV / full_NV.sum(-1, keepdim=True)


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 1e-4])
@pytest.mark.parametrize("top_k", [0, 1, 7, 5000])
@pytest.mark.parametrize("size", [61, HEAD + 403])
def test_candidates_are_those_of_transformers(top_k, top_p, size):
    logits_NV = random_logits(5, size)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.8)])
    if top_k:
        warpers.append(TopKLogitsWarper(min(top_k, size)))
    warpers.append(TopPLogitsWarper(top_p))
    expected_NV = warpers(None, logits_NV.clone()).softmax(-1).double()
    probs_NC, ids_NC, complete_N = candidates(logits_NV / 0.8, top_k, top_p, head=size)
    assert complete_N.all()
    # float32 softmax on both sides
    torch.testing.assert_close(spread(probs_NC, ids_NC, size), expected_NV, atol=1e-6, rtol=1e-4)


def test_the_head_alone_gives_the_same_candidates_where_it_says_so():
    peaked_1V, flat_1V = random_logits(1, 5000) * 2, torch.zeros(1, 5000)
    logits_NV = torch.cat((peaked_1V, flat_1V))
    probs_NC, ids_NC, complete_N = candidates(logits_NV, 0, 0.9, HEAD)
    assert complete_N.tolist() == [True, False]
    whole = candidates(logits_NV, 0, 0.9, 5000)
    torch.testing.assert_close(
        spread(probs_NC, ids_NC, 5000)[0], spread(whole[0], whole[1], 5000)[0], atol=1e-9, rtol=1e-6
    )


def test_a_token_does_not_depend_on_the_other_rows():
    sampling = Sampling(temperature=1.0, top_p=0.9)
    logits_NV = torch.cat((random_logits(4, 5000) * 2, torch.zeros(2, 5000), random_logits(3, 5000, seed=1)))
    uniform_N = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    together = choose_alike(logits_NV, sampling, uniform_N).tolist()
    alone = [int(choose_alike(logits_NV[row : row + 1], sampling, uniform_N[row : row + 1])) for row in range(9)]
    assert together == alone


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1.3), Sampling(temperature=0.7, top_p=0.8), Sampling(temperature=1.0, top_k=4, top_p=0.9)],
)
def test_tokens_are_drawn_with_their_probabilities(sampling):
    logits_1V, num_draws = random_logits(1, 12, seed=2) / 2, 40_000
    uniform_N = torch.rand(num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens_N = choose_alike(logits_1V.expand(num_draws, -1), sampling, uniform_N)
    seen_V = torch.bincount(tokens_N, minlength=12).double() / num_draws
    scaled = logits_1V / sampling.temperature
    probs_NC, ids_NC, _ = candidates(scaled, sampling.top_k, sampling.top_p, 12)
    expected_V = spread(probs_NC, ids_NC, 12)[0]
    assert (seen_V[expected_V == 0] == 0).all()
    # five standard deviations of a frequency over 40,000 draws
    assert ((seen_V - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / num_draws).sqrt()).all()


def test_draw_never_takes_what_has_no_probability():
    probs_NC = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(4, -1)
    uniform_N = torch.tensor([0.0, 0.3 - 1e-9, 0.31, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs_NC, uniform_N).tolist() == [1, 1, 3, 3]


def test_zero_temperature_takes_the_likeliest():
    logits_NV = random_logits(3, 50)
    greedy = choose_alike(logits_NV, Sampling(top_k=2, top_p=0.1), torch.zeros(3, dtype=torch.float64))
    assert greedy.tolist() == logits_NV.argmax(-1).tolist()


def test_the_penalty_is_that_of_transformers():
    logits_NV = random_logits(2, 30)
    seen = torch.tensor([[1, 1, 4, 7], [0, 29, 3, 3]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits_NV.clone())
    seen_NV = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, seen, True)
    assert torch.equal(penalize(logits_NV, seen_NV, 1.7), expected)
