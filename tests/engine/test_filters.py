"""Filters against transformers' own, and the draws against their probabilities."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from oarsmith.engine import Sampling
from oarsmith.engine.filters import HEAD, Settings, candidates, draw, sample

SETTINGS = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
    for temperature, top_k, top_p, min_p, typical_p in [
        (0.8, 0, 1.0, 0.0, 1.0),
        (0.8, 1, 1.0, 0.0, 1.0),
        (0.8, 7, 1.0, 0.0, 1.0),
        (1.3, 5000, 1.0, 0.0, 1.0),
        (0.8, HEAD, 0.999, 0.0, 1.0),
        (0.8, 0, 0.95, 0.0, 1.0),
        (1.0, 0, 0.5, 0.0, 1.0),
        (1.0, 0, 1e-4, 0.0, 1.0),
        (1.0, 0, 1.0, 0.02, 1.0),
        (1.0, 0, 1.0, 1.0, 1.0),
        (1.0, 0, 1.0, 1e-9, 1.0),
        (1.1, 0, 1.0, 0.0, 0.9),
        (1.1, 0, 1.0, 0.0, 0.2),
        (0.7, 40, 0.9, 0.05, 1.0),
        (0.7, 40, 0.9, 0.05, 0.8),
        (2.0, 0, 0.97, 0.001, 0.95),
    ]
]


def random_logits(rows, size, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def expected_probs(logits_1V, sampling):
    """What transformers would draw from, in float64."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    return warpers(None, logits_1V.double().clone()).softmax(-1)


def spread(probs_NC, ids_NC, size):
    """Candidates as a distribution over the whole vocabulary."""
    full_NV = torch.zeros(len(probs_NC), size, dtype=torch.float64).scatter_(1, ids_NC, probs_NC)
    return full_NV / full_NV.sum(-1, keepdim=True)


def settings_of(samplings):
    return Settings.of(samplings, torch.device("cpu"))


@pytest.mark.parametrize("size", [11, 61, HEAD + 403])
def test_candidates_are_those_of_transformers(size):
    """All settings in one batch, each row with its own."""
    logits_NV = random_logits(len(SETTINGS), size)
    probs_NC, ids_NC, complete_N = candidates(logits_NV, settings_of(SETTINGS), size)
    assert complete_N.all()
    expected_NV = torch.cat([expected_probs(row[None], one) for row, one in zip(logits_NV, SETTINGS, strict=True)])
    torch.testing.assert_close(spread(probs_NC, ids_NC, size), expected_NV, atol=1e-12, rtol=1e-9)


def test_tokens_as_likely_as_the_last_of_top_k_stay():
    logits_1V = torch.tensor([[1.0, 2.0, 3.0, 2.0, 0.0, 2.0]])
    sampling = Sampling(temperature=1.0, top_k=2)
    probs_NC, ids_NC, _ = candidates(logits_1V, settings_of([sampling]), 6)
    torch.testing.assert_close(spread(probs_NC, ids_NC, 6), expected_probs(logits_1V, sampling))
    # Equal ones go on beyond the head: it must say so.
    assert not candidates(torch.zeros(1, 2000), settings_of([sampling]), HEAD)[2].any()
    assert candidates(random_logits(1, 2000), settings_of([sampling]), HEAD)[2].all()


@pytest.mark.parametrize("size", [HEAD + 1, 3000])
def test_the_head_alone_gives_the_same_candidates_where_it_says_so(size):
    peaked_NV = random_logits(len(SETTINGS), size) * 2
    masked_NV = peaked_NV.clone()
    masked_NV[:, 90:] = -torch.inf
    for logits_NV in (peaked_NV, peaked_NV / 1000, masked_NV):
        probs_NC, ids_NC, complete_N = candidates(logits_NV, settings_of(SETTINGS), HEAD)
        whole = candidates(logits_NV, settings_of(SETTINGS), size)
        got_NV, expected_NV = spread(probs_NC, ids_NC, size), spread(whole[0], whole[1], size)
        # the normaliser is a float32 sum
        torch.testing.assert_close(got_NV[complete_N], expected_NV[complete_N], atol=1e-7, rtol=1e-6)
    # Of 90 possible tokens nothing can lie beyond the head.
    assert complete_N.all()
    assert candidates(peaked_NV, settings_of(SETTINGS), HEAD)[2].tolist()[1:3] == [True, True]


def test_a_token_does_not_depend_on_the_other_rows():
    mixed_NV = torch.cat((random_logits(8, 3000) * 2, torch.zeros(4, 3000), random_logits(4, 3000, seed=1)))
    # bf16 makes many of them equal
    for logits_NV in (mixed_NV, mixed_NV.bfloat16().float()):
        uniform_N = torch.rand(16, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        together = sample(logits_NV, settings_of(SETTINGS), uniform_N).tolist()
        alone = [
            int(sample(logits_NV[n : n + 1], settings_of(SETTINGS[n : n + 1]), uniform_N[n : n + 1]))
            for n in range(len(SETTINGS))
        ]
        assert together == alone


@pytest.mark.parametrize("sampling", [one for one in SETTINGS if one.top_k < 5000])
def test_tokens_are_drawn_with_their_probabilities(sampling):
    logits_1V, num_draws = random_logits(1, 12, seed=2) / 2, 20_000
    uniform_N = torch.rand(num_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens_N = sample(logits_1V.expand(num_draws, -1), settings_of([sampling] * num_draws), uniform_N)
    seen_V = torch.bincount(tokens_N, minlength=12).double() / num_draws
    expected_V = expected_probs(logits_1V, sampling)[0]
    assert (seen_V[expected_V == 0] == 0).all()
    # five standard deviations of a frequency
    assert ((seen_V - expected_V).abs() <= 5 * (expected_V * (1 - expected_V) / num_draws).sqrt() + 1e-9).all()


def test_draw_never_takes_what_has_no_probability():
    probs_NC = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]).expand(4, -1)
    uniform_N = torch.tensor([0.0, 0.3 - 1e-9, 0.31, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs_NC, uniform_N).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("temperature", [1e-5, 1e6])
def test_extreme_temperatures_give_numbers(temperature):
    logits_NV = random_logits(2, 50)
    uniform_N = torch.tensor([0.0, 0.999], dtype=torch.float64)
    for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_p=0.9)):
        tokens_N = sample(logits_NV, settings_of([sampling] * 2), uniform_N)
        assert temperature > 1 or torch.equal(tokens_N, logits_NV.argmax(-1))
