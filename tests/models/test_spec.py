"""The spec as data: every linear map has a path, and a rewrite touches what it is told to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.models.spec import DecoderSpec, linear_specs, rewrite_linears
from oarsmith.models.spec_parts import LinearSpec, Segment

CONFIGS = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16},
}


def spec_of(name: str) -> DecoderSpec:
    return families.build_spec(CONFIGS[name])[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_specs_are_the_linear_modules(name: str) -> None:
    spec = spec_of(name)
    modules = {path: m.spec for path, m in Decoder(spec, CONFIGS[name]).named_modules() if isinstance(m, Linear)}
    assert dict(linear_specs(spec)) == modules
    assert len(modules) == 2 * 4


@pytest.mark.parametrize("name", CONFIGS)
def test_rewriting_by_path(name: str) -> None:
    spec, seen = spec_of(name), []

    def rule(path: str, linear: LinearSpec) -> LinearSpec:
        seen.append(path)
        return replace(linear, bias=True) if path == "layers.1.attention.out" else linear

    changed = rewrite_linears(spec, rule)
    assert seen == [path for path, _ in linear_specs(spec)]
    assert changed.layers[0] == spec.layers[0]
    assert changed.layers[1].attention.out.bias
    differing = [path for (path, a), (_, b) in zip(linear_specs(spec), linear_specs(changed), strict=True) if a != b]
    assert differing == ([] if name == "gpt2" else ["layers.1.attention.out"]), "GPT-2 has that bias already"
    assert rewrite_linears(spec, lambda _, linear: linear) == spec


class Doubled(Linear):
    """A linear map that a rewrite put there."""


class Doubling:
    def build(self, spec: LinearSpec) -> Doubled:
        return Doubled(spec)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rewrite_builds_the_module(name: str) -> None:
    spec = rewrite_linears(
        spec_of(name), lambda path, old: replace(old, rewrite=Doubling()) if path.endswith("down") else old
    )
    model = Decoder(spec, CONFIGS[name])
    assert [path for path, m in model.named_modules() if isinstance(m, Doubled)] == [
        "layers.0.ffn.down",
        "layers.1.ffn.down",
    ]


def test_segments() -> None:
    linear = LinearSpec(in_features=4, segments=(Segment(name="q", size=6), Segment(name="k", size=2)))
    assert linear.out_features == 8
    assert [(segment.name, start, stop) for segment, start, stop in linear.bounds()] == [("q", 0, 6), ("k", 6, 8)]
