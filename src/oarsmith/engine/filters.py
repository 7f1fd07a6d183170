"""Temperature, the filters of the candidates, and the draw; every row has settings of its own.

Shapes: N sequences, V vocabulary, C candidates, the likeliest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from oarsmith.engine.sampling import Sampling

# Filters look at this many of the likeliest tokens first; only where those may not be all that the filters leave is
# the whole vocabulary sorted. At V = 49,152 a sort is 3.8 ms on a CPU core, this 0.35 ms.
HEAD = 512


@dataclass(frozen=True)
class Settings:
    """Columns of the settings of N rows, each [N]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device) -> Settings:
        def column(name: str) -> Tensor:
            dtype = torch.int64 if name == "top_k" else torch.float64
            return torch.tensor([getattr(sampling, name) for sampling in samplings], dtype=dtype, device=device)

        return cls(*(column(entry.name) for entry in fields(cls)))

    def at(self, rows: Tensor) -> Settings:
        """Those of some rows (indices or a mask)."""
        return Settings(*(getattr(self, entry.name)[rows] for entry in fields(self)))


def sample(logits_NV: Tensor, settings: Settings, uniform_N: Tensor) -> Tensor:
    """A token [N] for each row.

    How a row is worked on follows from its own settings and logits, so no row depends on another.

    Args:
        logits_NV: float32; -inf: cannot be drawn.
        uniform_N: float64 in [0, 1), one draw a row.
    """
    tokens_N = torch.zeros(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
    for rows, probs_NC, ids_NC in _remaining(logits_NV, settings):
        index_N = draw(probs_NC, uniform_N[rows])
        tokens_N[rows] = index_N if ids_NC is None else ids_NC.gather(1, index_N[:, None])[:, 0]
    return tokens_N


def distribution(logits_NV: Tensor, settings: Settings) -> Tensor:
    """The probabilities [N, V] by which ``sample`` draws, float64."""
    probs_NV = torch.zeros(logits_NV.shape, dtype=torch.float64, device=logits_NV.device)
    for rows, probs_NC, ids_NC in _remaining(logits_NV, settings):
        own_NC = probs_NC.double()
        own_NC = own_NC / own_NC.sum(-1, keepdim=True)
        probs_NV[rows] = own_NC if ids_NC is None else torch.zeros_like(probs_NV[rows]).scatter(1, ids_NC, own_NC)
    return probs_NV


def draw_after(probs_V: Tensor, token: int, drafted_V: Tensor, uniform: float) -> int:
    """A token by ``probs_V``, where ``token`` was drawn by ``drafted_V``: that one as often as possible.

    It stays with probability min(1, p / q); else one is drawn from what p has more than q (Leviathan et al. 2023,
    section 2.3; Chen et al. 2023, theorem 1). Of the number that decided against it, the rest is as good as a new one.
    """
    kept = float(probs_V[token] / drafted_V[token])
    if uniform < kept:
        return token
    more_V = (probs_V - drafted_V).clamp_min(0)
    # Nothing is left where both are the same but for rounding.
    rest_V = more_V if bool(more_V.any()) else probs_V
    again = torch.tensor([(uniform - kept) / (1 - kept)], dtype=torch.float64, device=probs_V.device)
    return int(draw(rest_V[None], again))


def _remaining(logits_NV: Tensor, settings: Settings) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Every row once, in groups: rows, probabilities [n, C] (they need not add up to 1) of tokens, and the tokens' ids
    [n, C]; None: those of the vocabulary in its order."""
    size = logits_NV.shape[1]
    bounded_N = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    filtered_N = bounded_N | (settings.typical_p < 1)
    rows = (~filtered_N).nonzero()[:, 0]
    if len(rows):
        yield rows, (logits_NV[rows] / settings.temperature[rows].float()[:, None]).softmax(-1), None
    rows = filtered_N.nonzero()[:, 0]
    for head in (min(HEAD, size), size):
        if len(rows):
            probs_NC, ids_NC, complete_N = candidates(logits_NV[rows], settings.at(rows), head)
            yield rows[complete_N], probs_NC[complete_N], ids_NC[complete_N]
            rows = rows[~complete_N]


def candidates(logits_NV: Tensor, settings: Settings, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that the filters leave, likeliest first, among the ``head`` likeliest ones.

    Returns:
        Probabilities [N, C] (0: excluded; they need not add up to 1), token ids [N, C], and for each row whether
        the filters leave no token beyond these.
    """
    whole = head == logits_NV.shape[1]
    top_NC, ids_NC = logits_NV.sort(dim=-1, descending=True, stable=True) if whole else logits_NV.topk(head, dim=-1)
    temperature_N1 = settings.temperature[:, None]
    first_N1 = top_NC[:, :1].double()
    scaled_NC = (top_NC.double() - first_N1) / temperature_N1
    if whole:
        mass_N1 = scaled_NC.logsumexp(-1, keepdim=True)
    else:
        scaled_NV = (logits_NV - top_NC[:, :1]) / temperature_N1.float()
        mass_N1 = scaled_NV.logsumexp(-1, keepdim=True).double()
    by_k_NC, k_complete_N = _top_k(scaled_NC, settings.top_k)
    mass_N1 = torch.where(settings.top_k[:, None] > 0, _mass(scaled_NC, by_k_NC), mass_N1)
    probs_NC = (scaled_NC - mass_N1).exp() * by_k_NC
    # A token stays while the probability of the likelier ones is below top_p (Holtzman et al. 2020).
    through_NC = probs_NC.cumsum(-1)
    top_p_N1 = torch.where(settings.top_p < 1, settings.top_p, torch.inf)[:, None]
    by_p_NC = through_NC - probs_NC < top_p_N1
    by_p_NC[:, 0] = True
    # The first candidate's is 0, so these are shares of the likeliest one's probability.
    by_min_NC = scaled_NC >= settings.min_p.log()[:, None]
    ended_N = (through_NC[:, -1:] >= top_p_N1)[:, 0] | ~by_min_NC[:, -1]
    exhausted_N = scaled_NC[:, -1] == -torch.inf
    complete_N = torch.where(settings.top_k > 0, k_complete_N, ended_N) | exhausted_N | whole
    kept_NC = by_k_NC & by_p_NC & by_min_NC & (probs_NC > 0)
    kept_NC[:, 0] = True
    return probs_NC * (kept_NC & _typical(scaled_NC, kept_NC, settings.typical_p)), ids_NC, complete_N


def _top_k(scaled_NC: Tensor, top_k_N: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the candidates are as likely as the k-th one, and whether the last of them is among these."""
    size = scaled_NC.shape[1]
    last_N1 = scaled_NC.gather(1, (top_k_N.clamp(1, size) - 1)[:, None])
    kept_NC = (scaled_NC >= last_N1) | (top_k_N == 0)[:, None]
    return kept_NC, (top_k_N <= size) & (scaled_NC[:, -1:] < last_N1)[:, 0]


def _mass(scaled_NC: Tensor, kept_NC: Tensor) -> Tensor:
    return torch.where(kept_NC, scaled_NC, -torch.inf).logsumexp(-1, keepdim=True)


def _typical(scaled_NC: Tensor, kept_NC: Tensor, typical_p_N: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2022) of what was kept; ties as transformers."""
    if bool((typical_p_N == 1).all()):
        return kept_NC
    logprobs_NC = torch.where(kept_NC, scaled_NC - _mass(scaled_NC, kept_NC), -torch.inf)
    probs_NC = logprobs_NC.exp()
    entropy_N1 = -torch.where(kept_NC, logprobs_NC * probs_NC, 0.0).sum(-1, keepdim=True)
    distance_NC = (-logprobs_NC - entropy_N1).abs()
    sorted_NC, order_NC = distance_NC.sort(dim=-1, stable=True)
    through_NC = probs_NC.gather(1, order_NC).cumsum(-1)
    last_N1 = (through_NC < typical_p_N[:, None]).sum(-1, keepdim=True).clamp(max=probs_NC.shape[1] - 1)
    return kept_NC & ((distance_NC <= sorted_NC.gather(1, last_N1)) | (typical_p_N == 1)[:, None])


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
