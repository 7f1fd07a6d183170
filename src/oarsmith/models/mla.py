"""Multi-head latent attention over a token stream.

Shapes: T tokens, D hidden, H heads, N nope dim, R rope dim, V value dim, L latent dim, S slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from oarsmith import kernels
from oarsmith.kernels import Scores
from oarsmith.models.attention import attend
from oarsmith.models.layout import Cache, CacheShape, Layout
from oarsmith.models.linear import build_linear
from oarsmith.models.norm import build_norm
from oarsmith.models.position import PositionTables
from oarsmith.models.recompute import run
from oarsmith.models.spec_parts import MLA


class LatentAttention(nn.Module):
    """Caches the latent and the shared rotary key: L + R numbers a token, whatever the number of heads."""

    def __init__(self, spec: MLA, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.q_down = build_linear(spec.q_down) if spec.q_down is not None else None
        self.q_norm = build_norm(spec.q_norm) if spec.q_norm is not None else None
        self.q_up = build_linear(spec.q_up)
        self.kv_down = build_linear(spec.kv_down)
        self.kv_norm = build_norm(spec.kv_norm)
        self.kv_up = build_linear(spec.kv_up)
        self.out = build_linear(spec.out)

    @property
    def cache_shape(self) -> CacheShape:
        return CacheShape(slots=((self.spec.latent_dim + self.spec.rope_dim,),))

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        tables: PositionTables,
        cache: Cache | None,
        *,
        recompute_core: bool = False,
    ) -> Tensor:
        spec, rotate = self.spec, tables.rotations[self.spec.position]
        q_T = x_TD if self.q_down is None else self.q_down(x_TD)
        q_T = q_T if self.q_norm is None else self.q_norm(q_T)
        q_THK = self.q_up(q_T).unflatten(-1, (spec.num_heads, spec.nope_dim + spec.rope_dim))
        q_THN, q_THR = q_THK.split((spec.nope_dim, spec.rope_dim), dim=-1)
        q_THR = rotate(q_THR)
        latent_TL, k_TR = self.kv_down(x_TD).split((spec.latent_dim, spec.rope_dim), dim=-1)
        latent_TL, k_T1R = self.kv_norm(latent_TL), rotate(k_TR[:, None])
        if cache is not None:
            (stored_SM,) = cache.write(self.layer, torch.cat((latent_TL, k_T1R[:, 0]), -1))
            if not layout.fresh:
                return self.out(self._over_cache(q_THN, q_THR, stored_SM, layout).flatten(-2))
            latent_TL, k_T1R = self._split(stored_SM)
        o_THV = self._expanded(q_THN, q_THR, latent_TL, k_T1R, layout, recompute_core=recompute_core)
        return self.out(o_THV.flatten(-2))

    def _split(self, kept_SM: Tensor) -> tuple[Tensor, Tensor]:
        latent_SL, k_SR = kept_SM.split((self.spec.latent_dim, self.spec.rope_dim), dim=-1)
        return latent_SL, k_SR[:, None]

    def _expanded(
        self,
        q_THN: Tensor,
        q_THR: Tensor,
        latent_SL: Tensor,
        k_S1R: Tensor,
        layout: Layout,
        *,
        recompute_core: bool = False,
    ) -> Tensor:
        """Keys and values of every head made of the latent: fewer products where there are many queries."""
        spec = self.spec

        def core(q_THN: Tensor, q_THR: Tensor, kv_SHK: Tensor, k_S1R: Tensor) -> Tensor:
            k_SHN, v_SHV = kv_SHK.split((spec.nope_dim, spec.v_dim), dim=-1)
            k_SHK = torch.cat((k_SHN, k_S1R.expand(-1, spec.num_heads, -1)), -1)
            q_THK = torch.cat((q_THN, q_THR), -1)
            return attend(q_THK, k_SHK, v_SHV.contiguous(), layout, Scores(spec.scale))

        kv_SHK = self.kv_up(latent_SL).unflatten(-1, (spec.num_heads, spec.nope_dim + spec.v_dim))
        return run(core, q_THN, q_THR, kv_SHK, k_S1R, again=recompute_core)

    def _over_cache(self, q_THN: Tensor, q_THR: Tensor, stored_SM: Tensor, layout: Layout) -> Tensor:
        """Attention over the latents themselves: ``kv_up`` moves to the queries and to the outputs (section 2.1.2)."""
        spec = self.spec
        if spec.kv_up.rewrite is not None or spec.kv_up.bias:
            if layout.ranges is not None:
                stored_SM, layout = kernels.gather(stored_SM, layout.ranges), replace(layout, ranges=None)
            return self._expanded(q_THN, q_THR, *self._split(stored_SM), layout)
        up_HKL = self.kv_up.weight.unflatten(0, (spec.num_heads, -1))
        k_HNL, v_HVL = up_HKL.split((spec.nope_dim, spec.v_dim), dim=1)
        q_HTL = torch.bmm(q_THN.transpose(0, 1), k_HNL)
        q_THM = torch.cat((q_HTL.transpose(0, 1), q_THR), -1)
        keys_S1M = stored_SM.unsqueeze(-2)
        o_THL = attend(q_THM, keys_S1M, keys_S1M[..., : spec.latent_dim], layout, Scores(spec.scale))
        return torch.bmm(o_THL.transpose(0, 1), v_HVL.transpose(1, 2)).transpose(0, 1)
