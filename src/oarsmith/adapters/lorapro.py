"""LoRA-Pro (Wang, Liang et al. 2024): gradients of A and B whose step is nearest to that of full fine-tuning.

Shapes: I in features, O out features, r rank; stacked maps have a leading axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from oarsmith.adapters.adapted import adapted_maps
from oarsmith.adapters.lora import Lora, alpha_of
from oarsmith.config.adapters import AdapterKeys
from oarsmith.models.decoder import Decoder
from oarsmith.training.update_hooks import UpdateHooks

# Directions of A or B with less than this share of its largest singular value's square are taken for absent.
_ABSENT = 1e-10


@dataclass(frozen=True, kw_only=True)
class LoraPro(Lora):
    """LoRA; it differs in how it is trained (:class:`FullGradients`)."""


def make_lorapro(keys: AdapterKeys) -> LoraPro:
    """LoRA-Pro as a configuration asks for it."""
    return LoraPro(rank=keys.lora_rank, alpha=alpha_of(keys), rslora=keys.rslora, dropout=keys.lora_dropout)


@dataclass(frozen=True)
class _Pair:
    a: str
    b: str
    scale: float


class FullGradients(UpdateHooks):
    """Adjusts the gradients of each pair of LoRA matrices before the optimizer sees them.

    Any optimizer then runs on them, with its state in the shape of A and B (the paper's algorithm 1 with its own
    optimizer on top); its variant with Adam's moments in the shape of W takes the memory of full fine-tuning.
    """

    def __init__(self, model: Decoder) -> None:
        self._parameters: dict[str, nn.Parameter] = {}
        self._pairs: list[_Pair] = []
        for path, module in adapted_maps(model):
            for segment, change in module.changes.items():
                if isinstance(change, LoraPro):
                    a, b = (f"{path}.adapter.{segment}.{name}" for name in ("lora_A", "lora_B"))
                    self._parameters |= {name: model.get_parameter(name) for name in (a, b)}
                    self._pairs.append(_Pair(a, b, change.scale))

    @torch.no_grad()
    def adjusted(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(grads)
        for pair in self._pairs:
            a, b = self._parameters[pair.a], self._parameters[pair.b]
            found[pair.a], found[pair.b] = nearest(a, b, grads[pair.a], grads[pair.b], pair.scale)
        return found


def nearest(a_rI: Tensor, b_Or: Tensor, da_rI: Tensor, db_Or: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients gA, gB that minimise ||scale (gB A + B gA) - g||, where g is the gradient of W (theorems 2.1, 2.3).

    With dA = scale B^T g and dB = scale g A^T, the gradients backward gives:

        gA = (B^T B)^-1 dA / scale^2 + X A
        gB = (1 - B (B^T B)^-1 B^T) dB (A A^T)^-1 / scale^2 - B X

    The product does not depend on X; it is chosen to leave gA and gB nearest to dA and dB: B^T B X + X A A^T =
    -(B^T B)^-1 dA A^T / scale^2. Both sides' matrices are symmetric, so their eigenvectors solve the equation. Where B
    or A lacks directions (B is zero at first) inverses are pseudo-inverses, which solve the same problem.

    Linear in the gradients. Computed in fp64: small B make (B^T B)^-1 large.
    """
    a, b, da, db = (tensor.double() for tensor in (a_rI, b_Or, da_rI, db_Or))
    da, db = da / scale**2, db / scale**2
    in_b, b_basis = torch.linalg.eigh(b.mT @ b)
    in_a, a_basis = torch.linalg.eigh(a @ a.mT)
    b_inverse, a_inverse = _inverse(in_b, b_basis), _inverse(in_a, a_basis)
    best_a = b_inverse @ da
    best_b = (db - b @ (b_inverse @ (b.mT @ db))) @ a_inverse
    right = b_basis.mT @ (-best_a @ a.mT) @ a_basis
    x = b_basis @ (right * _reciprocal(in_b[..., :, None] + in_a[..., None, :])) @ a_basis.mT
    return (best_a + x @ a).to(da_rI.dtype), (best_b - b @ x).to(db_Or.dtype)


def _inverse(values: Tensor, basis: Tensor) -> Tensor:
    largest = values.amax(-1, keepdim=True)
    kept = torch.where(values > _ABSENT * largest, values, 0.0)
    return (basis * _reciprocal(kept)[..., None, :]) @ basis.mT


def _reciprocal(values: Tensor) -> Tensor:
    """1 / x, and 0 where x is not positive."""
    return torch.where(values > 0, 1 / values.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
