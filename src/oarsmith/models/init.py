"""Fresh weights for a model built from its config alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from oarsmith.models.decoder import Decoder
from oarsmith.models.norm import LayerNorm, RMSNorm
from oarsmith.models.spec import DecoderSpec


@torch.no_grad()
def init_weights(model: Decoder, seed: int) -> None:
    """Normal(0, ``spec.init_std``) for matrices, zero for biases, identity for norms.

    Maps that write to the residual stream have ``spec.residual_init_std`` where the family's paper scales them.
    The same seed gives the same weights on any machine: values are drawn on the CPU in module order.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = model.spec
    for path, module in model.named_modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(0.0 if module.spec.unit_offset else 1.0)
        elif isinstance(module, LayerNorm):
            if module.weight is not None:
                module.weight.fill_(1.0)
            if module.bias is not None:
                module.bias.zero_()
        else:
            writes = path.startswith("layers.") and path.rsplit(".", 1)[-1] in ("out", "down")
            std = spec.init_std if spec.residual_init_std is None or not writes else spec.residual_init_std
            for name, parameter in module.named_parameters(recurse=False):
                _fill(parameter, name, std, generator)


def fresh_scores(spec: DecoderSpec, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Values that a head of scores begins with, as transformers draws them: normal(0, ``spec.init_std``), fp32."""
    return torch.empty(tuple(shape)).normal_(0.0, spec.init_std, generator=generator)


@torch.no_grad()
def reset_scores(model: Decoder, seed: int) -> None:
    """Give a model the head of scores that training begins with."""
    weight = model.head.weight
    assert weight is not None, "a head of scores is never tied"
    weight.copy_(fresh_scores(model.spec, weight.shape, torch.Generator().manual_seed(seed)))


def _fill(parameter: nn.Parameter, name: str, std: float, generator: torch.Generator) -> None:
    if name in ("bias", "correction"):
        parameter.zero_()
    else:
        values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        parameter.copy_(values)
