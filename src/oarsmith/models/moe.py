"""Mixture of experts. Shapes: T tokens, D hidden, E experts, J experts a token is sent to, N = T * J pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.models.linear import build_linear
from oarsmith.models.mlp import GatedFeedForward, gated
from oarsmith.models.spec_parts import GatedMLP, MoE, RouterSpec


class Router(nn.Module):
    """Scores experts for each token and picks. Everything is fp32: a rounded score sends tokens elsewhere."""

    def __init__(self, spec: RouterSpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(spec.num_experts)) if spec.bias else None
        self.correction: nn.Parameter | None = None
        if spec.correction:
            # Moved by the load it sees, never by the loss.
            self.correction = nn.Parameter(torch.empty(spec.num_experts, dtype=torch.float32), requires_grad=False)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(weights, experts) [T, J] of each token."""
        spec = self.spec
        bias = None if self.bias is None else self.bias.float()
        logits_TE = functional.linear(x_TD.float(), self.weight.float(), bias)
        scores_TE = logits_TE.softmax(-1) if spec.score == "softmax" else logits_TE.sigmoid()
        chosen_TJ = self._choose(scores_TE.detach())
        weights_TJ = scores_TE.gather(1, chosen_TJ)
        if spec.normalize:
            weights_TJ = weights_TJ / (weights_TJ.sum(-1, keepdim=True) + 1e-20)
        return weights_TJ * spec.scale, chosen_TJ

    def _choose(self, scores_TE: Tensor) -> Tensor:
        groups = self.spec.groups
        if self.correction is not None:
            scores_TE = scores_TE + self.correction
        if groups is not None:
            grouped = scores_TE.unflatten(1, (groups.num_groups, -1))
            best = grouped.topk(groups.best, dim=-1).values.sum(-1).topk(groups.kept, dim=-1).indices
            closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=best.device).scatter_(1, best, False)
            scores_TE = grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)
        return scores_TE.topk(self.spec.top_k, dim=-1).indices


class Experts(nn.Module):
    """The experts' maps, stacked along a leading axis."""

    def __init__(self, spec: GatedMLP) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_up = build_linear(spec.gate_up)
        self.down = build_linear(spec.down)

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        return self.down(gated(self.gate_up(x_ND, counts), self.activation), counts)


class MixtureOfExperts(nn.Module):
    def __init__(self, spec: MoE) -> None:
        super().__init__()
        self.spec = spec
        hidden_size = spec.experts.gate_up.in_features
        self.router = Router(spec.router, hidden_size)
        self.experts = Experts(spec.experts)
        self.shared = GatedFeedForward(spec.shared) if spec.shared is not None else None
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if spec.shared_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TJ, chosen_TJ = self.router(x_TD)
        chosen_N = chosen_TJ.flatten()
        # Pairs sorted by expert: each expert works on one slice. The order is undone by a scatter, not by adding into
        # shared rows, so the sum over a token's experts does not depend on the batch or the device.
        order_N = chosen_N.argsort(stable=True)
        y_ND = self.experts(x_TD[order_N // chosen_TJ.shape[1]], self._counts(chosen_N))
        y_TJD = torch.empty_like(y_ND).index_copy(0, order_N, y_ND).unflatten(0, chosen_TJ.shape)
        out_TD = (y_TJD * weights_TJ[..., None]).sum(1).to(x_TD.dtype)
        if self.shared is None:
            return out_TD
        shared_TD = self.shared(x_TD)
        if self.shared_gate is not None:
            shared_TD = self.shared_gate(x_TD).sigmoid() * shared_TD
        return out_TD + shared_TD

    def _counts(self, chosen_N: Tensor) -> list[int]:
        """Pairs of each expert; in a graph they are symbols."""
        num_experts = self.spec.router.num_experts
        if not torch.compiler.is_compiling():
            return chosen_N.bincount(minlength=num_experts).tolist()
        expert_E = torch.arange(num_experts, device=chosen_N.device)
        counts: list[int] = (chosen_N[:, None] == expert_E).sum(0).tolist()
        for count in counts:
            torch._check(count >= 0)
        torch._check(sum(counts) == chosen_N.shape[0])
        return counts
