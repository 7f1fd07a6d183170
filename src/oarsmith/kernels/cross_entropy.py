"""Head and cross-entropy without ever holding the logits of all tokens.

Shapes: N chosen tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from oarsmith.kernels.select import native_for

# Bytes of logits held at a time. 64 MB keeps the matrix product efficient and stays far below a layer's activations.
CHUNK_BYTES = 64 << 20


class HeadResult(NamedTuple):
    """``loss``: sum of coef * -log p, differentiable; the others are detached, one entry per token."""

    loss: Tensor
    logprobs_N: Tensor
    correct_N: Tensor


def head_loss(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, coef_N: Tensor, *, softcap: float | None = None
) -> HeadResult:
    """sum_n coef_n * -log softmax(h W^T)[target_n], with the gradient computed in the forward pass.

    ``softcap`` c: logits become c * tanh(logit / c) first.

    The coefficients must be known beforehand (loss weight / global count); that saves the second product with W that
    recomputing would take: 3 matrix products in all. Logits exist for one chunk at a time.
    """
    assert not coef_N.requires_grad, "coefficients get no gradient; use token_logprobs"
    needs_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    if needs_grad:
        return HeadResult(*_HeadLoss.apply(hidden_ND, weight_VD, targets_N, coef_N, softcap))
    logprobs_N, correct_N, _, _ = _scan(hidden_ND, weight_VD, targets_N, coef_N, softcap, grads=(False, False))
    return HeadResult(-(coef_N * logprobs_N).sum(), logprobs_N, correct_N)


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, softcap: float | None = None) -> Tensor:
    """log softmax(h W^T)[target] [N] in fp32, differentiable; backward recomputes the logits chunk by chunk.

    For losses whose coefficients depend on the log-probabilities themselves (preference and policy objectives).
    """
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, softcap)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, coef: Tensor, softcap: float | None
    ) -> tuple[Tensor, ...]:
        grads = ctx.needs_input_grad[:2]
        logprobs, correct, d_hidden, d_weight = _scan(hidden, weight, targets, coef, softcap, grads=grads)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(logprobs, correct)
        return -(coef * logprobs).sum(), logprobs, correct

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_loss.item() != 1.0:
            d_hidden = None if d_hidden is None else d_hidden * d_loss
            d_weight = None if d_weight is None else d_weight * d_loss
        return d_hidden, d_weight, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.softcap = softcap
        return _scan(hidden, weight, targets, torch.zeros(len(targets)), softcap, grads=(False, False))[0]

    @staticmethod
    def backward(ctx: Any, d_logprobs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        grads = ctx.needs_input_grad[:2]
        _, _, d_hidden, d_weight = _scan(hidden, weight, targets, -d_logprobs, ctx.softcap, grads=grads)
        return d_hidden, d_weight, None, None


def _scan(
    hidden: Tensor, weight: Tensor, targets: Tensor, coef: Tensor, softcap: float | None, *, grads: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Chunk by chunk: log-probabilities, hits, and the gradients of sum coef * -logp that are asked for."""
    num_tokens, chunk = len(targets), chunk_rows(weight)
    logprobs = torch.empty(num_tokens, device=hidden.device)
    correct = torch.empty(num_tokens, dtype=torch.bool, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if grads[0] else None
    d_weight: Tensor | None = None
    coef = coef.to(device=hidden.device, dtype=torch.float32)
    for start in range(0, num_tokens, chunk):
        rows = slice(start, min(start + chunk, num_tokens))
        logits_CV = torch.mm(hidden[rows], weight.t())
        logprobs[rows], correct[rows], d_logits = _chunk(logits_CV, targets[rows], coef[rows], softcap, any(grads))
        if d_hidden is not None:
            torch.mm(d_logits, weight, out=d_hidden[rows])
        if grads[1]:
            part = torch.mm(d_logits.t(), hidden[rows])
            # Several chunks add up in fp32: bf16 sums would lose the small ones.
            d_weight = part if d_weight is None else d_weight.float().add_(part)
    if grads[1]:
        d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
    return logprobs, correct, d_hidden, d_weight


def chunk_rows(weight: Tensor) -> int:
    """Tokens per chunk for a head of this size."""
    return max(64, CHUNK_BYTES // (weight.shape[0] * weight.element_size()))


def _chunk(
    logits: Tensor, targets: Tensor, coef: Tensor, softcap: float | None, want_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, hits, d loss / d logits); the logits' storage is reused for the gradient."""
    library = native_for(logits)
    if library is None:
        return _chunk_reference(logits, targets, coef, softcap)
    rows, vocab = logits.shape
    # The kernel writes where the targets point.
    assert targets.dtype == torch.int64 and int(targets.min()) >= 0 and int(targets.max()) < vocab, (targets, vocab)
    logprobs, correct = torch.empty(rows), torch.empty(rows, dtype=torch.bool)
    targets, coef = targets.contiguous(), coef.contiguous()
    sizes = (rows, vocab, int(want_grad), softcap or 0.0)
    library.call("cross_entropy", logits.dtype, logits, targets, coef, logprobs, correct, *sizes)
    return logprobs, correct, logits


def _chunk_reference(
    logits: Tensor, targets: Tensor, coef: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain twin."""
    wide = logits.float()
    if softcap is not None:
        wide = (wide / softcap).tanh_() * softcap
    log_p = torch.log_softmax(wide, dim=-1)
    chosen = log_p.gather(1, targets[:, None])[:, 0]
    correct = wide.gather(1, targets[:, None])[:, 0] >= wide.amax(-1)
    grad = log_p.exp_()
    grad[torch.arange(len(targets), device=logits.device), targets] -= 1.0
    if softcap is not None:
        grad = grad * (1 - (wide / softcap).square())
    return chosen, correct, (grad * coef[:, None]).to(logits.dtype)
