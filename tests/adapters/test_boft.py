"""BOFT beside PEFT with the one factor it has on a CPU, and beside PEFT's own matrices with several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor

from oarsmith.adapters.boft import Boft
from oarsmith.adapters.change import Sitting, Size
from oarsmith.adapters.peft_layout import CONFIG
from oarsmith.adapters.targets import match_targets
from oarsmith.errors import ConfigError

from .beside_peft import formula_close, read, read_by_peft, refused, same_answers_and_merge, same_gradients
from .conftest import Adapted, Base

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor"),
]


@pytest.fixture(autouse=True)
def _no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would try to compile its CUDA kernel for every layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


CASES: dict[str, dict[str, Any]] = {
    "all": {"boft_block_size": 4, "target_modules": "all-linear"},
    "by number": {"boft_block_size": 0, "boft_block_num": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "an odd size, and factors that are not there": {
        "boft_block_size": 3,
        "boft_n_butterfly_factor": 2,
        "target_modules": ["q_proj", "o_proj"],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    made = adapted("llama", kind=peft.BOFTConfig, **CASES[name])
    same_gradients(made, "boft_")
    same_answers_and_merge(made)


@pytest.mark.parametrize("change", [Boft(block_size=4), Boft(block_size=0, blocks=2)])
def test_ours(base: Callable[[str], Base], tmp_path: Path, change: Boft) -> None:
    targets = ("q_proj", "v_proj", "down_proj")
    read_by_peft(base("llama"), tmp_path / "adapter", lambda m: dict.fromkeys(match_targets(m, targets), change))


def rotation_of_peft(raw: Tensor) -> Tensor:
    """Its product of permuted block-diagonal matrices, in fp64."""
    layer = BOFTLayer.__new__(BOFTLayer)
    factors, number, side, _ = raw.shape
    width, product = number * side, torch.eye(number * side).double()
    for factor in range(factors):
        order = layer.block_butterfly_perm(width, number // 2**factor, side // 2, factors - 1)
        moved = layer.perm2mat(order).double()
        skew = (raw[factor] - raw[factor].transpose(1, 2)).double() / 2
        eye = torch.eye(side).double()
        blocks = [(eye - q) @ torch.linalg.inv(eye + q) for q in skew]
        product = (moved @ torch.block_diag(*blocks) @ moved.t()) @ product
    return product


@pytest.mark.parametrize(("side", "number", "factors"), [(2, 4, 2), (4, 8, 3), (2, 16, 5), (6, 4, 1), (6, 4, 3)])
def test_several_factors(side: int, number: int, factors: int) -> None:
    size, generator = Size(5, side * number), torch.Generator().manual_seed(1)
    change = Boft(block_size=side, factors=factors)
    raw = torch.randn(change.shapes(size)["boft_R"], generator=generator)
    scale, bias = torch.rand(5, 1, generator=generator) + 0.5, torch.randn(5, generator=generator)
    x, weight = torch.randn(6, side * number, generator=generator), torch.randn(5, side * number, generator=generator)
    on = Sitting(size, {"boft_R": raw, "boft_s": scale})
    rotation = rotation_of_peft(raw)
    formula_close(change.before(on, x), x.double() @ rotation)
    merged = scale.double() * (weight.double() @ rotation.t())
    formula_close(change.merged(on, weight), merged)
    y = torch.nn.functional.linear(change.before(on, x), weight, bias)
    formula_close(change.after(on, y, bias, lambda: weight), x.double() @ merged.t() + bias.double())
    if factors > 1:
        reach = (rotation.abs() > 1e-9).sum(1)
        assert reach.min() >= side << (factors - 1), "each factor doubles the reach"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (Boft(block_size=5), "blocks of 5 do not divide 24 features"),
        (Boft(block_size=0, blocks=7), "7 blocks do not divide 24 features"),
        (Boft(block_size=3, factors=2), "2 butterfly factors need blocks of an even size"),
        (Boft(block_size=4, factors=3), "4 of which side by side divide 24 features; 4 does not"),
    ],
)
def test_sizes_that_do_not_fit(change: Boft, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        change.shapes(Size(5, 24))


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"boft_block_num": 3}, "boft_block_num is 3 and boft_block_size 4"), ({"boft_block_size": 6}, "has shape")],
)
def test_damaged_configs(adapted: Callable[..., Adapted], changes: dict[str, Any], part: str) -> None:
    made = adapted("llama", kind=peft.BOFTConfig, boft_block_size=4, target_modules=["q_proj"])
    config = json.loads((made.path / CONFIG).read_text())
    (made.path / CONFIG).write_text(json.dumps({**config, **changes}))
    assert part in refused(lambda: read(made))
