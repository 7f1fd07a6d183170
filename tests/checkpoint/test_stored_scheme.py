"""How activations and caches are to be rounded, as other tools' configs say it; and what is said wrongly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.quantized.stored import StoredScheme, read_scheme, stored_scheme
from oarsmith.checkpoint.source import open_model, open_source
from oarsmith.errors import CheckpointError
from oarsmith.models.rounding import Activations, CacheScheme
from oarsmith.quantize.grid import Grid
from oarsmith.quantize.scheme import MapScheme, Scheme
from quantized_models import write_quantized
from tiny import tiny_decoder

INT = {"num_bits": 8, "type": "int", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True}
TOKEN = INT | {"strategy": "token", "dynamic": True}


def said(folder: Path, quantization: dict[str, Any] | None, **tensors: torch.Tensor) -> StoredScheme:
    """What a directory with two quantized maps says."""
    scales = {f"a.{name}.weight_scale": torch.ones(4, 1) for name in ("up", "down")}
    save_file(
        {**scales, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}},
        folder / "model.safetensors",
    )
    config = {} if quantization is None else {"quantization_config": quantization}
    with open_source(folder) as source:
        return stored_scheme(config, source)


def groups(*groups: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
        **others,
    }


def test_names_come_before_classes(tmp_path: Path) -> None:
    usual = {"targets": ["Linear"], "input_activations": TOKEN}
    named = {"targets": ["a.down"], "input_activations": None}
    pattern = {"targets": ["re:.*down$"], "input_activations": FLOAT | {"strategy": "token", "dynamic": True}}
    token = Activations()
    assert said(tmp_path, groups(usual)).activations == {"a.up": token, "a.down": token}
    assert said(tmp_path, groups(usual, named, pattern)).activations == {"a.up": token}
    assert said(tmp_path, groups(usual, pattern)).activations == {"a.up": token, "a.down": Activations(code="e4m3")}


def test_static_scales(tmp_path: Path) -> None:
    group = {"targets": ["re:.*up$"], "input_activations": FLOAT | {"strategy": "tensor", "dynamic": False}}
    found = said(tmp_path, groups(group), a__up__input_scale=torch.tensor([0.5], dtype=torch.bfloat16))
    assert found.activations == {"a.up": Activations(code="e4m3", static=True)}
    assert found.input_scales["a.up"].tolist() == [0.5]
    with pytest.raises(CheckpointError, match=r"a\.up\.input_scale: the tensor is missing"):
        said(tmp_path, groups(group))
    with pytest.raises(CheckpointError, match=r"a\.up\.input_scale: a scale is NaN"):
        said(tmp_path, groups(group), a__up__input_scale=torch.tensor([float("nan")]))


def test_groups_of_columns_and_caches(tmp_path: Path) -> None:
    group = {
        "targets": ["Linear"],
        "input_activations": FLOAT | {"strategy": "group", "group_size": 128, "dynamic": True},
    }
    heads = INT | {"strategy": "attn_head", "dynamic": False}
    scales = {"a__k_scale": torch.ones(2, 1, 1), "a__v_scale": torch.full((2, 1, 1), 2.0)}
    found = said(tmp_path, groups(group, kv_cache_scheme=heads), **scales)
    assert found.activations["a.up"] == Activations(code="e4m3", group=128)
    assert found.cache == CacheScheme(code="int", per_head=True)
    assert found.key_scales["a"].tolist() == [1, 1] and found.value_scales["a"].tolist() == [2, 2]
    whole = said(tmp_path, groups(kv_cache_scheme=FLOAT | {"strategy": "tensor", "dynamic": False}))
    assert whole.cache == CacheScheme(code="e4m3", per_head=False) and not whole.key_scales


def test_native_fp8(tmp_path: Path) -> None:
    block = said(tmp_path, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 64]})
    assert set(block.activations.values()) == {Activations(code="e4m3", group=64)}
    scales = {f"a__{name}__input_scale": torch.ones(()) for name in ("up", "down")}
    static = said(tmp_path, {"quant_method": "fp8", "activation_scheme": "static"}, **scales)
    assert set(static.activations.values()) == {Activations(code="e4m3", static=True)}


def test_what_rounds_nothing(tmp_path: Path) -> None:
    for quantization in (None, {"quant_method": "gptq"}, groups({"targets": ["Linear"], "input_activations": None})):
        assert said(tmp_path, quantization) == StoredScheme()


@pytest.mark.parametrize(
    "inputs",
    [
        INT | {"num_bits": 4, "strategy": "token", "dynamic": True},
        INT | {"symmetric": False, "strategy": "token", "dynamic": True},
        INT | {"strategy": "tensor_group", "dynamic": "local"},
        INT | {"strategy": "group", "group_size": 16, "dynamic": False},
    ],
)
def test_what_is_not_known(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not known"):
        said(tmp_path, groups({"targets": ["Linear"], "input_activations": inputs}))
    with pytest.raises(CheckpointError, match="keys and values in"):
        said(tmp_path, groups(kv_cache_scheme=INT | {"strategy": "token", "dynamic": True}))


def paddle(folder: Path) -> Path:
    grid = Grid(bits=8, group=None, symmetric=True)
    scheme = MapScheme(weights=grid, activations=Activations(static=True))
    whole = Scheme(name="a8w8c8", default=scheme, overrides={}, cache=CacheScheme())
    write_quantized(tiny_decoder("llama"), "paddle", whole, folder)
    return folder


def test_paddle_names_its_scales(tmp_path: Path) -> None:
    folder = paddle(tmp_path / "out")
    layer = "llama.layers.0"
    keys = {name: set(json.loads((folder / f"{name}.json").read_text())) for name in ("weight_scales", "act_scales")}
    assert f"{layer}.self_attn.q_proj.weight_quanter" in keys["weight_scales"] and len(keys["weight_scales"]) == 14
    assert f"{layer}.mlp.down_proj.activation_quanter" in keys["act_scales"] and len(keys["act_scales"]) == 14
    caches = json.loads((folder / "cachekv_scales.json").read_text())
    assert len(caches) == 4 and len(caches[f"{layer}.self_attn.cachek_matmul.activation_quanter"]) == 2
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == {"quant_type": "a8w8c8"}
    tensors = load_file(folder / "model.safetensors")
    assert tensors[f"{layer}.mlp.down_proj.weight"].dtype == torch.int8
    assert tensors[f"{layer}.mlp.down_proj.weight"].shape == (48, 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.layers.0.mlp.up_proj.weight_quanter", [1.0], None),
        ("llama.layers.0.mlp.up_proj.weight_quanter", [1.0, 2.0], "2 scales in weight_scales.json for 48 outputs"),
        ("llama.layers.0.mlp.up_proj.weight_quanter", None, "no scales in weight_scales.json for 48 outputs"),
        ("llama.layers.0.mlp.up_proj.weight_quanter", "1", "not a number, nor a list of them"),
        ("llama.layers.0.mlp.up_proj.weight_quanter", [float("inf")], "a scale is NaN or infinite"),
    ],
)
def test_paddle_scales_that_do_not_fit(key: str, value: object, message: str | None, tmp_path: Path) -> None:
    folder = paddle(tmp_path / "out")
    path = folder / "weight_scales.json"
    scales = json.loads(path.read_text()) | {key: value}
    path.write_text(json.dumps({name: scale for name, scale in scales.items() if scale is not None}))
    if message is None:
        with open_model(folder)[1] as source:
            assert source.read("model.layers.0.mlp.up_proj.weight").abs().max() <= 1
        return
    with pytest.raises(CheckpointError, match=message), open_model(folder)[1] as source:
        source.read("model.layers.0.mlp.up_proj.weight")


def test_paddle_without_scales_of_inputs(tmp_path: Path) -> None:
    folder = paddle(tmp_path / "out")
    (folder / "act_scales.json").unlink()
    (folder / "cachekv_scales.json").unlink()
    assert read_scheme(folder) == StoredScheme()
