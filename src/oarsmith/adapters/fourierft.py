"""FourierFT: the change of W is the inverse Fourier transform of a few coefficients (Gao et al. 2024).

W + scaling * Re(F^-1 S), eq. 2 to 4, where S [O, I] has n entries at random places, which a seed says (PEFT's
``random_loc_seed``: all projections of one size have the same). The change is never built: the transform over columns
goes to the tokens, n products are added up by rows, and the transform over rows follows. Unlike in the paper, where
they are normally distributed, the coefficients begin at zero, so that training begins at the base model.

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


@dataclass(frozen=True, kw_only=True)
class FourierFt(Change):
    """The coefficients [N]."""

    keys: ClassVar[Mapping[str, str]] = {"spectrum": "fourierft_spectrum"}

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
        rows_N, columns_N = _entries(on.size, self.number, self.seed, x_TI.device)
        # The transforms are there in fp32 only.
        dropped_TI = functional.dropout(x_TI.float(), self.dropout, training)
        picked_TN = torch.fft.ifft(dropped_TI).index_select(-1, columns_N) * on["spectrum"]
        sums_TO = picked_TN.new_zeros(*x_TI.shape[:-1], on.size.out_features).index_add(-1, rows_N, picked_TN)
        return (torch.fft.ifft(sums_TO).real * self.scaling).to(x_TI.dtype)

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
