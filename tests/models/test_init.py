"""Fresh weights: the same for a seed, with the config's deviation."""

from __future__ import annotations

import pytest
import torch

from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights

from .conftest import tokens
from .variants import GPT2, GQA, SIZES, experts

# GPT-2 (section 2.3), BLOOM and OPT (section 2.2): maps into the residual stream are scaled by 1 / sqrt(2 * layers).
SCALED = ("gpt2", "bloom", "opt", "qwen")

CONFIGS = {
    "llama": {**GQA, "model_type": "llama", "initializer_range": 0.05},
    "gemma": {**GQA, "model_type": "gemma", "head_dim": 8},
    "gemma3": {**GQA, "model_type": "gemma3_text", "head_dim": 8},
    "qwen3": {**GQA, "model_type": "qwen3", "attention_bias": True, "head_dim": 8},
    "qwen2_moe": {**experts.QWEN2, "model_type": "qwen2_moe"},
    "starcoder2": {**GQA, "model_type": "starcoder2", "initializer_range": 0.05},
    "cohere": {**GQA, "model_type": "cohere", "use_qk_norm": True},
    "gpt2": {**GPT2, "model_type": "gpt2"},
    "bloom": {**GQA, "model_type": "bloom"},
    "opt": {**GQA, "model_type": "opt", "ffn_dim": 40, "init_std": 0.006, "word_embed_proj_dim": 20},
    "falcon": {**GQA, "model_type": "falcon", "new_decoder_architecture": True},
    "qwen": {**GQA, "model_type": "qwen", "kv_channels": 8, "seq_length": 16},
    "internlm2": {**GQA, "model_type": "internlm2"},
    "baichuan": {**SIZES, "model_type": "baichuan", "norm_head": True},
    "yuan": {**SIZES, "model_type": "yuan", "pad_token_id": 0},
    "chatglm2": {"model_type": "chatglm", "padded_vocab_size": 101, "hidden_size": 32, "num_layers": 3},
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
    std = CONFIGS[name].get("initializer_range", CONFIGS[name].get("init_std", 0.02))
    for key, parameter in model.named_parameters():
        if "norm" in key:
            expected = 0.0 if key.endswith("bias") or name.startswith("gemma") else 1.0
            assert bool((parameter == expected).all()), key
        elif key.endswith("bias"):
            assert not parameter.any(), key
        else:
            writes = name in SCALED and key.endswith((".out.weight", ".down.weight"))
            expected_std = std / 6**0.5 if writes else std
            error = max(0.1, 3 / parameter.numel() ** 0.5)  # three deviations of what few numbers show
            assert float(parameter.std()) == pytest.approx(expected_std, rel=error), key
            assert abs(float(parameter.mean())) < 2 * error * std, key
    with torch.no_grad():
        assert model(tokens(1, 5)).isfinite().all()
