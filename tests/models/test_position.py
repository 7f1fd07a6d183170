"""Rotary frequencies against transformers' own functions, far beyond the trained context."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oarsmith.models import families
from oarsmith.models.layout import Layout
from oarsmith.models.position import inverse_frequencies, rope_tables
from oarsmith.models.spec_position import Rope, YarnScaling

SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn given factor": {"factor": 40.0, "original_max_position_embeddings": 4096, "attention_factor": 0.9},
    "yarn no attention change": {"factor": 1.0, "original_max_position_embeddings": 4096},
    "yarn mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "yarn exact range": {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
}


def layout_of(positions: list[int], lengths: list[int]) -> Layout:
    where, length = torch.tensor(positions), torch.tensor(lengths)
    return Layout((), (), where, length, length)


def tables(rope: Rope, positions: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    layout = layout_of(positions, lengths)
    return rope_tables(rope, layout, layout.positions_T, training=False)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [100, 131072])
def test_frequencies(name: str, length: int) -> None:
    parameters = {"rope_type": name.split()[0], "rope_theta": 500000.0, **SCALINGS[name]}
    config = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, head_dim=128, max_position_embeddings=4096, rope_parameters=parameters
    )
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    rope = families.build_spec(config.to_dict())[1].layers[0].attention.position
    assert isinstance(rope, Rope)
    found = inverse_frequencies(rope, layout_of([0], [length]))
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-6, atol=0)
    ours = rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0
    assert ours == pytest.approx(factor, rel=1e-12)


def test_tables_of_documents_with_different_lengths() -> None:
    """Dynamic scaling looks at each token's own document."""
    config = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 4,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    }
    rope = families.build_spec(config)[1].layers[0].attention.position
    assert isinstance(rope, Rope)
    cos, sin = tables(rope, [0, 1, 2, 2], [4, 4, 4, 9])
    assert cos.shape == sin.shape == (4, 4) and cos.dtype == torch.float32
    alone, _ = tables(rope, [2], [9])
    assert torch.equal(cos[3:], alone) and not torch.allclose(cos[2], cos[3])
    short, _ = tables(rope, [2], [3])
    assert torch.equal(cos[2:3], short), "below the trained length nothing changes"


def test_tables_are_fp32_under_autocast() -> None:
    rope = families.build_spec(transformers.LlamaConfig().to_dict())[1].layers[0].attention.position
    assert isinstance(rope, Rope)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = tables(rope, [100_000], [100_001])
    assert torch.equal(inside[0], tables(rope, [100_000], [100_001])[0]) and inside[0].dtype == torch.float32
