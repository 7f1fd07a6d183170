"""Fresh weights: the same for a seed, with the config's deviation."""

from __future__ import annotations

import pytest
import torch

from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights

from .conftest import tokens
from .variants import GPT2, GQA

CONFIGS = {
    "llama": {**GQA, "model_type": "llama", "initializer_range": 0.05},
    "gemma": {**GQA, "model_type": "gemma", "head_dim": 8},
    "qwen3": {**GQA, "model_type": "qwen3", "attention_bias": True, "head_dim": 8},
    "gpt2": {**GPT2, "model_type": "gpt2"},
}


def fresh(name: str, seed: int) -> Decoder:
    model = Decoder(families.build_spec(CONFIGS[name])[1], CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # whatever is not set shows
    init_weights(model, seed)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_the_seed_decides(name: str) -> None:
    torch.manual_seed(1)
    first = fresh(name, 5)
    torch.manual_seed(2)
    second, other = fresh(name, 5), fresh(name, 6)
    states = [list(model.state_dict().values()) for model in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_values(name: str) -> None:
    model = fresh(name, 0)
    model.requires_grad_(False)
    std = CONFIGS[name].get("initializer_range", 0.02)
    for key, parameter in model.named_parameters():
        if "norm" in key:
            expected = 0.0 if key.endswith("bias") or name == "gemma" else 1.0
            assert bool((parameter == expected).all()), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            # GPT-2 (section 2.3): maps into the residual stream are scaled by 1 / sqrt(number of residual layers).
            writes = name == "gpt2" and key.endswith((".out.weight", ".down.weight"))
            expected_std = std / 6**0.5 if writes else std
            assert float(parameter.std()) == pytest.approx(expected_std, rel=0.1), key
            assert abs(float(parameter.mean())) < std / 5, key
    with torch.no_grad():
        assert model(tokens(1, 5)).isfinite().all()
