"""OFT beside PEFT, its series and its exact form, blocks of any size, and the ball of the constrained one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.oft.layer import OFTLayer

from oarsmith.adapters.change import Sitting, Size
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.oft import Oft, cayley, nearest_divisor
from oarsmith.adapters.peft_layout import CONFIG, adapter_tensors
from oarsmith.adapters.targets import match_targets

from .beside_peft import (
    formula_close,
    fresh,
    randomised,
    read,
    read_by_peft,
    refused,
    same_answers_and_merge,
    same_gradients,
)
from .conftest import Adapted, Base, tokens

CASES: dict[str, dict[str, Any]] = {
    "all": {"oft_block_size": 8, "target_modules": "all-linear"},
    "a size that does not divide": {"oft_block_size": 7, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "by number": {"r": 3, "oft_block_size": 0, "target_modules": ["q_proj", "down_proj"]},
    "exact": {"oft_block_size": 6, "use_cayley_neumann": False, "target_modules": ["k_proj", "up_proj"]},
    "two terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 2, "target_modules": ["q_proj"]},
    "three terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 3, "target_modules": ["q_proj"]},
    "eight terms": {"oft_block_size": 6, "num_cayley_neumann_terms": 8, "target_modules": ["q_proj"]},
    "shared": {"oft_block_size": 6, "block_share": True, "target_modules": ["q_proj", "o_proj"]},
    "constrained": {"oft_block_size": 6, "coft": True, "eps": 0.9, "target_modules": ["q_proj", "o_proj"]},
    "shared and constrained": {
        "oft_block_size": 6,
        "block_share": True,
        "coft": True,
        "eps": 0.4,
        "target_modules": ["q_proj"],
    },
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Invalid")
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    made = adapted("llama", kind=peft.OFTConfig, **CASES[name])
    if "coft" not in CASES[name]:
        same_gradients(made, "oft_R")
    same_answers_and_merge(made)


OURS = {
    "series": Oft(block_size=6),
    "by number": Oft(block_size=0, blocks=5),
    "exact": Oft(block_size=4, terms=None),
    "constrained": Oft(block_size=4, within=0.9),
    "shared": Oft(block_size=4, shared_block=True, terms=3),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.filterwarnings("ignore:Invalid")
def test_ours(base: Callable[[str], Base], tmp_path: Path, name: str) -> None:
    targets = ("q_proj", "v_proj", "down_proj")
    read_by_peft(
        base("llama"), tmp_path / "adapter", lambda m: dict.fromkeys(match_targets(m, targets), OURS[name]), std=0.2
    )


def test_nearest_divisor() -> None:
    layer = OFTLayer.__new__(OFTLayer)
    for number in [*range(1, 100), 576, 1536, 4864]:
        for wanted in range(1, 70):
            divides = number % wanted == 0 and wanted <= number
            expected = wanted if divides else layer.adjust_oft_parameters(number, wanted)
            assert nearest_divisor(number, wanted) == expected, (number, wanted)


def test_blocks_turn() -> None:
    """Exact ones keep lengths; a block of two is a turn by twice the arcus tangent."""
    change, size = Oft(block_size=4, terms=None), Size(3, 12)
    vector = torch.randn(change.shapes(size)["oft_R"], generator=torch.Generator().manual_seed(1))
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    turned = change.before(Sitting(size, {"oft_R": vector}), x)
    torch.testing.assert_close(turned.unflatten(1, (3, 4)).norm(dim=2), x.unflatten(1, (3, 4)).norm(dim=2))
    angle = 2 * torch.tensor(0.3).atan()
    block = cayley(torch.tensor([[[0.0, 0.3], [-0.3, 0.0]]]))[0]
    expected = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    torch.testing.assert_close(block, expected)


@pytest.mark.parametrize("terms", [None, 2, 3, 5, 7])
def test_the_formula(terms: int | None) -> None:
    change, size, generator = Oft(block_size=3, terms=terms), Size(5, 9), torch.Generator().manual_seed(3)
    vector = torch.randn(change.shapes(size)["oft_R"], generator=generator) / 4
    x, weight = torch.randn(6, 9, generator=generator), torch.randn(5, 9, generator=generator)
    blocks = []
    for a, b, c in vector.double():
        q = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]], dtype=torch.float64)
        eye = torch.eye(3).double()
        if terms is None:
            blocks.append((eye - q) @ torch.linalg.inv(eye + q))
            continue
        block = eye + 2 * q
        if terms > 2:
            last = max(terms - 1, 3)
            block = eye + 2 * sum(torch.linalg.matrix_power(q, k) for k in range(1, last))
            block = block + torch.linalg.matrix_power(q, last)
        blocks.append(block)
    rotation, on = torch.block_diag(*blocks), Sitting(size, {"oft_R": vector})
    formula_close(change.before(on, x), x.double() @ rotation)
    formula_close(change.merged(on, weight), weight.double() @ rotation.t())


def test_the_constrained_stay_within(base: Callable[[str], Base]) -> None:
    """Training brings them back; the file has what answers."""
    change = Oft(block_size=4, within=0.6)
    model = randomised(fresh(base("llama").path, lambda m: dict.fromkeys(match_targets(m, "o_proj"), change)), std=1.0)
    stored = {key: tensor.detach().clone() for key, tensor in adapter_tensors(model).items()}
    model(tokens(1, 5)).square().mean().backward()
    for _, module in adapted_modules(model):
        vector = module.adapter["o_proj"].get_parameter("oft_R")
        norms = vector.norm(dim=1) * 2**0.5
        torch.testing.assert_close(norms, torch.full((6,), 0.6 / 6**0.5))
        assert vector.grad is not None and vector.grad.abs().max() > 0
    for key, tensor in adapter_tensors(model).items():
        torch.testing.assert_close(tensor, stored[key])


def test_gradients_of_the_constrained(adapted: Callable[..., Adapted]) -> None:
    """PEFT's, which are those at the point within."""
    made, ids = adapted("llama", kind=peft.OFTConfig, **CASES["constrained"]), tokens(1, 9)
    for name, parameter in made.oracle.named_parameters():
        parameter.requires_grad_("oft_R" in name)
    made.oracle(ids).logits.square().mean().backward()
    expected = [p.grad for name, p in sorted(made.oracle.named_parameters()) if "oft_R" in name]
    model = read(made)
    model(ids).square().mean().backward()
    found = {
        f"{path}.{name}": parameter.grad
        for path, module in adapted_modules(model)
        for name, parameter in module.adapter.named_parameters()
    }
    assert len(found) == len(expected) == 4
    own = [found[name] for name in sorted(found, key=lambda n: (n.split(".")[1], "qkv" in n, n))]
    for ours, theirs in zip(own, expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peft_version": "0.17.1"}, "before 0.18 was another series"),
        ({"peft_version": None}, "before 0.18 was another series"),
        ({"oft_block_size": None}, "r is 0 and oft_block_size 0"),
        ({"r": 2}, "r is 2 and oft_block_size 6"),
        ({"num_cayley_neumann_terms": 1}, "1 is not a whole number from 2"),
        ({"oft_block_size": 8}, "has shape"),
    ],
)
def test_damaged_configs(adapted: Callable[..., Adapted], changes: dict[str, Any], part: str) -> None:
    made = adapted("llama", kind=peft.OFTConfig, oft_block_size=6, target_modules=["q_proj"])
    config = json.loads((made.path / CONFIG).read_text())
    (made.path / CONFIG).write_text(json.dumps({**config, **changes}))
    assert part in refused(lambda: read(made))
