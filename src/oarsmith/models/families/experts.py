"""Mixtures of experts in ``config.json``: which layers have them, how many, and how tokens are sent."""

from __future__ import annotations

from collections.abc import Sequence

from oarsmith.errors import ModelError
from oarsmith.models.families.base import ConfigReader
from oarsmith.models.families.parts import gated_mlp
from oarsmith.models.spec_parts import FFN, GatedMLP, MoE, RouterSpec


def softmax_experts(
    read: ConfigReader,
    inner: int,
    *,
    num_experts: int,
    top_k: int,
    normalize: bool,
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    shared: GatedMLP | None = None,
) -> MoE:
    """Experts of width ``inner``, weighted by a softmax over all of them.

    Args:
        normalize: the weights of the chosen experts are divided by their sum.
        names: gate, up and down of an expert.
        shared: an expert for every token, behind a sigmoid gate.
    """
    if top_k > num_experts:
        raise ModelError(f"num_experts_per_tok {top_k} is more than the {num_experts} experts", where="config.json")
    activation = read.activation("hidden_act", default="silu")
    return MoE(
        router=RouterSpec(num_experts=num_experts, top_k=top_k, normalize=normalize),
        experts=gated_mlp(read.integer("hidden_size"), inner, activation, names=names, experts=num_experts),
        shared=shared,
        shared_gate=shared is not None,
    )


def sparse_layers(read: ConfigReader, dense: FFN, sparse: FFN) -> list[FFN]:
    """Each layer's feed-forward part: every ``decoder_sparse_step``-th is sparse, but for ``mlp_only_layers``."""
    step, exceptions = read.integer("decoder_sparse_step", 1), read.integers("mlp_only_layers") or ()
    num_layers = read.integer("num_hidden_layers")
    return [sparse if index not in exceptions and (index + 1) % step == 0 else dense for index in range(num_layers)]
