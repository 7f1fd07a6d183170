"""Quantized checkpoints in the engine: their codes are served, not floats that they stand for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oarsmith
import packed_weights
from native_sequences import Sequences
from oarsmith import Engine, Sampling
from oarsmith.adapters.forms import DENSE
from oarsmith.adapters.linear import AdaptedLinear
from oarsmith.checkpoint.deferred import deferred_decoder
from oarsmith.checkpoint.quantized.cache_scales import read_cache_form
from oarsmith.checkpoint.quantized.integers import pack_words
from oarsmith.compiling import BuildError
from oarsmith.engine.native_model import open_native
from oarsmith.errors import CheckpointError
from oarsmith.models.cache_form import CacheForm
from oarsmith.native.library import load
from oarsmith.native.lower import lower
from oarsmith.native.program import Program
from oarsmith.native.store import PackedStore
from oarsmith.quantize.grid import Grid, quantize

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 2}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v2",
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
GRIDS = {
    "int4": Grid(bits=4, group=32, symmetric=True),
    "int8": Grid(bits=8, group=None, symmetric=True),
    "e4m3": Grid(code="e4m3", bits=8, group=None),
    "odd": Grid(bits=4, group=48, symmetric=True),
}
IDS = list(range(3, 40))


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


@pytest.fixture(autouse=True)
def _ids_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("oarsmith.engine.engine.find_tokenizer", lambda *_: None)
    monkeypatch.setenv("OARSMITH_PACKED", str(tmp_path / "packed"))


def tensors_of(name: str, weight: Tensor, grid: Grid) -> dict[str, Tensor]:
    """A weight as compressed-tensors has it."""
    found = quantize(weight.float(), replace(grid, scales="bf16"))
    scale = found.steps.scale_OG.bfloat16().contiguous()
    if grid.code == "e4m3":
        return {name: found.numbers_OI, f"{name}_scale": scale}
    return {
        f"{name}_packed": pack_words(found.numbers_OI, grid.bits),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(weight.shape),
    }


def checkpoint(
    folder: Path, config: dict[str, object], kind: Callable[[str], str | None], **quantization: object
) -> Path:
    """A model whose weights are quantized as ``kind`` says of each name; None: they stay floats."""
    model = oarsmith.new_model(config, seed=1, dtype="bf16")
    oarsmith.save_model(model, folder)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if "proj" in name or ".experts." in name]:
        if (chosen := kind(name)) is not None:
            weights |= tensors_of(name, weights.pop(name), GRIDS[chosen])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    noted = {"quant_method": "compressed-tensors", "config_groups": {}, **quantization}
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": noted}))
    return folder


def formats(program: Program) -> Counter[str]:
    """Of the matrices of the layers."""
    found = Counter(op.matrix.format for op in program.body if op.kind == "linear" and op.matrix is not None)
    for op in program.body:
        if op.experts is not None:
            found.update(matrix.format for matrix in (*op.experts.gate_up, *op.experts.down))
    return found


def error(folder: Path, *, precision: str = "fp32") -> tuple[float, Program]:
    """Of the step's logits to those of the decoder on floats, and its program."""
    expected = oarsmith.load_model(folder, dtype="fp32")(torch.tensor([IDS]))[0]
    with deferred_decoder(folder) as (decoder, files):
        packed = lower(decoder, precision, files=files)
    sequences = Sequences(decoder, packed=packed)
    found = torch.cat([sequences.bring(a=IDS[:20])["a"], *(sequences.bring(a=[token])["a"] for token in IDS[20:])])
    return float((found - expected).norm() / expected.norm()), packed[0]


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL, DEEPSEEK], ids=lambda config: str(config["model_type"]))
@pytest.mark.parametrize("kind", ["int4", "int8", "e4m3"])
@torch.no_grad()
def test_logits(kind: str, config: dict[str, object], tmp_path: Path) -> None:
    """Weights are exact, so what is left is the rounding of activations."""
    folder = checkpoint(tmp_path / "model", config, lambda _: kind)
    off, program = error(folder)
    assert off < 0.03
    found = formats(program)
    floats = found.pop("fp32", 0)  # routers
    assert set(found) == {kind} and floats <= 2
    assert next(op for op in program.body if op.kind == "embed").matrix.format == "fp32"


