"""Attention of rows that lie beside one another, each over places of its own: in plain PyTorch, for compiled graphs.

Nothing depends on a number that only Python has, so that any of the sizes may be a symbol.

Shapes: B rows, T queries of a row, S places of a row, H query heads, G kv heads, R = H / G heads that share a kv head,
K key dim, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.kernels.attention import Scores


def row_attention(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, positions_BT: Tensor, scores: Scores) -> Tensor:
    """softmax(scores) v [B, T, H, V]: a query sees the places of its row up to its own position."""
    groups = k_BSGK.shape[2]
    share = q_BTHK.shape[2] // groups
    key_S = torch.arange(k_BSGK.shape[1], device=q_BTHK.device)
    age_BTS = positions_BT[..., None] - key_S
    visible_BTS = age_BTS >= 0
    if scores.window is not None:
        visible_BTS = visible_BTS & (age_BTS < scores.window)
    # Heads that share a key lie behind one another as queries: no copy of the keys.
    q_BGNK = q_BTHK.unflatten(2, (groups, share)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k_BGSK, v_BGSV = k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2)
    if scores.softcap is None and scores.bias_HP is None and scores.sinks_H is None:
        mask_B1NS = visible_BTS[:, None].expand(-1, share, -1, -1).flatten(1, 2)[:, None]
        o_BGNV = functional.scaled_dot_product_attention(
            q_BGNK, k_BGSK, v_BGSV, attn_mask=mask_B1NS, scale=scores.scale
        )
    else:
        s_BHTS = (q_BGNK @ k_BGSK.transpose(2, 3)).float().unflatten(2, (share, -1)).flatten(1, 2) * scores.scale
        p_BHTS = _probabilities(s_BHTS, visible_BTS, positions_BT, scores).to(v_BSGV.dtype)
        o_BGNV = p_BHTS.unflatten(1, (groups, share)).flatten(2, 3) @ v_BGSV
    return o_BGNV.unflatten(2, (share, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)


def _probabilities(s_BHTS: Tensor, visible_BTS: Tensor, positions_BT: Tensor, scores: Scores) -> Tensor:
    """Softmax in fp32 of what the rules make of the scores."""
    if scores.softcap is not None:
        s_BHTS = (s_BHTS / scores.softcap).tanh() * scores.softcap
    if scores.bias_HP is not None:
        own_BHT = scores.bias_HP[:, positions_BT].transpose(0, 1)
        s_BHTS = s_BHTS + scores.bias_HP[:, None, : s_BHTS.shape[-1]] - own_BHT[..., None]
    s_BHTS = s_BHTS.masked_fill(~visible_BTS[:, None], -torch.inf)
    if scores.sinks_H is None:
        return s_BHTS.softmax(-1)
    sinks_BHT1 = scores.sinks_H.float()[:, None, None].expand(s_BHTS.shape[0], -1, s_BHTS.shape[2], 1)
    return torch.cat((s_BHTS, sinks_BHT1), -1).softmax(-1)[..., :-1]
