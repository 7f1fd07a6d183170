"""FourierFT: the change of W is the inverse Fourier transform of a few coefficients (Gao et al. 2024).

W + scaling * Re(F^-1 S), eq. 2 to 4, where S [O, I] has n entries at random places, which a seed says (PEFT's
``random_loc_seed``: all projections of one size have the same). The change is never built: the transform over columns
goes to the tokens, n products are added up by rows, and the transform over rows follows. Tokens and results are real,
so both are transforms of half the length, where an entry beyond the half is its mirror image's conjugate.

In the paper the coefficients are normally distributed at first; here they are zero, so that training begins at the base
model.

Shapes: T tokens, I in features, O out features, N coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.change import Change, Sitting, Size, Weight
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.tables import table
from oarsmith.config.adapters import AdapterKeys
from oarsmith.errors import CheckpointError, ConfigError


@table
def _entries(size: Size, number: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the coefficients, as PEFT draws them."""
    rows, columns = size.out_features, size.in_features
    generator = torch.Generator().manual_seed(seed)
    places_N = torch.randperm(rows * columns, generator=generator, device="cpu")[:number].clone()
    return (places_N // columns).to(device), (places_N % columns).to(device)


@table
def _halved(size: Size, number: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The same among the first halves, and what their real and imaginary parts are multiplied by [N, 2]."""
    rows_N, columns_N = _entries(size, number, seed, device)
    height, width = size.out_features, size.in_features
    row_mirrored, column_mirrored = 2 * rows_N > height, 2 * columns_N > width
    near_N = torch.where(row_mirrored, height - rows_N, rows_N)
    # The transform of rows adds the mirror image of all but the first entry and one in the middle.
    share_N = torch.where((near_N == 0) | (2 * near_N == height), 1.0, 0.5) / width
    # The inverse transform of columns is the conjugate of the forward one.
    sign_N = torch.where(row_mirrored == column_mirrored, -1.0, 1.0)
    return (
        near_N,
        torch.where(column_mirrored, width - columns_N, columns_N),
        torch.stack([share_N, share_N * sign_N], 1),
    )


@dataclass(frozen=True, kw_only=True)
class FourierFt(Change):
    """The coefficients [N]."""

    keys: ClassVar[Mapping[str, str]] = {"spectrum": "fourierft_spectrum"}
    adds: ClassVar[bool] = True

    number: int
    scaling: float
    seed: int
    dropout: float = 0.0

    def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        if self.number > size.out_features * size.in_features:
            raise ConfigError(
                f"{self.number} frequencies are more than a projection of {size.in_features} to {size.out_features} "
                "features has",
                where="fourierft_frequencies",
                fix="lower it",
            )
        return {"spectrum": (self.number,)}

    def reset(self, on: Sitting, generator: torch.Generator, weight: Weight) -> None:
        on["spectrum"].zero_()

    def added(self, on: Sitting, x_TI: Tensor, *, training: bool) -> Tensor:
        rows_N, columns_N, parts_N2 = _halved(on.size, self.number, self.seed, x_TI.device)
        # The transforms are there in fp32 only.
        dropped_TI = functional.dropout(x_TI.float().reshape(-1, on.size.in_features), self.dropout, training)
        # Entries first: those of all tokens lie together, and are picked and added up in runs.
        found_IT2 = torch.view_as_real(torch.fft.rfft(dropped_TI).t().contiguous())
        scaled_N2 = parts_N2 * (self.scaling * on["spectrum"])[:, None]
        picked_NT2 = found_IT2.index_select(0, columns_N) * scaled_N2[:, None]
        height = on.size.out_features
        sums_OT2 = picked_NT2.new_zeros(height // 2 + 1, *picked_NT2.shape[1:]).index_add(0, rows_N, picked_NT2)
        y_TO = torch.fft.irfft(torch.view_as_complex(sums_OT2).t().contiguous(), n=height)
        return y_TO.to(x_TI.dtype).view(*x_TI.shape[:-1], height)

    def merged(self, on: Sitting, weight_OI: Tensor) -> Tensor:
        rows_N, columns_N = _entries(on.size, self.number, self.seed, weight_OI.device)
        spectrum_OI = torch.zeros_like(weight_OI)
        spectrum_OI[rows_N, columns_N] = on["spectrum"]
        return weight_OI + torch.fft.ifft2(spectrum_OI).real * self.scaling

    def peft_config(self) -> dict[str, Any]:
        return {
            "peft_type": "FOURIERFT",
            "n_frequency": self.number,
            "scaling": self.scaling,
            "random_loc_seed": self.seed,
            "init_weights": True,
            "bias": "none",
        }

    @classmethod
    def peft_configs(cls, changes: Mapping[str, Change]) -> dict[str, Any]:
        """Projections may differ in the number."""
        configs = {name: dict(change.peft_config()) for name, change in changes.items()}
        common = next(iter(configs.values()))
        numbers = {name: config["n_frequency"] for name, config in configs.items()}
        return {**common, "n_frequency_pattern": {n: k for n, k in numbers.items() if k != common["n_frequency"]}}


def make_fourierft(keys: AdapterKeys) -> FourierFt:
    """FourierFT as a configuration asks for it."""
    return FourierFt(
        number=keys.fourierft_frequencies,
        scaling=keys.fourierft_scaling,
        seed=keys.fourierft_seed,
        dropout=keys.lora_dropout,
    )


def read_fourierft(config: PeftConfig, module: str, shapes: Mapping[str, tuple[int, ...]]) -> FourierFt:
    """FourierFT on a projection, from PEFT's file; the number of coefficients is what the file has."""
    config.refuse("modules_to_save")
    shape = shapes["fourierft_spectrum"]
    if len(shape) != 1 or shape[0] == 0:
        raise CheckpointError(f"{module} has a fourierft_spectrum of shape {shape}, not 1 axis", where=config.where)
    return FourierFt(
        number=shape[0],
        scaling=config.number("scaling", 150.0),
        seed=config.whole("random_loc_seed", 777, least=0),
    )
