"""Attention of rows beside one another gives what attention of the same tokens as documents gives."""

import pytest
import torch

from oarsmith import kernels
from oarsmith.kernels import Scores

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR)


RULES = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "alibi": {"bias_HP": (-torch.tensor([0.5, 0.25, 0.1, 0.05, 1.0, 2.0])[:, None] * torch.arange(13.0)).flip(-1)},
    "sinks": {"sinks_H": torch.tensor([0.3, -1.0, 2.0, 0.0, 1.0, 5.0])},
    "sinks and window": {"sinks_H": torch.zeros(6), "window": 4},
}


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_documents(rule, groups):
    rows, size, heads, dim, value_dim = 3, 13, 6, 8, 5
    starts, num_tokens = [0, 4, 9], 4
    q, k, v = (
        normal(rows, num_tokens, heads, dim),
        normal(rows, size, groups, dim),
        normal(rows, size, groups, value_dim),
    )
    positions = torch.tensor(starts)[:, None] + torch.arange(num_tokens)
    scores = Scores(0.3, **RULES[rule])
    found = kernels.row_attention(q, k, v, positions, scores)
    for row, start in enumerate(starts):
        stop = start + num_tokens
        expected = kernels.attention(q[row], k[row, :stop], v[row, :stop], [(0, num_tokens, 0, stop, 0)], scores)
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-6)


def test_what_lies_behind_is_not_seen():
    q, k, v = normal(1, 2, 4, 8), normal(1, 9, 2, 8), normal(1, 9, 2, 8)
    positions = torch.tensor([[3, 4]])
    found = kernels.row_attention(q, k, v, positions, Scores(0.5))
    k[:, 5:], v[:, 5:] = 1e4, -1e4
    assert torch.equal(found, kernels.row_attention(q, k, v, positions, Scores(0.5)))
