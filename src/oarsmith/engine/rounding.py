"""Weights rounded to 8 or 4 bits, kept in their own type: what the compiled step computes with, for PyTorch.

It saves no memory; it makes the same model where the compiled step cannot serve.
Shapes: O out, I in features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear

GROUP = 32


@torch.no_grad()
def round_weights(model: Decoder, weights: str) -> None:
    """Round the maps of the layers to ``int8`` or ``int4``, the embedding and the output matrix to int8, in place."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.copy_(rounded(module.weight, weights))
    model.embedding.weight.copy_(rounded(model.embedding.weight, "int8"))
    if model.head.weight is not None:
        model.head.weight.copy_(rounded(model.head.weight, "int8"))


def rounded(weight: Tensor, weights: str) -> Tensor:
    """W [..., I] in groups of 32 columns, each with its own fp16 scale (int4: and fp16 minimum), as GGUF's Q8_0 and
    Q4_1."""
    size = weight.shape[-1]
    groups_G = functional.pad(weight.float(), (0, -size % GROUP)).unflatten(-1, (-1, GROUP))
    if weights == "int8":
        scale_G = (groups_G.abs().amax(-1, keepdim=True) / 127).half().float()
        found_G = (groups_G / scale_G.where(scale_G > 0, 1)).round().clamp(-127, 127) * scale_G
    else:
        own_G = groups_G
        if size % GROUP:  # padding has no part in the range
            inside = torch.arange(groups_G.shape[-2] * GROUP, device=weight.device).view(-1, GROUP) < size
            own_G = groups_G.where(inside, groups_G[..., :1])
        low_G = own_G.amin(-1, keepdim=True).half().float()
        scale_G = ((own_G.amax(-1, keepdim=True) - low_G).clamp_min(0) / 15).half().float()
        found_G = ((groups_G - low_G) / scale_G.where(scale_G > 0, 1)).round().clamp(0, 15) * scale_G + low_G
    return found_G.flatten(-2)[..., :size].to(weight.dtype)
