"""Rotations that spread outliers over all channels: randomized Hadamard matrices, and their like for any size.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456, section 3) and SpinQuant (Liu et al. 2024, arXiv 2405.16406): an
orthogonal Q put into one weight and its transpose into the next leaves a model the function that it is. A size D = P R
with P its largest power of two gets Q = diag(signs) (Hadamard_P x M_R), M a random orthogonal matrix.

Shapes: D features, P the power of two, R the odd rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from oarsmith.errors import ModelError
from oarsmith.kernels.int8 import rotate


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [D, D] in parts: signs [D] of 1 and -1, and the orthogonal [R, R]; float64."""

    signs_D: Tensor
    mix_RR: Tensor

    @property
    def size(self) -> int:
        """D."""
        return len(self.signs_D)

    def matrix(self) -> Tensor:
        """Q, whole, in float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def apply(self, x: Tensor) -> Tensor:
        """x Q of rows x [.., D], in their dtype: P log P additions for each row instead of a product with all of Q."""
        x = x * self.signs_D.to(x)
        parts = hadamard(x.unflatten(-1, (-1, len(self.mix_RR))).transpose(-1, -2)).transpose(-1, -2)
        return (parts @ self.mix_RR.to(x)).flatten(-2)

    def undo(self, x: Tensor) -> Tensor:
        """x Q^T of rows x [.., D]: what takes `apply` back."""
        parts = x.unflatten(-1, (-1, len(self.mix_RR))) @ self.mix_RR.T.to(x)
        return hadamard(parts.transpose(-1, -2)).transpose(-1, -2).flatten(-2) * self.signs_D.to(x)


def random_rotation(size: int, seed: int = 0) -> Rotation:
    """A rotation of any size, the same for the same seed.

    Raises:
        ModelError: for no feature at all.
    """
    if size < 1:
        raise ModelError(f"nothing of size {size} can be rotated", fix="give a size of 1 or more")
    generator = torch.Generator().manual_seed(seed)
    signs_D = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    rest = size // (size & -size)
    return Rotation(signs_D, random_orthogonal(rest, generator))


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix in float64, uniform over all of them (Mezzadri 2007: QR with R's diagonal positive)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


def hadamard(x: Tensor) -> Tensor:
    """x H of rows x [.., P] with Sylvester's Hadamard matrix over sqrt(P), by the fast Walsh-Hadamard transform.

    Raises:
        ModelError: where P is no power of two.
    """
    size = x.shape[-1]
    if size & (size - 1) or size == 0:
        raise ModelError(
            f"{size} is no power of two", where="hadamard", fix="use random_rotation, which takes any size"
        )
    return rotate(x, size)
