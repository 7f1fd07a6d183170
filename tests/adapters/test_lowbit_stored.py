"""Adapters over quantized checkpoints: on the floats they stand for, and on their very codes (``as_stored``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import oarsmith
from oarsmith import cli
from oarsmith.adapters.forms import AS_STORED, DENSE, Stored, WeightForm
from oarsmith.adapters.linear import AdaptedLinear, attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.targets import adapt_rewrite, kept_as, match_targets
from oarsmith.checkpoint.convert import convert_directory
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from packed_weights import FORMATS, quantize_directory
from random_adapter import randomise
from tiny import read_lines, run_sft, write_rows, write_tiny_model

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "torch_dtype": "float32",
}
CODES = {"gptq": "uint4", "awq": "uint4", "pack-quantized": "uint4", "fp8": "e4m3"}
IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def projections(name: str) -> bool:
    return "proj" in name or ".experts." in name


def mixtral(folder: Path) -> Path:
    model = oarsmith.new_model(MIXTRAL)
    init_weights(model, 0)
    oarsmith.save_model(model, folder)
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {"llama": write_tiny_model, "mixtral": mixtral}


def adapted(path: Path, form: WeightForm, dtype: torch.dtype = torch.float32) -> Decoder:
    rewrite = adapt_rewrite(lambda places: dict.fromkeys(match_targets(places, "all-linear"), Lora(rank=2, alpha=3.0)))
    model = load_decoder(path, dtype=dtype, rewrite=kept_as(form, rewrite))
    attach(model, seed=1)
    randomise(model, 0.1, 2)
    return model


def maps(model: Decoder) -> dict[str, AdaptedLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def dense(module: AdaptedLinear) -> Tensor:
    found = [module.form.dense(parts, module.spec.in_features) for parts in module.parts()]
    return found[0] if module.spec.experts is None else torch.stack(found)


def loss_and_gradients(model: Decoder) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(IDS)[0, :-1].float(), IDS[0, 1:])
    leaves = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", MODELS)
def test_codes_are_kept_bit_for_bit(family: str, kind: str, tmp_path: Path) -> None:
    """Also those of fused maps and of experts; the adapter's gradients are those over the floats they stand for."""
    folder = MODELS[family](tmp_path / "base")
    floats = quantize_directory(folder, kind, projections)
    model, plain = adapted(folder, AS_STORED), adapted(folder, DENSE)
    assert "quantization_config" not in model.config
    kept = {path: module for path, module in maps(model).items() if module.form is not DENSE}
    assert len(kept) == {"llama": 8, "mixtral": 4}[family]
    for path, module in kept.items():
        assert isinstance(module.form, Stored) and module.form.code.name == CODES[kind]
        found, rounded = dense(module), maps(plain)[path].weight
        assert module.weight.dtype == torch.uint8 and not module.weight.requires_grad
        # The plain model has the floats of the format's own 16 bits.
        assert torch.equal(found.to(torch.float16 if kind in ("gptq", "awq") else torch.bfloat16).float(), rounded)
        with torch.no_grad():
            rounded.copy_(found)
    exact = torch.cat([tensor.flatten() for tensor in floats.values()]).sort().values
    assert torch.equal(torch.cat([dense(module).flatten() for module in kept.values()]).sort().values, exact)
    for have, want in zip(loss_and_gradients(model), loss_and_gradients(plain), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_bf16(tmp_path: Path) -> None:
    quantize_directory(write_tiny_model(tmp_path / "base"), "gptq", projections)
    model, plain = (adapted(tmp_path / "base", form, torch.bfloat16) for form in (AS_STORED, DENSE))
    for have, want in zip(loss_and_gradients(model), loss_and_gradients(plain), strict=True):
        assert (have - want).norm() <= 0.02 * want.norm()


def test_what_cannot_be_kept_is_in_floats(tmp_path: Path) -> None:
    """A plain weight, a fused map of which a part is plain, and numbers in the order of their importance."""
    folder = write_tiny_model(tmp_path / "base")
    plain = ("layers.0.mlp.down_proj", "layers.0.mlp.up_proj")
    quantize_directory(folder, "gptq", lambda name: projections(name) and not any(part in name for part in plain))
    weights = load_file(folder / "model.safetensors")
    order = weights["model.layers.1.self_attn.o_proj.g_idx"]
    order.copy_(order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = adapted(folder, AS_STORED)
    dense_maps = {path for path, module in maps(model).items() if module.form is DENSE}
    assert dense_maps == {"layers.0.ffn.gate_up", "layers.0.ffn.down", "layers.1.attention.out"}
    assert torch.isfinite(loss_and_gradients(model)[0])


def test_fewer_bytes(tmp_path: Path) -> None:
    quantize_directory(write_tiny_model(tmp_path / "base"), "pack-quantized", projections)
    for module in maps(load_decoder(tmp_path / "base", rewrite=kept_as(AS_STORED, lambda _, spec: spec))).values():
        numbers = module.spec.in_features * module.spec.out_features
        held = module.weight.nbytes + sum(buffer.nbytes for buffer in module.buffers())
        assert held == numbers * (4 + 16 / 16 + 8 / 16) / 8  # codes, bf16 scales, zeros in a byte


@pytest.mark.parametrize("algo", ["none", "as_stored", "nf4"])
def test_runs(algo: str, tmp_path: Path) -> None:
    """``oarsmith sft`` on a GPTQ base learns, and its adapter belongs to the checkpoint's own weights."""
    base, rows = write_tiny_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    quantize_directory(base, "gptq", projections)
    keys = {"max_length": 64, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2, "lora": True}
    assert run_sft(base, rows, tmp_path / "run", weight_quantize_algo=algo, weight_blocksize=64, **keys) == 0
    losses = [line["loss"] for line in read_lines(tmp_path / "run" / "log.jsonl") if "loss" in line]
    assert losses[-1] < losses[0]
    assert cli.main(["merge-adapter", str(tmp_path / "run"), str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    merged, over = oarsmith.load_model(tmp_path / "merged"), oarsmith.load_model(tmp_path / "run", dtype="fp32")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    with torch.no_grad():
        assert (merged.eval()(IDS) - over.eval()(IDS)).abs().max() < 1e-4


def test_a_full_run_writes_a_plain_model(tmp_path: Path) -> None:
    base, rows = write_tiny_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    quantize_directory(base, "awq", projections)
    assert run_sft(base, rows, tmp_path / "run", max_length=64, max_steps=1) == 0
    assert "quantization_config" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert oarsmith.load_model(tmp_path / "run").embedding.weight.dtype == torch.float32
    convert_directory(base, tmp_path / "hf", "hf")
    weight = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float16 and weight.shape == (48, 32)


def test_nothing_to_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, rows = write_tiny_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl")
    keys = {"max_length": 64, "max_steps": 1, "lora": True, "weight_quantize_algo": "as_stored"}
    assert run_sft(base, rows, tmp_path / "run", **keys) != 0
    assert "has no quantized weights" in " ".join(capsys.readouterr().err.split())
