"""Head and cross-entropy without ever holding the logits of all tokens.

Shapes: N chosen tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.rows import ROW_MULTIPLE, rows_to_add
from oarsmith.kernels.select import native_for

# Bytes of logits held at a time for the weight's gradient: long products are efficient ones.
CHUNK_BYTES = 72 << 20
# Bytes of logits from the first product through the softmax to the gradient of hidden: they stay in a CPU's cache.
PIECE_BYTES = 24 << 20
# Of precise logits: rows of the output matrix that become fp32 at a time, and tokens that they are multiplied with.
PRECISE_ROWS, PRECISE_TOKENS = 2048, 1024


class HeadResult(NamedTuple):
    """``loss``: sum of coef * (-log p + z_loss * lse^2), differentiable; the others are detached, one entry per token.

    ``lse_N``: the logarithm of the softmax's denominator, log sum_v exp(logit_v).
    """

    loss: Tensor
    logprobs_N: Tensor
    correct_N: Tensor
    lse_N: Tensor


def head_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    coef_N: Tensor,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> HeadResult:
    """sum_n coef_n * (-log softmax(h W^T)[target_n] + z_loss * lse_n^2); the gradient is computed in the forward pass.

    Args:
        softcap: c; logits become c * tanh(logit / c) first.
        z_loss: weight of the squared log of the softmax's denominator, which keeps it near 1 (PaLM, Chowdhery et al.
            2022, section 5).

    The coefficients must be known beforehand (loss weight / global count); that saves the second product with W that
    recomputing would take: 3 matrix products in all. Logits exist for one chunk at a time.
    """
    assert not coef_N.requires_grad, "coefficients get no gradient; use token_logprobs"
    assert z_loss >= 0, z_loss
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    rule = _Rule(softcap, z_loss)
    if needs_grad:
        return HeadResult(*_HeadLoss.apply(hidden_ND, weight_VD, targets_N, coef_N, rule))
    found, _, _ = _scan(hidden_ND, weight_VD, targets_N, coef_N, rule, grads=(False, False))
    return HeadResult(_total(coef_N, found, rule), *found)


def token_logprobs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None, precise: bool = False
) -> Tensor:
    """log softmax(h W^T)[target] [N] in fp32, differentiable; backward recomputes the logits chunk by chunk.

    For losses whose coefficients depend on the log-probabilities themselves (preference and policy objectives).

    Args:
        precise: logits stay in fp32 in the forward pass. In bf16 they are off by up to 2^-9 of their size, which adds
            up to tenths of a nat over an answer. Backward's are in bf16 in any case.
    """
    mode = _Mode(_Rule(softcap, 0.0), precise, squares=False)
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, mode)[0]


def token_logprobs_squares(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """The precise log-probabilities, and log sum_v p_v^2 [N] in fp32 without gradient: of the probability that two
    tokens drawn at a place are the same."""
    mode = _Mode(_Rule(softcap, 0.0), precise=True, squares=True)
    logprobs_N, squares_N = _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, mode)
    return logprobs_N, squares_N


class _Rule(NamedTuple):
    softcap: float | None
    z_loss: float


class _Mode(NamedTuple):
    rule: _Rule
    precise: bool
    squares: bool


class _Found(NamedTuple):
    """What a pass finds out about each token."""

    logprobs_N: Tensor
    correct_N: Tensor
    lse_N: Tensor


def _total(coef_N: Tensor, found: _Found, rule: _Rule) -> Tensor:
    loss = -(coef_N * found.logprobs_N).sum()
    return loss if rule.z_loss == 0 else loss + rule.z_loss * (coef_N * found.lse_N.square()).sum()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coef: Tensor, rule: _Rule
    ) -> tuple[Tensor, ...]:
        grads = ctx.needs_input_grad[:2]
        found, d_hidden, d_weight = _scan(hidden, weight, targets, coef, rule, grads=grads)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(*found)
        return _total(coef, found, rule), *found

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_loss.item() != 1.0:
            d_hidden = None if d_hidden is None else d_hidden * d_loss
            d_weight = None if d_weight is None else d_weight * d_loss
        return d_hidden, d_weight, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, mode: _Mode) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.rule = mode.rule
        if mode.precise:
            logprobs, squares = _precise(hidden, weight, targets, mode)
        else:
            logprobs = _scan(hidden, weight, targets, torch.zeros(len(targets)), mode.rule, grads=(False, False))[0][0]
            squares = logprobs.new_empty(0)
        ctx.mark_non_differentiable(squares)
        return logprobs, squares

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor, d_squares: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grads = ctx.needs_input_grad[:2]
        _, d_hidden, d_weight = _scan(hidden, weight, targets, -d_logprobs, ctx.rule, grads=grads)
        return d_hidden, d_weight, None, None


def _precise(hidden: Tensor, weight: Tensor, targets: Tensor, mode: _Mode) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the logarithms of the sums of squared probabilities if they are asked for."""
    asked, vocab = len(targets), len(weight)
    assert targets.device.type != "cpu" or bool(((targets >= 0) & (targets < vocab)).all()), (targets, vocab)
    hidden, targets = functional.pad(hidden, (0, 0, 0, rows_to_add(asked))), _longer(targets, rows_to_add(asked))
    # Of each token its own logit, the denominator's logarithm, and that of the sum of its squared summands.
    picked, lse, lse_2 = (torch.full((3, len(targets)), -torch.inf, dtype=torch.float64, device=hidden.device)).unbind()
    block_BD = torch.empty(min(PRECISE_ROWS, vocab), weight.shape[1], device=hidden.device)
    wide_ND = hidden.float()
    with _exact_products(weight.dtype):
        for start in range(0, vocab, len(block_BD)):
            part_BD = block_BD[: min(len(block_BD), vocab - start)].copy_(weight[start : start + len(block_BD)])
            for first in range(0, len(targets), PRECISE_TOKENS):
                rows = slice(first, min(first + PRECISE_TOKENS, len(targets)))
                logits_CB = torch.mm(wide_ND[rows], part_BD.t())
                if mode.rule.softcap is not None:
                    logits_CB.div_(mode.rule.softcap).tanh_().mul_(mode.rule.softcap)
                inside, at = _inside(targets[rows] - start, len(part_BD))
                picked[rows] = torch.where(inside, logits_CB.gather(1, at[:, None])[:, 0].double(), picked[rows])
                lse[rows] = torch.logaddexp(lse[rows], _lse(logits_CB))
                if mode.squares:
                    lse_2[rows] = torch.logaddexp(lse_2[rows], _lse(logits_CB.mul_(2)))
    squares = (lse_2 - 2 * lse)[:asked].float() if mode.squares else picked.new_empty(0)
    return (picked - lse)[:asked].float(), squares


