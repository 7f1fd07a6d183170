"""Hugging Face directories: what is written comes back, and what cannot be read is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fill import empty_decoder
from oarsmith.checkpoint.hf import (
    GENERATION_CONFIG,
    load_decoder,
    projection_places,
    write_decoder,
)
from oarsmith.errors import CheckpointError, ModelError, OarsmithError
from oarsmith.models import families
from oarsmith.models.init import init_weights

SRC = Path(__file__).parents[2] / "src"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "torch_dtype": "float32",
    "some_key_we_do_not_know": {"kept": [1, 2.5, None]},
}
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny models."""


def make(folder: Path, **changes: Any) -> Path:
    """A model directory with random weights."""
    config = {**CONFIG, **changes}
    model = empty_decoder(families.build_spec(config)[1], config, torch.float32)
    init_weights(model, seed=1)
    folder.mkdir(parents=True)
    write_decoder(model, folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def refused(path: Path) -> str:
    with pytest.raises(OarsmithError) as caught:
        load_decoder(path)
    return str(caught.value)


def test_config_comes_back_with_every_key(tmp_path: Path) -> None:
    model = load_decoder(make(tmp_path / "a"))
    (tmp_path / "b").mkdir()
    write_decoder(model, tmp_path / "b")
    assert read_config(tmp_path / "b") == CONFIG
    assert list(read_config(tmp_path / "b")) == list(CONFIG), "in its order"
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "a" / WEIGHTS).read_bytes()


def test_generation_config_is_carried_along(tmp_path: Path) -> None:
    text = '{"eos_token_id": [2, 7],\n "temperature": 0.6}\n'
    (make(tmp_path / "a") / GENERATION_CONFIG).write_text(text)
    (tmp_path / "b").mkdir()
    write_decoder(load_decoder(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "b" / GENERATION_CONFIG).read_text() == text


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_on_loading(tmp_path: Path, dtype: torch.dtype, key: str) -> None:
    folder = make(tmp_path / "a")
    config = {k: v for k, v in CONFIG.items() if k != "torch_dtype"}
    (folder / "config.json").write_text(json.dumps({**config, key: "float32"}))
    model = load_decoder(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    stored = load_file(folder / WEIGHTS)
    assert torch.equal(model.embedding.weight, stored["model.embed_tokens.weight"].to(dtype))
    (tmp_path / "b").mkdir()
    write_decoder(model, tmp_path / "b")
    config = read_config(tmp_path / "b")
    assert config[key] == str(dtype).removeprefix("torch.") and len({"dtype", "torch_dtype"} & set(config)) == 1


def test_the_dtype_of_most_elements_is_kept(tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()

    assert load_decoder(edit(make(tmp_path / "a"), narrow)).final_norm.weight.dtype == torch.bfloat16
    edit(tmp_path / "a", lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))
    assert load_decoder(tmp_path / "a").embedding.weight.dtype == torch.bfloat16


def test_missing_tensor(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    message = refused(edit(make(tmp_path / "a"), lambda t: t.pop(name)))
    assert f"1 tensors are missing, first {name}" in message and str(tmp_path / "a") in message


def test_renamed_tensor_names_the_nearest(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_projection.weight"] = tensors.pop("model.layers.1.self_attn.k_proj.weight")

    message = refused(edit(make(tmp_path / "a"), rename))
    assert "(the file has model.layers.1.self_attn.k_projection.weight)" in message
    assert "1 tensors have no place in this model" in message


def test_surplus_tensor(tmp_path: Path) -> None:
    """A bias the config does not speak of would silently be left out."""
    name = "model.layers.0.self_attn.q_proj.bias"
    message = refused(edit(make(tmp_path / "a"), lambda t: t.update({name: torch.zeros(16)})))
    assert f"1 tensors have no place in this model, first {name}" in message and "config.json" in message


def test_untied_model_without_its_head(tmp_path: Path) -> None:
    assert "lm_head.weight" in refused(edit(make(tmp_path / "a"), lambda t: t.pop("lm_head.weight")))


def test_tied_model_whose_head_is_another_matrix(tmp_path: Path) -> None:
    """Trained apart and saved under a config that ties: leaving the head out would give another model."""
    folder = make(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    message = refused(folder)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert '"tie_word_embeddings": false' in message
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].half()}))
    load_decoder(folder)  # the same matrix with fewer digits


def test_wrong_shape(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "intermediate_size": 25}))
    message = refused(folder)
    assert "mlp.gate_proj.weight has shape (24, 16), the config asks for (25, 16)" in message


