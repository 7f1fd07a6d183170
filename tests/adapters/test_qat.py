"""Training for quantization: the adapted model computes what merging and rounding make of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import oarsmith
from oarsmith.adapters.linear import adapted_modules
from oarsmith.adapters.merge import merge_adapter
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError
from oarsmith.jobs.start import from_checkpoint
from oarsmith.jobs.tuning import load_trainable
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.quantize.choose import fake_of
from tiny import write_tiny_model

IDS = torch.arange(20)[None] * 31 % 1000


def trainable(model: Path, *words: str) -> tuple[SftConfig, Decoder]:
    config = load_config(SftConfig, None, [str(model), "none", "--lora", "--dtype", "fp32", *words]).config
    decoder = load_trainable(config, from_checkpoint(config, model), torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in decoder.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
            assert "lora" in name
    return config, decoder


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w8a8", "w4a8"])
def test_it_is_the_merged_and_rounded_model(tmp_path: Path, scheme: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    config, decoder = trainable(model, "--qat", scheme, "--qat_group_size", "16" if "4" in scheme else "-1")
    found = decoder(IDS)
    fake = fake_of(config)
    assert fake is not None
    plain = merge_adapter(decoder, keep=False)
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, Linear):
                module.weight.copy_(fake.weight(module.weight))
                module.register_forward_pre_hook(lambda module, args: (fake.inputs(args[0]), *args[1:]))
        expected = plain(IDS)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    plainly = oarsmith.load_model(model, dtype="fp32")(IDS)
    assert (found - plainly).abs().max() > 1e-2 * plainly.abs().max()


def test_gradients_pass_straight_through(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    _, decoder = trainable(model, "--qat", "w4a16", "--qat_group_size", "16")
    _, module = next(adapted_modules(decoder))
    x = torch.randn(7, module.spec.in_features, requires_grad=True)
    weight, _ = module.merged()
    assert module.fake is not None
    rounded = module.fake.weight(weight)
    out = module(x)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ rounded)
    segment, start, stop = next(module.spec.bounds())
    tables = module.adapter[segment.name]
    a, b = tables.get_parameter("lora_A"), tables.get_parameter("lora_B")
    d_weight, scale = dy[:, start:stop].t() @ x.detach(), module.changes[segment.name].scale
    torch.testing.assert_close(b.grad, scale * d_weight @ a.t(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.grad, scale * b.t() @ d_weight, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be merged"):
        load_config(SftConfig, None, ["model", "data", "--adapter_type", "bottleneck", "--qat", "w8a8"])
    with pytest.raises(ConfigError, match="no effect"):
        load_config(SftConfig, None, ["model", "data", "--qat", "w8a8"])