@torch.no_grad()
def test_formats_of_single_maps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Skipped maps stay in 16 bits, groups that fit no format become floats, fused maps take what holds all parts."""
    chosen = {
        "0.self_attn.k_proj": "int8",
        "0.self_attn.o_proj": None,
        "0.mlp.down_proj": "odd",
        "1.self_attn.q_proj": "e4m3",
        "1.mlp.up_proj": None,
    }

    def kind(name: str) -> str | None:
        return next((own for part, own in chosen.items() if part in name), "int4")

    folder = checkpoint(tmp_path / "model", LLAMA, kind)
    with caplog.at_level(logging.INFO):
        off, program = error(folder, precision="bf16")
    assert off < 0.03
    found = [op.matrix.format for op in program.body if op.kind == "linear" and op.matrix is not None]
    #        qkv     out     gate_up  down
    assert found == ["int8", "bf16", "int4", "bf16", "bf16", "int4", "bf16", "int4"]
    said = "1 in int8, 3 in int4, 1 in bf16 (groups of 48 columns), 1 in bf16 (parts of integers and of floats)"
    assert said in caplog.text


@pytest.mark.parametrize("kind", ["gptq", "awq", "pack-quantized"])
@torch.no_grad()
def test_other_layouts(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_weights, "GROUP", 32)
    folder = tmp_path / "model"
    oarsmith.save_model(oarsmith.new_model(LLAMA, seed=1, dtype="bf16"), folder)
    packed_weights.quantize_directory(folder, kind, lambda name: "proj" in name)
    off, program = error(folder)
    assert off < 0.03 and formats(program) == {"int4": 8}


@pytest.mark.parametrize("kind", ["int4", "int8", "e4m3"])
def test_the_engine(kind: str, tmp_path: Path) -> None:
    """On both: answers of the floats that the codes stand for; packed weights are found again."""
    folder = checkpoint(tmp_path / "model", LLAMA, lambda name: None if "o_proj" in name else kind)
    plain = oarsmith.load_model(folder, dtype="fp32")
    sampling = Sampling(max_new_tokens=6, ignore_eos=True, logprobs=1)
    expected = Engine(plain, block_size=16).generate(IDS, sampling)[0]
    for compute in ("native", "native", "torch"):
        engine = Engine(folder, compute=compute, block_size=16)
        found = engine.generate(IDS, sampling)[0]
        assert found.logprobs[0].logprob == pytest.approx(expected.logprobs[0].logprob, abs=0.05)
        if compute == "torch":
            maps = [module for module in engine.model.modules() if isinstance(module, AdaptedLinear)]
            kept = [module for module in maps if module.form is not DENSE]
            assert len(maps) == 8 and len(kept) == 6 and all(m.weight.dtype == torch.uint8 for m in kept)
        else:
            assert formats(engine._served.native.program) == {kind: 6, "bf16": 2}


@pytest.mark.parametrize("config", [MIXTRAL, DEEPSEEK], ids=lambda config: str(config["model_type"]))
@torch.no_grad()
def test_codes_on_pytorch(config: dict[str, object], tmp_path: Path) -> None:
    """Of experts too; a map whose very weight is needed stays in floats."""
    folder = checkpoint(tmp_path / "model", config, lambda _: "int8")
    engine = Engine(folder, compute="torch", dtype="fp32", block_size=16)
    expected = oarsmith.load_model(folder, dtype="fp32")
    # The floats were rounded to the files' bf16 before they became fp32.
    difference = engine.model(torch.tensor([IDS])) - expected(torch.tensor([IDS]))
    assert float(difference.norm() / expected(torch.tensor([IDS])).norm()) < 0.01
    floats = {path for path, m in engine.model.named_modules() if getattr(m, "form", None) is DENSE}
    assert not floats
    sampling = Sampling(max_new_tokens=6, ignore_eos=True)
    native = Engine(folder, compute="native", block_size=16)
    assert len(engine.generate(IDS, sampling)[0].ids) == len(native.generate(IDS, sampling)[0].ids) == 6


def test_weights_that_are_asked_for_are_made(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", LLAMA, lambda _: "e4m3")
    for options, expected in (({"weights": "int8"}, "int8"), ({"dtype": "bf16"}, "bf16")):
        engine = Engine(folder, compute="native", block_size=16, **options)
        assert set(formats(engine._served.native.program)) == {expected}


def with_scales_of_the_cache(folder: Path, scale: Callable[[int, str], Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        for which in "kv":
            weights[f"model.layers.{layer}.self_attn.{which}_scale"] = scale(layer, which)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("code", ["int", "float"])
def test_the_checkpoints_cache(code: str, tmp_path: Path) -> None:
    """What it says of keys and values holds on both, also after a start from packed weights."""
    scheme = {"num_bits": 8, "type": code, "symmetric": True, "dynamic": False}
    folder = checkpoint(tmp_path / "model", LLAMA, lambda _: "int8", kv_cache_scheme=scheme)
    with_scales_of_the_cache(folder, lambda layer, which: torch.tensor([0.03 + layer / 64, 0.04][: 1 + (which == "k")]))
    form = read_cache_form(folder, 2)
    assert form is not None and form.code == ("int" if code == "int" else "e4m3") and form.scales is not None
    assert [len(keys) for keys, _ in form.scales] == [2, 2] and [len(values) for _, values in form.scales] == [1, 1]
    sampling = Sampling(max_new_tokens=3, ignore_eos=True, logprobs=1)
    answers = []
    for compute in ("native", "native", "torch"):
        engine = Engine(folder, compute=compute, block_size=16)
        answers.append(engine.generate(IDS, sampling)[0].logprobs[0].logprob)
        assert engine._served.cache_form == form and engine._sizes.cache_form(form) == form
    assert answers[0] == answers[1] == pytest.approx(answers[2], abs=0.05)
    other = "fp8" if code == "int" else "int8"
    asked = Engine(folder, compute="native", block_size=16, cache_dtype=other)
    assert asked._sizes.cache_form(form) == CacheForm(code="e4m3" if code == "int" else "int")


def test_scales_that_are_none(tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float"}
    folder = checkpoint(tmp_path / "model", LLAMA, lambda _: "int8", kv_cache_scheme=scheme)
    assert read_cache_form(folder, 2) == CacheForm(code="e4m3")
    with_scales_of_the_cache(folder, lambda *_: torch.tensor([0.1]))
    with pytest.raises(CheckpointError, match="no scale of the keys of layer 2"):
        read_cache_form(folder, 3)
    with_scales_of_the_cache(folder, lambda *_: torch.tensor([0.0]))
    with pytest.raises(CheckpointError, match="is no scale"):
        read_cache_form(folder, 2)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["num_bits"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="keys and values of 4 bits"):
        open_native(
            folder, "auto", lambda: oarsmith.load_model(folder), threads=1, store=PackedStore(tmp_path / "none")
        )
