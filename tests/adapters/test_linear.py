"""Maps under changes of any kind, by made-up ones that have every hook: values, gradients, merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.change import Change, Size
from oarsmith.adapters.forms import INT8_ROWS, WeightForm
from oarsmith.adapters.linear import Adapt, AdaptedLinear
from oarsmith.adapters.lora import Lora
from oarsmith.errors import ConfigError
from oarsmith.models.spec_parts import LinearSpec, Segment

from .made_changes import AFTER, LORA, MADE, WHOLE, After, Made, Whole

SPEC = LinearSpec(
    in_features=6,
    segments=(Segment(name="q", size=4), Segment(name="k", size=3), Segment(name="v", size=5)),
    bias=True,
)
CHANGES: dict[str, dict[str, Change]] = {
    "one of three": {"k": MADE},
    "beside lora": {"v": LORA, "q": MADE},
    "the output only": {"q": AFTER},
    "a whole matrix": {"k": WHOLE},
    "all kinds": {"q": MADE, "k": AFTER, "v": WHOLE},
    "dropout of one": {"q": replace(LORA, dropout=1e-9), "v": LORA},
}


def linear(changes: Mapping[str, Change], spec: LinearSpec = SPEC, form: WeightForm | None = None) -> AdaptedLinear:
    """All tensors random, lengths positive."""
    adapt = Adapt(changes=tuple(changes.items()))
    module = (adapt if form is None else replace(adapt, form=form)).build(replace(spec, rewrite=adapt))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if name.endswith(("length", "share")):
                parameter.abs_().add_(0.5)
    return module


def exact(module: AdaptedLinear, x: Tensor, expert: int | None = None) -> Tensor:
    """By each method's formula, segment by segment in fp64, from the module's own parameters."""
    wide, parts = x.double(), []
    for segment, start, stop in module.spec.bounds():
        weight, bias = module.weight, module.bias
        on = dict(module.adapter[segment.name].items()) if segment.name in module.changes else {}
        if expert is not None:
            weight, bias = weight[expert], None if bias is None else bias[expert]
            on = {name: tensor[expert] for name, tensor in on.items()}
        on = {name: tensor.double() for name, tensor in on.items()}
        rows, change = weight[start:stop].double(), module.changes.get(segment.name)
        own = 0.0 if bias is None else bias[start:stop].double()
        if isinstance(change, Made):
            turned = wide if isinstance(change, After) else wide * on["turn"]
            y = turned @ rows.t() + change.factor * (turned @ on["down"])[..., None] * on["up"]
            parts.append(on["share"] * (on["length"] / rows.norm(dim=1) * y + own))
        elif isinstance(change, Lora):
            parts.append(wide @ (rows + change.scale * on["lora_B"] @ on["lora_A"]).t() + own)
        else:
            parts.append(wide @ (rows + on["delta"] if isinstance(change, Whole) else rows).t() + own)
    return torch.cat(parts, -1)


def same_values_and_gradients(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    # A tensor that a method has no use for has a gradient of zeros.
    ours, theirs = (
        torch.autograd.grad(out, leaves, dout.to(out.dtype), allow_unused=True, materialize_grads=True)
        for out in (found, expected)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(1, 6), (2, 3, 6)])
@pytest.mark.parametrize("name", CHANGES)
def test_values_gradients_and_merge(name: str, shape: tuple[int, ...], bias: bool) -> None:
    module = linear(CHANGES[name], replace(SPEC, bias=bias)).train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    same_values_and_gradients(module(x), exact(module, x), [x, *module.parameters()])
    weight, own = module.merged()
    assert (own is None) != bias and not weight.requires_grad
    torch.testing.assert_close(functional.linear(x, weight, own).double(), exact(module, x), rtol=1e-5, atol=1e-4)
    module.enabled = False
    assert torch.equal(module(x), functional.linear(x, module.weight, module.bias))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CHANGES)
def test_experts(name: str, bias: bool) -> None:
    """Each with a change of its own; one without rows gets no gradient but zeros."""
    module, counts = linear(CHANGES[name], replace(SPEC, experts=3, bias=bias)).train(), [4, 0, 2]
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    pieces = [exact(module, rows, expert) for expert, rows in enumerate(x.split(counts)) if len(rows)]
    same_values_and_gradients(module(x, counts), torch.cat(pieces), [x, *module.parameters()])
    weight, own = module.merged()
    assert weight.shape == (3, 12, 6) and (own is None) != bias
    for expert in range(3):
        merged = functional.linear(x, weight[expert], None if own is None else own[expert])
        torch.testing.assert_close(merged.double(), exact(module, x, expert), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("experts", [None, 2])
def test_over_a_weight_in_8_bits(name: str, experts: int | None) -> None:
    """The changes see the weight as it is kept."""
    spec = replace(SPEC, in_features=32, experts=experts)
    module = linear(CHANGES[name], spec, INT8_ROWS).train()
    module.requires_grad_(False)
    module.adapter.requires_grad_(True)
    wide = linear(CHANGES[name], spec)
    module.weight_filled()
    kept = torch.stack([INT8_ROWS.dense(parts, 32) for parts in module.parts()])
    wide.weight.data = kept[0] if experts is None else kept
    x, counts = torch.randn(7, 32, generator=torch.Generator().manual_seed(2)).requires_grad_(), [4, 3]
    results = []
    for one in (module, wide.train()):
        out = one(x) if experts is None else one(x, counts)
        leaves = [x, *one.adapter.parameters()]
        grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        results.append((out.detach(), *grads))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 0.03 * expected.norm()
    for merged, own in zip(module.merged(), wide.merged(), strict=True):
        torch.testing.assert_close(merged, own, rtol=1e-5, atol=1e-5)


def test_dropout_of_a_whole_matrix_is_on_its_input_only() -> None:
    torch.manual_seed(0)
    module, x = linear({"k": replace(WHOLE, dropout=0.25)}), torch.ones(20_000, 6)
    full, plain = exact(module, x[:1])[0], functional.linear(x[:1], module.weight, module.bias)[0].double()
    draws = module.train()(x).double()
    others = [0, 1, 2, 3, 7, 8, 9, 10, 11]
    torch.testing.assert_close(draws[:, others], plain[others].expand(len(x), 9), rtol=1e-5, atol=1e-5)
    error = draws[:, 4:7].std(0) / len(x) ** 0.5
    assert bool(((draws[:, 4:7].mean(0) - full[4:7]).abs() < 5 * error).all() and (error > 0).all())
    torch.testing.assert_close(module.eval()(x[:1])[0].double(), full, rtol=1e-5, atol=1e-5)


def test_a_change_that_cannot_sit_there() -> None:
    """What ``shapes`` refuses is refused when the model is built."""

    @dataclass(frozen=True, kw_only=True)
    class Square(Whole):
        def shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
            if size.out_features != size.in_features:
                raise ConfigError(f"{size.out_features} rows are not {size.in_features}")
            return super().shapes(size)

    changes = Adapt(changes=(("k", Square()),))
    with pytest.raises(ConfigError, match="3 rows are not 6"):
        changes.build(SPEC)
