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
    """Round the maps of the layers to ``int8`` or ``int4``, the embedding and the output matrix to int8, in place.

    A head of scores stays: it takes no room, and every digit of it counts.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.weight.copy_(rounded(module.weight, weights))
    model.embedding.weight.copy_(rounded(model.embedding.weight, "int8"))
    if model.head.weight is not None and model.spec.head.num_scores is None:
        model.head.weight.copy_(rounded(model.head.weight, "int8"))


def rounded(weight: Tensor, weights: str) -> Tensor:
    """W [..., I] in groups of 32 columns with an fp16 scale each (int4: and an fp16 low), as GGUF's Q8_0 and Q4_1."""
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
        scale_G, low_G = _int4_range(own_G)
        found_G = ((groups_G - low_G) / scale_G.where(scale_G != 0, 1)).round().clamp(0, 15) * scale_G + low_G
    return found_G.flatten(-2)[..., :size].to(weight.dtype)


def _int4_range(x_G: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and low of groups [..., 32].

    Weights that had 4 bits before are kept as they are. Others get a low that is a multiple of the scale, so that zero
    is one of the numbers: near-zero weights of inputs that are always large stay near zero.
    """
    top_G, bottom_G = x_G.amax(-1, keepdim=True), x_G.amin(-1, keepdim=True)
    step_G = ((top_G - bottom_G) / 15).half().float()
    aligned_G = ((bottom_G / step_G.where(step_G != 0, 1)).round() * step_G).half().float()
    least_G = bottom_G.half().float()
    around_zero_G = (bottom_G < 0) & (top_G > 0) & (step_G != 0)
    scale_G = step_G.where(around_zero_G, ((top_G - least_G) / 15).half().float())
    low_G = aligned_G.where(around_zero_G, least_G)
    # Where fp16 holds only the upper end, steps go down from there: the scale is negative.
    down_G = (top_G.half().float() == top_G) & (least_G != bottom_G)
    end_G = torch.where(down_G, top_G, least_G)
    range_G = torch.where(down_G, bottom_G - top_G, (top_G - least_G).clamp_min(0))
    for steps in range(8, 16):
        number_G = (x_G - end_G) * (steps / range_G)
        whole_G = (number_G - number_G.round()).abs().amax(
            -1, keepdim=True
        ) < 0.05  # bf16 has lost a little of a weight
        scale_G = torch.where(whole_G, (range_G / steps).half().float(), scale_G)
        low_G = torch.where(whole_G, end_G, low_G)
    return scale_G.where(range_G != 0, 0), low_G.where(range_G != 0, end_G)
