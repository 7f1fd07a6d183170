"""Logits to tokens, every row by settings of its own.

Shapes: N sequences, V vocabulary, C candidates that may be drawn, D distinct tokens of a sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from oarsmith.engine.choice import Choice, Continuation, Draft
from oarsmith.engine.filters import Settings, distribution, draw, draw_after, sample
from oarsmith.engine.state import SamplingState
from oarsmith.errors import ModelError


def choose(
    logits_NV: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft | None] | None = None
) -> list[Choice]:
    """The next token of each row by its own state; no row depends on another.

    Args:
        drafts: guesses at the rows' tokens. A token that is drawn is the guess as often as possible; its distribution
            is what it is without one, and where the guess was not drawn, so is the token itself.

    Raises:
        ModelError: the logits are not numbers.
    """
    logits_NV = logits_NV.float()
    if not bool(logits_NV.amax(-1).isfinite().all()):
        raise ModelError(
            "the model's logits are not finite (NaN or infinite)",
            fix="load it with dtype fp32; if that does not help, the weights are damaged",
        )
    tokens_N = _tokens(edited(logits_NV, states), states, drafts or [None] * len(states))
    choices = [Choice(token) for token in tokens_N.tolist()]
    rows = [row for row, state in enumerate(states) if _wants_logprob(state)]
    if rows:
        top = [states[row].sampling.logprobs or 0 for row in rows]
        for row, choice in zip(rows, _described(logits_NV[rows], tokens_N[rows], top), strict=True):
            choices[row] = choice
    return choices


def propose(logits_NV: Tensor, states: Sequence[SamplingState]) -> list[Draft]:
    """A guess at the next token of each row: the likeliest, or one drawn, as its state says. Logits are numbers."""
    logits_NV = edited(logits_NV.float(), states)
    drafts = [Draft(token) for token in logits_NV.argmax(-1).tolist()]
    drawn = [row for row, state in enumerate(states) if not state.sampling.greedy]
    if drawn:
        settings = Settings.of([states[row].sampling for row in drawn], logits_NV.device)
        probs_NV = distribution(logits_NV[drawn], settings)
        tokens = draw(probs_NV, _uniform([states[row] for row in drawn], logits_NV.device)).tolist()
        for row, token, probs_V in zip(drawn, tokens, probs_NV, strict=True):
            drafts[row] = Draft(token, probs_V)
    return drafts


def continuations(
    logits_NV: Tensor, states: Sequence[SamplingState], scores: Sequence[float], count: int, top: int
) -> list[Continuation]:
    """The ``count`` likeliest ways to go on with one of several sequences, the likeliest first.

    Args:
        scores: log-probabilities of the sequences so far.
        top: how many of the likeliest tokens to name beside each.
    """
    logprobs_NV = logits_NV.float().log_softmax(-1)
    # Not the logits, as where one token is chosen: it is the log-probabilities that transformers bends in a search.
    bent_NV, size = edited(logprobs_NV, states), logits_NV.shape[1]
    totals_NV = bent_NV + torch.tensor(scores, dtype=torch.float32, device=logits_NV.device)[:, None]
    totals, places = totals_NV.flatten().topk(min(count, totals_NV.numel()))
    found = totals > -torch.inf
    totals, places = totals[found], places[found]
    choices = _described(logprobs_NV[places // size], places % size, [top] * len(places))
    rows = zip((places // size).tolist(), totals.tolist(), choices, strict=True)
    return [Continuation(*row) for row in rows]


def _wants_logprob(state: SamplingState) -> bool:
    # Of several answers the likeliest are kept.
    return state.sampling.logprobs is not None or state.sampling.num_samples > state.sampling.n


def prompt_logprobs(logits_TV: Tensor, targets_T: Tensor, top: int) -> list[Choice]:
    """The tokens of a prompt, each with its log-probability and the ``top`` likeliest in its place.

    Args:
        logits_TV: row i is the distribution of targets_T[i].
    """
    return _described(logits_TV.float(), targets_T, [top] * len(targets_T))


def _described(logits_NV: Tensor, tokens_N: Tensor, top: Sequence[int]) -> list[Choice]:
    logprobs_NV = logits_NV.log_softmax(-1)
    found = logprobs_NV.gather(1, tokens_N[:, None])[:, 0].tolist()
    top_NC, ids_NC = logprobs_NV.topk(min(max(top, default=0), logits_NV.shape[1]), dim=-1)
    rows = zip(tokens_N.tolist(), found, top, ids_NC.tolist(), top_NC.tolist(), strict=True)
    return [Choice(token, own, tuple(zip(ids[:k], best[:k], strict=True))) for token, own, k, ids, best in rows]


def edited(logits_NV: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Logits as constraints, bans, biases and penalties leave them; the given ones stay as they are."""
    rows = [row for row, state in enumerate(states) if state.edits]
    if not rows:
        return logits_NV
    out_NV = logits_NV.clone()
    for row in rows:
        if (allowed := states[row].allowed()) is not None:
            allowed_V = torch.frombuffer(allowed, dtype=torch.uint8).to(out_NV.device)
            out_NV[row].masked_fill_(allowed_V == 0, -torch.inf)
    _ban(out_NV, rows, states)
    _add_bias(out_NV, [states[row] for row in rows], rows)
    _penalize(out_NV, [states[row] for row in rows], rows)
    return out_NV


