"""Logits to tokens.

Shapes: N sequences, V vocabulary, C candidates that may be drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oarsmith.engine.sampling import Sampling

# Top-p alone looks at this many of the likeliest tokens first; only where they do not reach top_p is the whole
# vocabulary sorted. At V = 49,152 a sort is 11 ms on a CPU core, this 1 ms.
HEAD = 1024


def penalize(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Logits with those of seen tokens made smaller (Keskar et al. 2019, section 4.1; signs as transformers)."""
    return torch.where(seen_NV, torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty), logits_NV)


def choose(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Tensor:
    """A token [N] for each row.

    Args:
        logits_NV: float32, the repetition penalty already applied.
        uniform_N: float64 in [0, 1), one draw a row; not looked at when greedy.
    """
    if sampling.temperature == 0:
        return logits_NV.argmax(-1)
    scaled_NV = logits_NV / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return draw(scaled_NV.softmax(-1), uniform_N)
    probs_NC, ids_NC, complete_N = candidates(scaled_NV, sampling.top_k, sampling.top_p, HEAD)
    tokens_N = _pick(probs_NC, ids_NC, uniform_N)
    rest_N = ~complete_N
    if bool(rest_N.any()):
        # Row by row decisions: what is drawn for one sequence does not depend on the others.
        probs_NC, ids_NC, _ = candidates(scaled_NV[rest_N], sampling.top_k, sampling.top_p, scaled_NV.shape[1])
        tokens_N[rest_N] = _pick(probs_NC, ids_NC, uniform_N[rest_N])
    return tokens_N


def candidates(scaled_NV: Tensor, top_k: int, top_p: float, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that top-k and top-p leave, likeliest first.

    A token stays while the probability of the likelier ones is below top_p (Holtzman et al. 2020).

    Returns:
        Probabilities [N, C] (0: excluded; they need not add up to 1), token ids [N, C], and for each row whether
        these are all: with top_k = 0 the first ``head`` tokens may fall short of top_p.
    """
    size = scaled_NV.shape[1]
    count = min(top_k or head, size)
    top_NC, ids_NC = scaled_NV.topk(count, dim=-1)
    mass_N1 = (top_NC if top_k else scaled_NV).logsumexp(-1, keepdim=True)
    probs_NC = (top_NC - mass_N1).exp().double()
    through_NC = probs_NC.cumsum(-1)
    kept_NC = torch.where(through_NC - probs_NC < top_p, probs_NC, 0.0)
    kept_NC[:, 0] = probs_NC[:, 0]
    complete_N = through_NC[:, -1] >= top_p
    return kept_NC, ids_NC, complete_N if not top_k and count < size else torch.ones_like(complete_N)


def _pick(probs_NC: Tensor, ids_NC: Tensor, uniform_N: Tensor) -> Tensor:
    return ids_NC.gather(1, draw(probs_NC, uniform_N)[:, None])[:, 0]


def draw(probs_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """An index [N] with probability proportional to its entry: the inverse of the distribution function.

    One uniform number a draw, in float64: a float32 sum over a vocabulary loses the unlikely tokens.
    """
    through_NC = probs_NC.double().cumsum(-1)
    target_N1 = uniform_N[:, None] * through_NC[:, -1:]
    # right=True steps over entries of probability 0; the product may round up to the total itself.
    index_N = torch.searchsorted(through_NC, target_N1, right=True)[:, 0]
    last_N = probs_NC.shape[1] - 1 - (probs_NC.flip(-1) > 0).long().argmax(-1)
    return torch.minimum(index_N, last_N)
