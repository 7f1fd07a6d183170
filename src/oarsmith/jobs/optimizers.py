"""The optimizer a configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from oarsmith.config.train import TrainConfig
from oarsmith.jobs.adapter_training import rate_factors
from oarsmith.models.decoder import Decoder
from oarsmith.training.optimizer import (
    AdafactorSettings,
    Adam8bit,
    AdamMini,
    AdamW,
    AdamWSettings,
    ApolloSettings,
    GaLoreSettings,
    MuonSettings,
    Optimizer,
    adafactor,
    apollo,
    block_matrices,
    embedding_names,
    fused_matrices,
    galore,
    muon,
    offloaded,
    step_size_units,
)
from oarsmith.training.precision import has_fast_bf16
from oarsmith.training.ranks import ALONE, Ranks

Named = Iterable[tuple[str, nn.Parameter]]


def make_optimizer(config: TrainConfig, model: Decoder, ranks: Ranks = ALONE) -> Optimizer:
    """The update rule over the parameters that train, or what of them lies in this process."""
    build = _rule(config, model)
    trained = [(name, own_part(p, ranks)) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = offloaded(trained, build) if config.offload_optim else build(trained)
    optimizer.rate_factors = rate_factors(config, optimizer.parameters)
    return optimizer


def own_part(parameter: nn.Parameter, ranks: Ranks) -> nn.Parameter:
    """What of a parameter lies here, as one of its own."""
    own = ranks.local(parameter)
    assert isinstance(own, nn.Parameter), type(own)
    return own


def _rule(config: TrainConfig, model: Decoder) -> Callable[[Named], Optimizer]:
    adam = AdamWSettings(
        beta1=config.adam_beta1, beta2=config.adam_beta2, eps=config.adam_epsilon, weight_decay=config.weight_decay
    )
    rank, steps, scale = config.projection_rank or 128, config.projection_steps, config.projection_scale or 1.0
    match config.optim:
        case "adamw":
            return lambda named: AdamW(named, adam)
        case "adamw_8bit":
            return lambda named: Adam8bit(named, adam, wide=embedding_names(model))
        case "adamw_mini":
            return lambda named: AdamMini(named, adam, step_size_units(model))
        case "adafactor":
            factored = AdafactorSettings(weight_decay=config.weight_decay)
            return lambda named: adafactor(named, factored, fused_matrices(model))
        case "muon":
            products = torch.bfloat16 if has_fast_bf16(model.device) else torch.float32
            orthogonal = MuonSettings(momentum=config.muon_momentum, products=products, others=adam)
            return lambda named: muon(named, orthogonal, block_matrices(model))
        case "galore":
            projected = GaLoreSettings(rank=rank, steps=steps, scale=scale, adam=adam)
            return lambda named: galore(named, projected, block_matrices(model))
        case "apollo" | "apollo_mini":
            scaled = ApolloSettings(
                rank=rank,
                steps=steps,
                scale=scale,
                scaling="channel" if config.optim == "apollo" else "tensor",
                seed=config.seed,
                adam=adam,
            )
            return lambda named: apollo(named, scaled, block_matrices(model))
