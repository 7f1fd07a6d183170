"""Frozen maps in fewer bits: beside the same maps in fp32, with and without adapters on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from oarsmith.adapters.forms import INT8_ROWS, product
from oarsmith.adapters.linear import Adapt, AdaptedLinear, adapted_modules, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.merge import merge_adapter
from oarsmith.adapters.peft_layout import adapter_tensors, load_adapter_weights, write_adapter
from oarsmith.adapters.targets import adapt_rewrite, kept_as
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.kernels.int8 import rotate, rotation_size
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear, build_linear
from oarsmith.models.spec_parts import LinearSpec, Segment

from .conftest import Base, randomise, tokens

SPEC = LinearSpec(
    in_features=48,
    segments=(Segment(name="q", size=24), Segment(name="k", size=13), Segment(name="v", size=20)),
    bias=True,
)
LORA = Adapt(changes=(("v", Lora(rank=2, alpha=1.0)), ("q", Lora(rank=3, alpha=-6.0))))
# A dropout too small to strike takes the path of dropout.
DROPOUT = Adapt(changes=tuple((name, replace(change, dropout=1e-9)) for name, change in LORA.changes))
# Half a 127th of a row's largest entry in either factor: about 1 % of the product each.
LIMIT = 0.03


def rounded(module: AdaptedLinear) -> Tensor:
    """The weight that the 8 bits stand for."""
    scale = module.get_buffer("scale")
    assert module.weight.dtype == torch.int8
    return rotate(module.weight.double() * scale[..., None].double(), rotation_size(module.spec.in_features))


def pair(adapt: Adapt | None, spec: LinearSpec = SPEC) -> tuple[Linear, AdaptedLinear]:
    """A map in fp32, and its copy in 8 bits."""
    plain, small = build_linear(replace(spec, rewrite=adapt)), replace(adapt or Adapt(), form=INT8_ROWS).build(spec)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in plain.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    small.load_state_dict(plain.state_dict())
    for module in (plain, small):
        module.weight.requires_grad_(False)
        assert isinstance(module.bias, nn.Parameter)
        module.bias.requires_grad_(False)
    weight = plain.weight.double()
    small.weight_filled()
    assert (rounded(small) - weight).norm() < 0.01 * weight.norm()
    return plain, small


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() <= LIMIT * expected.norm()


@pytest.mark.parametrize("adapt", [None, LORA, DROPOUT], ids=["plain", "lora", "dropout"])
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (2, 3, 48)])
def test_values_and_gradients(adapt: Adapt | None, shape: tuple[int, ...]) -> None:
    plain, small = pair(adapt)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    results = []
    for module in (plain, small):
        out = module.train()(x)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    assert len(results[0]) == (2 if adapt is None else 6)
    for expected, found in zip(*results, strict=True):
        close(found, expected)


@pytest.mark.parametrize("adapt", [None, LORA, DROPOUT], ids=["plain", "lora", "dropout"])
def test_experts(adapt: Adapt | None) -> None:
    plain, small = pair(adapt, replace(SPEC, experts=3))
    x, counts = torch.randn(9, 48, generator=torch.Generator().manual_seed(2)).requires_grad_(), [4, 0, 5]
    found, expected = small(x, counts), plain(x, counts)
    close(found.detach(), expected.detach())
    close(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)))


def test_rows_and_the_dense_weight() -> None:
    """Some rows are kept as they are among all of them, and what is merged is the weight as it is kept."""
    plain, small = pair(LORA)
    assert isinstance(plain, AdaptedLinear)
    (parts,), kept = small.parts(), rounded(small)
    torch.testing.assert_close(INT8_ROWS.dense(parts, 48).double(), kept, rtol=0, atol=1e-6)
    own = INT8_ROWS.rows(parts, 24, 37, 48)
    torch.testing.assert_close(INT8_ROWS.dense(own, 48).double(), kept[24:37], rtol=0, atol=1e-6)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(product(x, own, None, INT8_ROWS), product(x, parts, None, INT8_ROWS)[:, 24:37])
    delta = plain.merged()[0] - plain.weight
    torch.testing.assert_close(small.merged()[0].double(), kept + delta.double(), rtol=0, atol=1e-5)


def test_a_bias_that_trains() -> None:
    plain, small = pair(DROPOUT)
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(2))
    for module in (plain, small):
        assert module.bias is not None
        module.bias.requires_grad_(True)
        module.train()(x).square().sum().backward()
    assert plain.bias is not None and plain.bias.grad is not None
    assert small.bias is not None and small.bias.grad is not None
    close(small.bias.grad, plain.bias.grad)


def adapted(base: Base, *, small: bool, dtype: torch.dtype = torch.float32) -> Decoder:
    """A model with adapters on q, v and down only, so other maps have none; the same adapter every time."""

    def choose(modules: list[str]) -> dict[str, Lora]:
        return {m: Lora(rank=3, alpha=2.1) for m in modules if m.endswith(("q_proj", "v_proj", "down_proj"))}

    rewrite = adapt_rewrite(choose)
    model = load_decoder(base.path, dtype=dtype, rewrite=kept_as(INT8_ROWS, rewrite) if small else rewrite)
    attach(model, seed=1)
    randomise((p for p in model.parameters() if p.requires_grad), seed=2, std=0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model(base: Callable[[str], Base], dtype: torch.dtype) -> None:
    """All linear maps of the layers are in 8 bits, nothing else is, and the model is nearly the same."""
    made, ids = base("llama"), tokens(3, 11)
    plain, small = (adapted(made, small=s, dtype=dtype) for s in (False, True))
    maps = {path: m for path, m in small.named_modules() if isinstance(m, Linear)}
    assert len(maps) == 8 and all(isinstance(m, AdaptedLinear) and m.form is INT8_ROWS for m in maps.values())
    assert {path.rsplit(".", 1)[-1] for path, _ in adapted_modules(small)} == {"qkv", "down"}
    narrow = {name for name, p in small.named_parameters() if p.dtype == torch.int8}
    assert narrow == {f"{path}.weight" for path in maps}
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in small.named_parameters()]
    assert [n for n, p in small.named_parameters() if p.requires_grad] == [
        n for n, p in plain.named_parameters() if p.requires_grad
    ]
    losses, grads = [], []
    for model in (plain, small):
        logits = model(ids)[:, :-1].flatten(0, 1).float()
        loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        losses.append(loss.item())
        found = torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in names])
        grads.append(torch.cat([g.flatten() for g in found]))
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0]
    # Rounding errors of two layers with narrow rows (24 and 40 numbers); a model's own rows are wider.
    assert torch.cosine_similarity(*grads, dim=0) > 0.98


def test_adapter_files_do_not_tell(base: Callable[[str], Base], tmp_path: Path) -> None:
    """What is written is what a model in fp32 with this adapter writes, and loads into either."""
    made = base("llama")
    plain, small = adapted(made, small=False), adapted(made, small=True)
    assert {path for path, _ in adapted_modules(plain)} == {path for path, _ in adapted_modules(small)}
    for name, model in (("plain", plain), ("small", small)):
        (tmp_path / name).mkdir()
        write_adapter(model, tmp_path / name, base="base")
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("plain", "small")]
    assert files[0] == files[1]
    before = {name: tensor.detach().clone() for name, tensor in adapter_tensors(small).items()}
    randomise((p for p in small.parameters() if p.requires_grad), seed=5, std=1.0)
    load_adapter_weights(small, tmp_path / "plain")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(small).items())


def test_mistakes_are_seen(base: Callable[[str], Base]) -> None:
    small = adapted(base("llama"), small=True)
    with pytest.raises(AssertionError, match="merge into the checkpoint's own"):
        merge_adapter(small)
    with pytest.raises(AssertionError, match="is in its form already"):
        next(module for _, module in adapted_modules(small)).weight_filled()
    fresh = Adapt(form=INT8_ROWS).build(SPEC)
    with pytest.raises(AssertionError, match="has not been loaded"):
        fresh(torch.zeros(1, 48))
