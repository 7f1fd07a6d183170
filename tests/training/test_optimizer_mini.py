"""Adam-mini against the paper's algorithm in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from oarsmith.training.optimizer import AdamMini, AdamWSettings

SETTINGS = AdamWSettings(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.2)
SHAPES = {
    "qkv.weight": (8, 5),
    "mlp.weight": (4, 6),
    "experts.weight": (2, 3, 5),
    "norm.weight": (7,),
    "mlp.bias": (4,),
}
# Two heads of 2 rows for q, one for k, and v by rows.
UNITS = {"qkv.weight": (2, 2, 2, 1, 1)}
# Elements that share a step size, by hand.
PARTITION = {
    "qkv.weight": [slice(0, 10), slice(10, 20), slice(20, 30), slice(30, 35), slice(35, 40)],
    "mlp.weight": [slice(start, start + 6) for start in range(0, 24, 6)],
    "experts.weight": [slice(start, start + 5) for start in range(0, 30, 5)],
    "norm.weight": [slice(0, 7)],
    "mlp.bias": [slice(index, index + 1) for index in range(4)],  # plain Adam
}


def tensor(name: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + list(SHAPES).index(name))
    return torch.randn(SHAPES[name], generator=generator)


def test_as_the_paper() -> None:
    optimizer = AdamMini([(name, nn.Parameter(tensor(name, 0))) for name in SHAPES], SETTINGS, UNITS)
    for step in range(1, 7):
        optimizer.step({name: tensor(name, step) for name in SHAPES}, lr=0.01, grad_scale=0.5)
    for name, parts in PARTITION.items():
        weight, m = tensor(name, 0).double().numpy().ravel(), 0.0
        second = np.zeros(len(parts))
        decay = 0.0 if name in ("norm.weight", "mlp.bias") else 0.2
        for step in range(1, 7):
            grad = tensor(name, step).double().numpy().ravel() * 0.5
            m = 0.8 * m + 0.2 * grad
            weight = weight * (1 - 0.01 * decay)
            for index, part in enumerate(parts):
                second[index] = 0.9 * second[index] + 0.1 * (grad[part] ** 2).mean()
                size = np.sqrt(second[index] / (1 - 0.9**step)) + 1e-6
                weight[part] -= 0.01 * m[part] / (1 - 0.8**step) / size
        found = optimizer.parameters[name].detach().numpy().ravel()
        np.testing.assert_allclose(found, weight, rtol=1e-5, atol=1e-6, err_msg=name)


def test_half_the_state() -> None:
    optimizer = AdamMini([("w.weight", nn.Parameter(torch.zeros(100, 50)))], SETTINGS, {})
    assert sum(t.numel() for t in optimizer.state_tensors().values()) == 100 * 50 + 100


def test_units_that_do_not_fill_the_rows_are_refused() -> None:
    with pytest.raises(AssertionError, match="7 of 8 rows"):
        AdamMini([("qkv.weight", nn.Parameter(torch.zeros(8, 5)))], SETTINGS, {"qkv.weight": (4, 3)})