@pytest.mark.parametrize(("dtype", "code"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantized_weights_are_not_taken_for_numbers(tmp_path: Path, dtype: torch.dtype, code: str) -> None:
    """Their scales would be lost."""
    name = "model.layers.0.self_attn.q_proj.weight"
    message = refused(edit(make(tmp_path / "a"), lambda t: t.update({name: t[name].to(dtype)})))
    assert f"tensor {name} is stored as {code}" in message


def test_truncated_weights(tmp_path: Path) -> None:
    path = make(tmp_path / "a") / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(tmp_path / "a")
    assert "truncated" in message and WEIGHTS in message and "again" in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold one JSON object"),
        ('{"model_type": "lama"}', "did you mean 'llama'?"),
        ('{"model_type": "llama"}', "hidden_size must be a positive integer, got None"),
    ],
)
def test_damaged_config(tmp_path: Path, text: str, part: str) -> None:
    (make(tmp_path / "a") / "config.json").write_text(text)
    assert part in refused(tmp_path / "a")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "no config.json in the directory" in refused(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert f"oarsmith convert {tmp_path / 'm.gguf'} OUT" in refused(tmp_path / "m.gguf")
    (tmp_path / "m.txt").write_text("x")
    assert f"name its directory: {tmp_path}" in refused(tmp_path / "m.txt")


def test_a_model_with_an_adapter_is_not_written(tmp_path: Path) -> None:
    from oarsmith.adapters.lora import Lora
    from oarsmith.adapters.targets import adapt_rewrite

    rewrite = adapt_rewrite(lambda places: {next(iter(places)): Lora(rank=2, alpha=2.0)})
    model = load_decoder(make(tmp_path / "a"), rewrite=rewrite)
    (tmp_path / "b").mkdir()
    with pytest.raises(ModelError, match=r"carries an adapter on 1 linear maps, first layers.0.attention.qkv"):
        write_decoder(model, tmp_path / "b")


def test_projections_have_the_names_of_the_file(tmp_path: Path) -> None:
    config = read_config(make(tmp_path / "a"))
    family, spec = families.build_spec(config)
    places = projection_places(family.names(spec))
    files = {n.removesuffix(".weight") for n in load_file(tmp_path / "a" / WEIGHTS) if "proj" in n}
    assert set(places) == files and len(files) == 14
    place = places["model.layers.1.self_attn.v_proj"]
    assert (place.parameter, place.segment) == ("layers.1.attention.qkv.weight", "v_proj")


MEMORY = """
import sys
from pathlib import Path
import torch
from oarsmith.checkpoint.hf import load_decoder
rewrite = None
if sys.argv[4] != "all":
    from oarsmith.adapters.forms import INT8_ROWS, Blocks
    from oarsmith.adapters.targets import kept_as
    form = {"int8": INT8_ROWS, "nf4": Blocks(nested=256)}[sys.argv[4]]
    rewrite = kept_as(form, lambda family, spec: spec)
load_decoder(Path(sys.argv[1]), rewrite=rewrite)  # the small one: imports and first-time buffers
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
Path("/proc/self/clear_refs").write_text("5")  # peak back to what is used now
before = status("VmRSS")
model = load_decoder(Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]), rewrite=rewrite)
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(size, status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "shard", "kept", "spare"),
    [
        ("float32", 40_000_000, "all", 0),
        ("bfloat16", 10**10, "all", 0),
        ("float32", 10**10, "int8", 34_000_000),
        ("float32", 10**10, "nf4", 34_000_000),
    ],
)
def test_loading_holds_the_weights_once(tmp_path: Path, dtype: str, shard: int, kept: str, spare: int) -> None:
    """About 200 MB in fp32: beside the model one tensor as stored (here at most 17 MB), and buffers.

    Of a model in 8 or 4 bits (80 or 60 MB) one parameter is held in fp32 at a time (34 MB).
    """
    changes = {
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    config = {**CONFIG, **changes}
    model = empty_decoder(families.build_spec(config)[1], config, torch.float32)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    (tmp_path / "large").mkdir()
    write_decoder(model, tmp_path / "large", max_shard_bytes=shard)
    del model
    command = [sys.executable, "-c", MEMORY, str(make(tmp_path / "small")), str(tmp_path / "large"), dtype, kept]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    size, peak = map(int, done.stdout.split())
    assert size > {"float32": 180e6, "bfloat16": 90e6}[dtype] * {"all": 1, "int8": 0.4, "nf4": 0.28}[kept]
    assert peak < 1.35 * size + spare, f"peak {peak / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


def test_errors_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        load_decoder(tmp_path / "nowhere")