def _ban(logits_NV: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> None:
    """Banned tokens to -inf, unless they are all that the constraint (or the vocabulary) has."""
    banned = {row: ids for row in rows if (ids := states[row].banned)}
    if not banned:
        return
    before_NV = logits_NV[list(banned)]
    at_row = torch.tensor([row for row, ids in banned.items() for _ in ids], device=logits_NV.device)
    at_id = torch.tensor([index for ids in banned.values() for index in ids], device=logits_NV.device)
    logits_NV[at_row, at_id] = -torch.inf
    for place, (row, left) in enumerate(zip(banned, logits_NV[list(banned)].amax(-1).tolist(), strict=True)):
        if left == -torch.inf:
            logits_NV[row] = before_NV[place]


def _add_bias(logits_NV: Tensor, states: Sequence[SamplingState], rows: Sequence[int]) -> None:
    sizes = [len(state.bias_ids) for state in states]
    if not any(sizes):
        return
    at_row = _repeated(rows, sizes, logits_NV.device)
    at_id = _joined([state.bias_ids for state in states], torch.int64, logits_NV.device)
    logits_NV[at_row, at_id] += _joined([state.bias for state in states], torch.float32, logits_NV.device)


def _penalize(logits_NV: Tensor, states: Sequence[SamplingState], rows: Sequence[int]) -> None:
    """Repetition (Keskar et al. 2019, section 4.1; signs as transformers), then frequency and presence penalty."""
    found = [
        (row, seen, state.sampling) for row, state in zip(rows, states, strict=True) if (seen := state.occurrences)
    ]
    if not any(len(seen.ids) for _, seen, _ in found):
        return
    device, sizes = logits_NV.device, [len(seen.ids) for _, seen, _ in found]
    at_row = _repeated([row for row, _, _ in found], sizes, device)
    at_id = _joined([seen.ids for _, seen, _ in found], torch.int64, device)
    counts_D = _joined([seen.counts for _, seen, _ in found], torch.float32, device)
    repetition_D = _repeated([sampling.repetition_penalty for *_, sampling in found], sizes, device)
    frequency_D = _repeated([sampling.frequency_penalty for *_, sampling in found], sizes, device)
    presence_D = _repeated([sampling.presence_penalty for *_, sampling in found], sizes, device)
    logits_D = logits_NV[at_row, at_id]
    logits_D = torch.where(logits_D < 0, logits_D * repetition_D, logits_D / repetition_D)
    logits_NV[at_row, at_id] = logits_D - frequency_D * counts_D - presence_D * (counts_D > 0)


def _joined(arrays: Sequence[array], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy: as long as a tensor looks at an array, that cannot grow."""
    return torch.cat([torch.frombuffer(values, dtype=dtype) for values in arrays if values]).to(device)


def _repeated(values: Sequence[float], sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).repeat_interleave(torch.tensor(sizes, device=device))


def _tokens(logits_NV: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft | None]) -> Tensor:
    device = logits_NV.device
    drawn = [row for row, state in enumerate(states) if not state.sampling.greedy]
    if len(drawn) < len(states):
        tokens_N = logits_NV.argmax(-1)
    else:
        tokens_N = torch.zeros(len(states), dtype=torch.int64, device=device)
    guessed = {row: draft for row in drawn if (draft := drafts[row]) is not None and draft.probs_V is not None}
    free = [row for row in drawn if row not in guessed]
    if free:
        settings = Settings.of([states[row].sampling for row in free], device)
        own_NV = logits_NV if len(free) == len(states) else logits_NV[free]
        tokens_N[free] = sample(own_NV, settings, _uniform([states[row] for row in free], device))
    if guessed:
        rows = list(guessed)
        probs_NV = distribution(logits_NV[rows], Settings.of([states[row].sampling for row in rows], device))
        for probs_V, (row, draft) in zip(probs_NV, guessed.items(), strict=True):
            assert draft.probs_V is not None, row
            tokens_N[row] = draw_after(probs_V, draft.token, draft.probs_V, states[row].uniform())
    return tokens_N


def _uniform(states: Sequence[SamplingState], device: torch.device) -> Tensor:
    return torch.tensor([state.uniform() for state in states], dtype=torch.float64, device=device)
