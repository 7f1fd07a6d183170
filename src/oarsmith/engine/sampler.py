"""Logits to tokens.

Shapes: N sequences, V vocabulary, C candidates that may be drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ModelError

# Top-p alone looks at this many of the likeliest tokens first; only where they do not reach top_p is the whole
# vocabulary sorted. At V = 49,152 a sort is 11 ms on a CPU core, this 1 ms.
HEAD = 1024


@dataclass(frozen=True)
class Choice:
    """A token of an answer or a prompt.

    Attributes:
        logprob: natural logarithm of its probability in the model's own distribution, before anything that the
            sampling does to it; None where nobody asked.
        top: the likeliest tokens of that distribution with theirs, likeliest first, as many as were asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What an answer may consist of: which tokens may come next, given those before."""

    def allowed(self) -> Tensor:
        """Whether each token may come next, bool [V] on the CPU; at least one may."""

    def accept(self, token: int) -> None:
        """The token was taken."""


class SamplingState:
    """What the choice of a request's next token depends on, besides the logits.

    Args:
        prompt: its token ids.
        generator: where its random numbers come from; one a token, none when greedy.
        vocab_size: columns of the logits.
        grammar: what the answer must be; masks before everything else.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        generator: torch.Generator,
        *,
        vocab_size: int,
        grammar: Constraint | None = None,
    ) -> None:
        self.sampling = sampling
        self.grammar = grammar
        self._generator = generator
        self.seen_V: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen_V = torch.zeros(vocab_size, dtype=torch.bool)
            self.seen_V[torch.tensor(prompt, dtype=torch.int64)] = True

    def accept(self, token: int) -> None:
        """The token was taken: the next choice comes after it."""
        if self.seen_V is not None:
            self.seen_V[token] = True
        if self.grammar is not None:
            self.grammar.accept(token)

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        if self.sampling.temperature == 0:
            return 0.0
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits_NV: Tensor, states: Sequence[SamplingState]) -> list[Choice]:
    """The next token of each row by its own state; no row depends on another.

    Raises:
        ModelError: the logits are not numbers.
    """
    if not bool(logits_NV.amax(-1).isfinite().all()):
        raise ModelError(
            "the model's logits are not finite (NaN or infinite)",
            fix="load it with dtype fp32; if that does not help, the weights are damaged",
        )
    tokens = [0] * len(states)
    groups: dict[Sampling, list[int]] = {}
    for row, state in enumerate(states):
        groups.setdefault(state.sampling, []).append(row)
    for sampling, rows in groups.items():
        alike_NV = logits_NV[rows].float()
        for index, row in enumerate(rows):
            if (grammar := states[row].grammar) is not None:
                alike_NV[index].masked_fill_(~grammar.allowed().to(alike_NV.device), -torch.inf)
        seen = [seen_V for row in rows if (seen_V := states[row].seen_V) is not None]
        if seen:
            alike_NV = penalize(alike_NV, torch.stack(seen).to(alike_NV.device), sampling.repetition_penalty)
        draws = [states[row].uniform() for row in rows]
        uniform_N = torch.tensor(draws, dtype=torch.float64, device=logits_NV.device)
        for row, token in zip(rows, choose_alike(alike_NV, sampling, uniform_N).tolist(), strict=True):
            tokens[row] = token
    return [Choice(token) for token in tokens]


def prompt_logprobs(logits_TV: Tensor, targets_T: Tensor, top: int) -> list[Choice]:
    """The tokens of a prompt, each with its logarithm of probability and the ``top`` likeliest in its place.

    Args:
        logits_TV: row i is the distribution of targets_T[i].
    """
    logprobs_TV = logits_TV.float().log_softmax(-1)
    found_T1 = logprobs_TV.gather(1, targets_T[:, None])
    top_TC, ids_TC = logprobs_TV.topk(min(top, logits_TV.shape[1]), dim=-1)
    rows = zip(targets_T.tolist(), found_T1[:, 0].tolist(), ids_TC.tolist(), top_TC.tolist(), strict=True)
    return [Choice(token, logprob, tuple(zip(ids, values, strict=True))) for token, logprob, ids, values in rows]


def penalize(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Logits with those of seen tokens made smaller (Keskar et al. 2019, section 4.1; signs as transformers)."""
    return torch.where(seen_NV, torch.where(logits_NV < 0, logits_NV * penalty, logits_NV / penalty), logits_NV)


def choose_alike(logits_NV: Tensor, sampling: Sampling, uniform_N: Tensor) -> Tensor:
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
