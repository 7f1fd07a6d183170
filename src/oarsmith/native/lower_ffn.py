"""Feed-forward parts as operations: gated, plain, mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.linear import Linear
from oarsmith.models.mlp import FeedForward, GatedFeedForward
from oarsmith.models.moe import MixtureOfExperts, Router
from oarsmith.native.lowering import Lowering, Source, Target, bend
from oarsmith.native.program import Experts, Operation, Vector


def feed_forward(
    low: Lowering, module: GatedFeedForward | FeedForward | MixtureOfExperts, source: Source, target: Target
) -> None:
    """target = keep * target + scale * module(source)."""
    match module:
        case GatedFeedForward():
            _gated(low, module, source, target)
        case FeedForward():
            hidden = low.buffer("hidden", module.up.spec.out_features)
            low.linear(source, module.up, hidden, bend=bend(module.activation))
            low.add_linear(Source(hidden), module.down, target)
        case MixtureOfExperts():
            _mixture(low, module, source, target)


def gate_up_rows(width: int) -> Tensor:
    """Rows of [gate, up] so that every pair of blocks of 16 holds 16 gates and then their 16 ups; -1: padding."""
    gate = torch.arange(-(-width // 16) * 16).view(-1, 1, 16)
    gate = torch.where(gate < width, gate, -1)
    return torch.cat([gate, torch.where(gate >= 0, gate + width, -1)], 1).flatten()


def _gated(low: Lowering, module: GatedFeedForward, source: Source, target: Target, scores: int = -1) -> None:
    width = module.down.spec.in_features
    hidden = low.buffer("hidden", width)
    low.linear(source, module.gate_up, hidden, rows=gate_up_rows(width), into="gated", bend=bend(module.activation))
    low.add_linear(Source(hidden), module.down, target, scores=scores)


def _mixture(low: Lowering, module: MixtureOfExperts, source: Source, target: Target) -> None:
    if source.norm is not None:
        normed = low.buffer("normed", low.spec.hidden_size)
        low.normed(source.buffer, source.norm, normed)
        source = Source(normed)
    scores = low.buffer("scores", module.spec.router.num_experts)
    router, bias = module.router, module.router.bias
    # fp32: a rounded score sends tokens elsewhere.
    low.ops.append(
        Operation(
            kind="linear",
            source=source.buffer,
            target=scores,
            matrix=low.weights.matrix(router.weight, "fp32"),
            bias=None if bias is None else low.weights.rows(bias),
        )
    )
    low.ops.append(
        Operation(
            kind="experts",
            source=source.buffer,
            target=target.buffer,
            scores=scores,
            keep=target.keep,
            scale=target.scale,
            experts=_experts(low, module, router),
        )
    )
    if module.shared is None:
        return
    gate = -1
    if module.shared_gate is not None:
        gate = low.buffer("gate", 1)
        matrix = low.weights.matrix(module.shared_gate.weight, "fp32")
        low.ops.append(Operation(kind="linear", source=source.buffer, target=gate, matrix=matrix, activation="sigmoid"))
    _gated(low, module.shared, source, Target(target.buffer, scale=target.scale), gate)


def _experts(low: Lowering, module: MixtureOfExperts, router: Router) -> Experts:
    spec, weights, experts = module.spec, low.weights, module.experts
    width, groups = spec.experts.down.in_features, spec.router.groups
    rows = gate_up_rows(width)
    how = bend(spec.experts.activation)
    return Experts(
        top_k=spec.router.top_k,
        sigmoid=spec.router.score == "sigmoid",
        normalize=spec.router.normalize,
        scale=spec.router.scale,
        hidden=low.buffer("hidden", width),
        gate_up=low.matrices(experts.gate_up.weight, low.format, rows),
        down=low.matrices(experts.down.weight, low.format),
        activation=how["activation"],
        alpha=how.get("alpha", 0.0),
        limit=how.get("limit", 0.0),
        groups=0 if groups is None else groups.num_groups,
        kept_groups=0 if groups is None else groups.kept,
        best_of_group=0 if groups is None else groups.best,
        correction=None if router.correction is None else weights.vector(router.correction),
        gate_up_bias=_stacked_bias(low, experts.gate_up, rows),
        down_bias=_stacked_bias(low, experts.down, None),
    )


def _stacked_bias(low: Lowering, module: Linear, rows: Tensor | None) -> Vector | None:
    if module.bias is None:
        return None
    bias = module.bias.detach().float()
    if rows is not None:
        bias = torch.where(rows >= 0, bias[:, rows.clamp_min(0)], 0.0)
    return low.weights.vector(functional.pad(bias, (0, -bias.shape[1] % 32)))
