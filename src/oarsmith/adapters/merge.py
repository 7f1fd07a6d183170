"""Merging an adapter into its base, with the proof that the merged model is the adapted one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.adapted import adapted_maps
from oarsmith.adapters.forms import DENSE
from oarsmith.adapters.linear import adapted_modules, disabled
from oarsmith.adapters.part import adapter_parts
from oarsmith.adapters.unmerge import keep_replaced, replaced_by_merge
from oarsmith.errors import ConfigError
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import ExpertLinear, Linear
from oarsmith.models.spec import rewrite_linears


def mergeable(model: Decoder) -> bool:
    """Whether there is a plain model that does what a model with its adapter does."""
    changes = (change for _, module in adapted_maps(model) for change in module.changes.values())
    return all(change.mergeable for change in changes) and all(p.unmergeable is None for p in adapter_parts(model))


@torch.no_grad()
def merge_adapter(model: Decoder, *, keep: bool = True) -> Decoder:
    """The model with every adapter folded into its weights, in fp32, rounded once to the weight's dtype.

    Works in place; the returned decoder is the same object, now plain. Where an adapter sits on one of embedding and
    head that are tied, the head gets a matrix of its own.

    Args:
        keep: what is replaced, in memory, so that ``unmerge_adapter`` can bring it back bit for bit. Without it there
            is one copy of the weights.

    Raises:
        ConfigError: an adapter that no plain model is.
    """
    for part in adapter_parts(model):
        if part.unmergeable is not None:
            what = f"{part.what} cannot be merged: {part.unmergeable}"
            raise ConfigError(what, where="adapter", fix="use it as it is: --adapter, or Engine(adapter=)")
    replaced = replaced_by_merge(model) if keep and (len(model.parts) or any(adapted_maps(model))) else None
    for path, module in adapted_modules(model):
        assert module.form is DENSE, f"{path} has 8-bit weights: merge into the checkpoint's own"
        weight, bias = module.merged()
        module.weight.copy_(weight)
        if bias is not None and module.bias is not None:
            module.bias.copy_(bias)
    for part in adapter_parts(model):
        part.merge(model)
    if replaced is not None:
        keep_replaced(model, replaced)
    return without_adapter(model)


def without_adapter(model: Decoder) -> Decoder:
    """The model, in place, without the adapters on it; the weights stay what they are."""
    for path, module in list(adapted_modules(model)):
        kind = Linear if module.spec.experts is None else ExpertLinear
        plain = kind.__new__(kind)
        nn.Module.__init__(plain)
        plain.spec = replace(module.spec, rewrite=None)
        plain.weight, plain.bias = module.weight, module.bias
        model.set_submodule(path, plain)
    model.parts = nn.ModuleList()
    model.spec = replace(rewrite_linears(model.spec, lambda _, linear: replace(linear, rewrite=None)), parts=())
    return model


@dataclass(frozen=True)
class MergeProof:
    """How far the merged model is from the adapted one, over all positions of the prompts.

    ``max_logit_diff``: largest absolute difference of a logit. ``mean_kl`` and ``max_kl``: KL(adapted || merged) in
    nats per token. ``top1_agreement``: share of positions with the same most likely token. ``effect_kl``:
    KL(adapted || base), what the adapter changed at all, for comparison.
    """

    max_logit_diff: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    effect_kl: float
    num_positions: int


@torch.no_grad()
def prompt_logits(model: Decoder, prompts: Iterable[list[int]]) -> list[Tensor]:
    """fp32 logits [T, V] of each prompt; of one score s, those of being better than what has the score 0: s, 0."""
    found = [model(torch.tensor([ids], device=model.device))[0].float() for ids in prompts]
    return [functional.pad(logits, (0, 1)) for logits in found] if model.spec.head.num_scores == 1 else found


def base_logits(model: Decoder, prompts: Iterable[list[int]]) -> list[Tensor]:
    """Logits of the base under the adapter."""
    with disabled(model):
        return prompt_logits(model, prompts)


def prove(adapted: list[Tensor], merged: list[Tensor], base: list[Tensor]) -> MergeProof:
    """Compare logits position by position."""
    a, m, b = torch.cat(adapted), torch.cat(merged), torch.cat(base)
    log_a = a.double().log_softmax(-1)

    def kl(other: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - other.double().log_softmax(-1))).sum(-1).clamp_min(0)

    merged_kl = kl(m)
    return MergeProof(
        max_logit_diff=float((a - m).abs().max()),
        mean_kl=float(merged_kl.mean()),
        max_kl=float(merged_kl.max()),
        top1_agreement=float((a.argmax(-1) == m.argmax(-1)).double().mean()),
        effect_kl=float(kl(b).mean()),
        num_positions=len(a),
    )
