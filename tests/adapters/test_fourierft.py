"""FourierFT beside PEFT and beside the transform of the whole matrix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from oarsmith.adapters.change import Change, Sitting, Size
from oarsmith.adapters.fourierft import FourierFt, _entries
from oarsmith.adapters.targets import match_targets
from oarsmith.errors import ConfigError

from .beside_peft import read_by_peft, same_answers_and_merge, same_gradients
from .conftest import Adapted, Base

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all": (
        "llama",
        {"n_frequency": 40, "scaling": 30.0, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]},
    ),
    "patterns": (
        "llama",
        {
            "n_frequency": 30,
            "scaling": 40.0,
            "random_loc_seed": 3,
            "target_modules": ["q_proj", "up_proj"],
            "n_frequency_pattern": {"up_proj": 77},
        },
    ),
    "gpt2": ("gpt2", {"n_frequency": 90, "scaling": 90.0, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    kind, arguments = CASES[name]
    made = adapted(kind, kind=peft.FourierFTConfig, **arguments)
    same_gradients(made, "fourierft_spectrum")
    same_answers_and_merge(made)


def test_ours(base: Callable[[str], Base], tmp_path: Path) -> None:
    def choose(modules: Any) -> dict[str, Change]:
        special = dict.fromkeys(match_targets(modules, "o_proj"), FourierFt(number=9, scaling=90.0, seed=5))
        return dict.fromkeys(match_targets(modules, "all-linear"), FourierFt(number=50, scaling=90.0, seed=5)) | special

    read_by_peft(base("llama"), tmp_path / "adapter", choose)


@pytest.mark.parametrize("size", [Size(24, 40), Size(9, 7), Size(1, 5), Size(6, 1)])
def test_the_formula(size: Size) -> None:
    change, generator = FourierFt(number=5, scaling=3.0, seed=1), torch.Generator().manual_seed(1)
    spectrum = torch.randn(5, generator=generator).requires_grad_()
    x = torch.randn(3, size.in_features, generator=generator).requires_grad_()
    on = Sitting(size, {"spectrum": spectrum})
    found = change.added(on, x, training=False)
    rows, columns = _entries(size, 5, 1, torch.device("cpu"))
    wide, tokens = spectrum.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    o, i = (torch.arange(n).double() for n in (size.out_features, size.in_features))
    turns = (rows[:, None, None] * o[:, None] / len(o)) + (columns[:, None, None] * i / len(i))
    delta = 3.0 * (wide[:, None, None] * (2 * torch.pi * turns).cos()).sum(0) / (len(o) * len(i))
    expected = tokens @ delta.t()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    weight = torch.zeros(size.out_features, size.in_features)
    torch.testing.assert_close(change.merged(on, weight).double(), delta, rtol=1e-5, atol=1e-6)
    dout = torch.randn(found.shape, generator=generator)
    ours = torch.autograd.grad(found, [x, spectrum], dout)
    theirs = torch.autograd.grad(expected, [tokens, wide], dout.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_more_than_there_are() -> None:
    with pytest.raises(ConfigError, match="21 frequencies are more than a projection of 4 to 5 features has"):
        FourierFt(number=21, scaling=1.0, seed=1).shapes(Size(5, 4))