def _inside(places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which places lie in a block of this size; and the places, those that do not somewhere in it."""
    return (places >= 0) & (places < size), places.clamp(0, size - 1)


def _lse(logits: Tensor) -> Tensor:
    """log sum_b exp(logit_b) of each row, float64."""
    nowhere = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    empty = torch.empty(2, len(logits), device=logits.device)
    found = _Found(empty[0], torch.empty_like(nowhere, dtype=torch.bool), empty[1])
    _softmax(logits, nowhere, empty[0], _Rule(None, 0.0), found, want_grad=False)
    return found.lse_N.double()


@contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Products of fp32 copies of bf16 numbers at nearly the speed of bf16: "medium" rounds the factors to bf16, which
    they are already (to TF32 on a GPU), and sums in fp32."""
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _scan(
    hidden: Tensor, weight: Tensor, targets: Tensor, coef: Tensor, rule: _Rule, *, grads: tuple[bool, bool]
) -> tuple[_Found, Tensor | None, Tensor | None]:
    """Chunk by chunk: what is found out about tokens, and the gradients of the loss that are asked for."""
    asked = len(targets)
    if added := rows_to_add(asked):
        hidden, targets, coef = functional.pad(hidden, (0, 0, 0, added)), _longer(targets, added), _longer(coef, added)
    num_tokens, piece = len(targets), _rows(weight, PIECE_BYTES)
    chunk = piece if not grads[1] else _chunk_rows(num_tokens, weight, piece)
    logprobs, lse = (torch.empty(num_tokens, device=hidden.device) for _ in range(2))
    found = _Found(logprobs, torch.empty(num_tokens, dtype=torch.bool, device=hidden.device), lse)
    d_hidden = torch.empty_like(hidden) if grads[0] else None
    d_weight: Tensor | None = None
    coef = coef.to(device=hidden.device, dtype=torch.float32)
    logits_CV = hidden.new_empty(min(chunk, num_tokens), weight.shape[0])
    for start in range(0, num_tokens, max(chunk, 1)):
        stop = min(start + chunk, num_tokens)
        for first in range(start, stop, piece):
            rows = slice(first, min(first + piece, stop))
            logits = torch.mm(hidden[rows], weight.t(), out=logits_CV[first - start : rows.stop - start])
            part = _Found(*(values[rows] for values in found))
            _softmax(logits, targets[rows], coef[rows], rule, part, any(grads))
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[rows])
        if grads[1]:
            part_VD = torch.mm(logits_CV[: stop - start].t(), hidden[start:stop])
            # Several chunks add up in fp32: bf16 sums would lose the small ones.
            d_weight = part_VD if d_weight is None else d_weight.float().add_(part_VD)
    if grads[1]:
        d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
    found = _Found(*(values[:asked] for values in found))
    return found, None if d_hidden is None else d_hidden[:asked], d_weight


