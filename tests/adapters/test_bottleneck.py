"""Bottleneck adapters beside their formulas, and where they sit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oarsmith
from oarsmith.adapters.bottleneck import Parallel, Serial
from oarsmith.adapters.change import Change, Sitting, Size
from oarsmith.adapters.merge import mergeable
from oarsmith.adapters.methods import changes_of
from oarsmith.adapters.peft_layout import CONFIG
from oarsmith.checkpoint.hf import projection_places
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError
from oarsmith.models import families

from .beside_peft import formula_close, fresh, refused, saved
from .conftest import Base

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    "relu": lambda z: z.clamp(min=0),
    "silu": lambda z: z / (1 + (-z).exp()),
    "tanh": lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
}


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("kind", [Serial, Parallel])
def test_the_formula(kind: type[Serial | Parallel], activation: str) -> None:
    size, generator = Size(5, 7), torch.Generator().manual_seed(1)
    change = kind(width=3, activation=activation, scale=2.0)
    tensors = {
        name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in change.shapes(size).items()
    }
    x, y = (torch.randn(4, n, generator=generator).requires_grad_() for n in (7, 5))
    on = Sitting(size, tensors)
    bias = torch.randn(5)
    found = (
        change.after(on, y, bias, lambda: torch.zeros(5, 7))
        if kind is Serial
        else y + change.added(on, x, training=True)
    )
    down, low, up, high = (tensor.detach().double().requires_grad_() for tensor in tensors.values())
    wide_x, wide_y = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    z = wide_y if kind is Serial else wide_x
    expected = wide_y + 2 * (FUNCTIONS[activation](z @ down.t() + low) @ up.t() + high)
    formula_close(found, expected)
    dout = torch.randn(found.shape, generator=generator)
    ours = torch.autograd.grad(found, [y, *tensors.values()], dout)
    theirs = torch.autograd.grad(expected, [wide_y, down, low, up, high], dout.double())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def chosen(config: Mapping[str, Any], *words: str) -> dict[str, Change]:
    keys = load_config(SftConfig, None, ["m", "d", "--adapter_type", "bottleneck", *words]).config
    family, spec = families.build_spec(config)
    return dict(changes_of(keys, projection_places(family.names(spec))))


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward"),
    [
        ("llama31_rope", {"o_proj"}, {"down_proj"}),
        ("chatglm2_6b", {"dense"}, {"dense_4h_to_h"}),
        ("qwen1_ntk_logn", {"c_proj"}, {"c_proj"}),
        ("internlm2", {"wo"}, {"w2"}),
    ],
)
def test_places(name: str, attention: set[str], feed_forward: set[str]) -> None:
    config = json.loads((FAMILIES / name / "config.json").read_text())
    layers = families.build_spec(config)[1].layers
    for placement, expected in (
        ("houlsby", attention | feed_forward),
        ("pfeiffer", feed_forward),
        ("parallel", feed_forward),
    ):
        found = chosen(config, "--bottleneck_placement", placement)
        assert {module.rsplit(".", 1)[-1] for module in found} == expected
        assert len(found) == len(layers) * (2 if placement == "houlsby" else 1)
        assert {type(change) for change in found.values()} == {Parallel if placement == "parallel" else Serial}
    named = chosen(config, "--lora_target_modules", "all-linear", "--lora_rank", "3", "--bottleneck_scale", "2")
    assert len(named) > len(layers) * 3 and set(named.values()) == {Serial(width=3, scale=2.0)}


def test_a_model_without_such_places() -> None:
    config = json.loads((FAMILIES / "gpt_oss" / "config.json").read_text())
    with pytest.raises(ConfigError, match="no projection where the method sits by itself"):
        chosen(config, "--bottleneck_placement", "pfeiffer")


def test_damaged_configs(base: Callable[[str], Base], tmp_path: Path) -> None:
    made = base("llama")
    picked = chosen(json.loads((made.path / "config.json").read_text()))
    model = fresh(made.path, lambda modules: picked)
    assert not mergeable(model)
    folder = saved(model, tmp_path / "adapter", made.path)
    config = json.loads((folder / CONFIG).read_text())
    for changes, part in (
        ({"activation": "relu6"}, "'relu6' is no activation"),
        ({"activation": ["relu"]}, "['relu'] is no activation"),
        ({"r": 3}, "has shape"),
        ({"parallel": "no"}, "'no' is not true or false"),
    ):
        (folder / CONFIG).write_text(json.dumps({**config, **changes}))
        assert part in refused(lambda: oarsmith.load_model(made.path, adapter=folder, device="cpu"))
