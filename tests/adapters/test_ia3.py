"""IA3 beside PEFT, and the places it chooses by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from oarsmith.adapters.change import Change
from oarsmith.adapters.ia3 import ScaledInput, ScaledOutput
from oarsmith.adapters.methods import changes_of
from oarsmith.adapters.peft_layout import CONFIG, WEIGHTS
from oarsmith.checkpoint.hf import projection_places
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError
from oarsmith.models import families

from .beside_peft import read, read_by_peft, refused, same_answers_and_merge, same_gradients
from .conftest import Adapted, Base

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "peft's own places": ("llama", {}),
    "all": ("llama", {"target_modules": "all-linear", "feedforward_modules": ["down_proj", "o_proj"]}),
    "parts of a fused map": ("llama", {"target_modules": ["q_proj", "v_proj"], "feedforward_modules": ["v_proj"]}),
    "gpt2's own places": ("gpt2", {"fan_in_fan_out": True}),
    "gpt2": ("gpt2", {"target_modules": ["attn.c_proj", "c_fc"], "feedforward_modules": [], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_s(adapted: Callable[..., Adapted], name: str) -> None:
    kind, arguments = CASES[name]
    made = adapted(kind, kind=peft.IA3Config, **arguments)
    same_gradients(made, "ia3_l")
    same_answers_and_merge(made)


def chosen(config: Mapping[str, Any], *words: str) -> dict[str, Change]:
    """Of a family's config, in the first layer that has them."""
    keys = load_config(SftConfig, None, ["m", "d", "--adapter_type", "ia3", *words]).config
    family, spec = families.build_spec(config)
    return dict(changes_of(keys, projection_places(family.names(spec))))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("words", [(), ("--lora_target_modules", "all-linear")])
def test_ours(base: Callable[[str], Base], tmp_path: Path, name: str, words: tuple[str, ...]) -> None:
    made = base(name)
    picked = chosen(json.loads((made.path / "config.json").read_text()), *words)
    read_by_peft(made, tmp_path / "adapter", lambda modules: picked)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert set(config["feedforward_modules"]) < set(config["target_modules"])


OUTPUTS = {
    "llama31_rope": {"k_proj", "v_proj"},
    "chatglm_6b": {"query_key_value"},
    "chatglm2_6b": {"query_key_value"},
    "baichuan_7b": {"W_pack"},
    "qwen1_ntk_logn": {"c_attn"},
    "internlm2": {"wqkv"},
    "yuan2_2b": {"k_proj", "v_proj"},
    "deepseek_v3": {"kv_b_proj"},
    "gpt_oss": {"k_proj", "v_proj"},
}
INPUTS = {
    "chatglm_6b": {"dense_4h_to_h"},
    "chatglm2_6b": {"dense_4h_to_h"},
    "qwen1_ntk_logn": {"c_proj"},
    "internlm2": {"w2"},
    "gpt_oss": set(),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_places_of_families(name: str) -> None:
    found = chosen(json.loads((FAMILIES / name / "config.json").read_text()))
    for kind, expected in ((ScaledOutput, OUTPUTS[name]), (ScaledInput, INPUTS.get(name, {"down_proj"}))):
        modules = [module for module, change in found.items() if type(change) is kind]
        assert {module.rsplit(".", 1)[-1] for module in modules} == expected
        assert all(("att" in module) == (kind is ScaledOutput) for module in modules)


def test_feedforward_modules() -> None:
    config = json.loads((FAMILIES / "llama31_rope" / "config.json").read_text())
    found = chosen(config, "--lora_target_modules", "q_proj,up_proj", "--ia3_feedforward_modules", "q_proj")
    assert {m.rsplit(".", 1)[-1] for m, change in found.items() if isinstance(change, ScaledInput)} == {"q_proj"}
    with pytest.raises(ConfigError, match=r"ia3_feedforward_modules: o_proj selects no projection") as caught:
        chosen(config, "--lora_target_modules", "q_proj,up_proj", "--ia3_feedforward_modules", "o_proj")
    assert "q_proj" in str(caught.value.fix)


def test_a_vector_that_lies_wrong(adapted: Callable[..., Adapted]) -> None:
    made = adapted("llama", kind=peft.IA3Config)
    stored = load_file(made.path / WEIGHTS)
    name = next(name for name in stored if "down_proj" in name)
    save_file({**stored, name: torch.ones(40)}, made.path / WEIGHTS)
    assert "has an ia3_l of shape (40,), not [1, in] or [out, 1]" in refused(lambda: read(made))
    save_file({**stored, name: torch.ones(40, 1)}, made.path / WEIGHTS)
    assert f"tensor {name} has shape (40, 1), the base model asks for (24, 1)" in refused(lambda: read(made))