def _longer(values_N: Tensor, added: int) -> Tensor:
    """With zeros at the end: a token whose coefficient is 0 leaves no trace."""
    return functional.pad(values_N, (0, added))


def _rows(weight: Tensor, num_bytes: int) -> int:
    """Tokens whose logits have about this size, in a number that needs no rows added."""
    rows = num_bytes // (weight.shape[0] * weight.element_size())
    return max(rows - rows % ROW_MULTIPLE, ROW_MULTIPLE)


def _chunk_rows(num_tokens: int, weight: Tensor, piece: int) -> int:
    """Tokens whose logits are held for one product with the hidden states, a multiple of ``piece``."""
    chunk = max(_rows(weight, CHUNK_BYTES) // piece, 1) * piece
    # A second chunk costs a sum in fp32 and the next summand beside it: as much as the logits of this many tokens.
    worth = (4 + weight.element_size()) * weight.shape[1] // weight.element_size()
    return chunk if num_tokens > chunk + worth else -(-num_tokens // piece) * piece


def _softmax(logits: Tensor, targets: Tensor, coef: Tensor, rule: _Rule, found: _Found, want_grad: bool) -> None:
    """Fills ``found``; with ``want_grad`` the logits become d loss / d logits."""
    library = native_for(logits)
    if library is None:
        grad = _softmax_reference(logits, targets, coef, rule, found)
        if want_grad:
            logits.copy_(grad)
        return
    rows, vocab = logits.shape
    # The kernel writes where the targets point.
    assert targets.dtype == torch.int64 and int(targets.min()) >= 0 and int(targets.max()) < vocab, (targets, vocab)
    targets, coef = targets.contiguous(), coef.contiguous()
    sizes = (rows, vocab, int(want_grad), rule.softcap or 0.0, rule.z_loss)
    library.call("cross_entropy", logits.dtype, logits, targets, coef, *found, *sizes)


def _softmax_reference(logits: Tensor, targets: Tensor, coef: Tensor, rule: _Rule, found: _Found) -> Tensor:
    """The plain twin."""
    wide = logits.float()
    if rule.softcap is not None:
        wide = (wide / rule.softcap).tanh_() * rule.softcap
    log_p, picked = torch.log_softmax(wide, dim=-1), targets[:, None]
    found.logprobs_N.copy_(log_p.gather(1, picked)[:, 0])
    found.correct_N.copy_(wide.gather(1, picked)[:, 0] >= wide.amax(-1))
    found.lse_N.copy_(wide.logsumexp(-1))
    grad = log_p.exp_()
    if rule.z_loss > 0:
        grad = grad * (1 + 2 * rule.z_loss * found.lse_N[:, None])
    grad[torch.arange(len(targets), device=logits.device), targets] -= 1.0
    if rule.softcap is not None:
        grad = grad * (1 - (wide / rule.softcap).square())
    return (grad * coef[:, None]).to(logits.dtype)
