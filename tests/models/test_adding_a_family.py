"""The worked example of docs/adding-a-family.md is a whole family: it loads, computes and saves like the original."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from oarsmith.checkpoint.fill import empty_decoder, fill
from oarsmith.checkpoint.hf import iter_named
from oarsmith.checkpoint.source import open_source
from oarsmith.models.families.base import Family

from .conftest import randomise, read_json, tokens
from .variants import SIZES

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
CODE = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)[0]
CONFIGS = {
    "pythia": {"rotary_pct": 0.25},
    "one after the other": {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 1.0},
}


def example() -> Family:
    module = ModuleType("worked_example")
    exec(compile(CODE, str(PAGE), "exec"), module.__dict__)
    return module.FAMILY


def test_it_is_short() -> None:
    assert len(CODE.splitlines()) < 80
    assert all(len(line) <= 120 for line in CODE.splitlines())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_model_transformers_has(name: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {**SIZES, **CONFIGS[name]}
    oracle = transformers.AutoModelForCausalLM.from_config(
        transformers.GPTNeoXConfig(**arguments), attn_implementation="eager"
    ).eval()
    randomise(oracle, seed=7)
    oracle.save_pretrained(tmp_path)
    for config in (read_json(tmp_path / "config.json"), {**arguments, "model_type": "gpt_neox"}):
        family = example()
        spec = family.build(config)
        model = empty_decoder(spec, config, torch.float32)
        with open_source(tmp_path) as source:
            fill(model, family.names(spec), source)
        ids = tokens(2, 40)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids), oracle(ids).logits, rtol=0, atol=1e-4)
        stored, written = load_file(tmp_path / "model.safetensors"), dict(iter_named(model, family.names(spec)))
        assert written.keys() == stored.keys()
        assert all(torch.equal(written[key], stored[key]) for key in stored)
