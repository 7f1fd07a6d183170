"""A stretched config read by transformers and by us: the same logits, within the trained context and beyond it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.families.base import StretchKind
from oarsmith.models.spec_position import DynamicScaling, LinearScaling, Rope, YarnScaling
from oarsmith.models.stretch import stretch
from tiny import CONFIGS

from .conftest import BOTH_SPELLINGS, Case, old_spelling, read_json, tokens
from .test_cache import FAMILIES

Make = Callable[[str], Case]
KINDS: tuple[StretchKind, ...] = get_args(StretchKind)
# Plain rope of every other kind: whole and part of a head, adjacent pairs, latent heads, two ropes, own words for it.
NAMES = ["llama", "mistral", "qwen2", "cohere", "glm", "starcoder2", "olmo2", "falcon_7b", "gpt_neox", "mixtral"]
TRAINED = 24


def stretched(folder: Path, config: dict[str, Any], kind: StretchKind, factor: float, target: Path) -> dict[str, Any]:
    """The same weights with another config."""
    shutil.copytree(folder, target)
    changed = stretch(config, kind, factor)
    (target / "config.json").write_text(json.dumps(changed))
    return changed


def compare(path: Path) -> None:
    """Logits of one document below and beyond the trained length, in training mode and outside it."""
    ours = load_decoder(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    for length in (TRAINED - 5, 2 * TRAINED + 9, TRAINED - 5):
        ids = tokens(1, length)
        for training in (True, False):
            with torch.no_grad():
                found, expected = ours.train(training)(ids), theirs.train(training)(ids).logits
            # fp32 on both sides; angles of up to 57 radians carry an error of 57 * 2^-24 each.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", NAMES)
def test_logits(case: Make, tmp_path: Path, name: str, spelling: str, kind: StretchKind) -> None:
    if spelling == "rope_scaling" and name not in BOTH_SPELLINGS:
        pytest.skip("the older spelling cannot say this model")
    config = {**read_json(case(name).path / "config.json"), "max_position_embeddings": TRAINED}
    if name.startswith("falcon") or name == "gpt_neox":
        config |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    if name == "gpt_neox":  # this tiny one turns two entries of a head
        config["rope_parameters"]["partial_rotary_factor"] = 0.5
    if name == "mixtral":  # transformers' dynamic and yarn rules do not find what a null stands for
        config["head_dim"] = 8
    if spelling == "rope_scaling":
        config = old_spelling(config)
    if spelling == "rope_scaling" and name == "gpt_neox":  # its own words
        config |= {"rotary_pct": config.pop("partial_rotary_factor"), "rotary_emb_base": config.pop("rope_theta")}
    before = json.dumps(config)
    changed = stretched(case(name).path, config, kind, 2.5, tmp_path / "model")
    assert json.dumps(config) == before, "the config given stays as it is"
    spec, plain = families.build_spec(changed)[1], families.build_spec(config)[1]
    assert spec.max_positions == int(2.5 * plain.max_positions) == 60
    compare(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_rule(kind: StretchKind) -> None:
    """What the spec says afterwards, by the formulas of the papers."""
    config = {**CONFIGS["llama"], "max_position_embeddings": 256, "rope_theta": 5000.0}
    rope = families.build_spec(stretch(config, kind, 4.0))[1].layers[0].attention.position
    assert isinstance(rope, Rope)
    expected = {
        "linear": LinearScaling(factor=4.0),
        "ntk": None,
        "dynamic": DynamicScaling(factor=4.0, original_length=256),
        "yarn": YarnScaling(
            factor=4.0, original_length=256, beta_fast=32, beta_slow=1, attention_factor=0.1 * math.log(4.0) + 1
        ),
    }
    assert rope.scaling == expected[kind]
    assert rope.theta == (pytest.approx(5000.0 * 4.0 ** (8 / 6)) if kind == "ntk" else 5000.0)


@pytest.mark.parametrize("kind", KINDS)
def test_again(kind: StretchKind) -> None:
    """The same rule again changes nothing (but for ntk, which leaves no trace); another one is refused."""
    once = stretch(CONFIGS["llama"], kind, 4.0)
    if kind != "ntk":
        assert stretch(once, kind, 4.0) == once
        for other, factor in (("linear", 2.0), ("yarn", 2.0), ("dynamic", 2.0), ("ntk", 4.0)):
            with pytest.raises(ModelError, match="already stretched"):
                stretch(once, other, factor)
    assert stretch(once, kind, 1.0) == once and once != CONFIGS["llama"]


@pytest.mark.parametrize("factor", [0.5, -2.0, math.inf, math.nan])
def test_factors(factor: float) -> None:
    with pytest.raises(ModelError, match="times as long"):
        stretch(CONFIGS["llama"], "linear", factor)


@pytest.mark.parametrize("kind", ["ntk", "dynamic"])
def test_a_single_frequency_cannot_be_spread(kind: StretchKind) -> None:
    config = {**CONFIGS["llama"], "head_dim": 2}
    with pytest.raises(ModelError, match="2 turned entries of a head have only one"):
        stretch(config, kind, 2.0)


@pytest.mark.parametrize(
    ("name", "kinds", "reason"),
    [
        ("gpt2", (), "learn a vector for each of"),
        ("opt", (), "learn a vector"),
        ("bloom", (), "ALiBi"),
        ("falcon_rw", (), "ALiBi"),
        ("baichuan_13b", (), "ALiBi"),
        ("baichuan_7b", (), "neither a scaling rule nor a base"),
        ("yuan2_2b", (), "neither a scaling rule nor a base"),
        ("chatglm_6b", (), "fixed in the authors' code"),
        ("chatglm2_6b", ("ntk",), "rope_ratio alone"),
        ("qwen1_ntk_logn", ("ntk",), "the base alone"),
        ("internlm2", ("linear", "ntk", "dynamic"), "linear and dynamic alone"),
        ("phi3", ("ntk",), "other than longrope"),
        ("gemma2", ("linear", "ntk", "yarn"), "is the stretched one"),
        ("gpt_oss", (), "already stretched"),
        ("deepseek_v3", (), "already stretched"),
        ("llama31_rope", (), "already stretched"),
    ],
)
def test_families_that_differ(case: Make, name: str, kinds: tuple[StretchKind, ...], reason: str) -> None:
    folder = FAMILIES / name if (FAMILIES / name).exists() else case(name).path
    config = read_json(folder / "config.json")
    for kind in KINDS:
        if kind not in kinds:
            with pytest.raises(ModelError, match=reason):
                stretch(config, kind, 2.0)
        else:
            changed = stretch(config, kind, 2.0)
            spec, plain = families.build_spec(changed)[1], families.build_spec(config)[1]
            assert spec.max_positions == 2 * plain.max_positions
            assert spec != plain and changed != config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatglm2_6b", {"rope_ratio": 2.0 ** (8 / 6), "seq_length": 1024}),
        (
            "qwen1_ntk_logn",
            {"rotary_emb_base": 10000 * 2.0 ** (8 / 6), "seq_length": 48, "max_position_embeddings": 16384},
        ),
        ("internlm2", {"rope_theta": 1e6 * 2.0 ** (8 / 6), "max_position_embeddings": 1024}),
    ],
)
def test_own_words(name: str, expected: dict[str, float]) -> None:
    """Where the authors' code looks for the base and the length."""
    config = read_json(FAMILIES / name / "config.json")
    changed = stretch(config, "ntk", 2.0)
    assert {key for key in changed if changed[key] != config.get(key)} == set(expected)
    for key, value in expected.items():
        assert changed[key] == pytest.approx(value)


def test_internlm2_gets_the_two_keys_its_code_allows() -> None:
    config = read_json(FAMILIES / "internlm2" / "config.json")
    assert stretch(config, "dynamic", 2)["rope_scaling"] == {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_gemma3_stretches_the_layers_that_see_everything(case: Make, tmp_path: Path, kind: StretchKind) -> None:
    config = {**read_json(case("gemma3_types").path / "config.json"), "max_position_embeddings": TRAINED}
    config["rope_parameters"]["full_attention"] = {"rope_type": "default", "rope_theta": 5000.0}
    changed = stretched(case("gemma3_types").path, config, kind, 2.5, tmp_path / "model")
    assert changed["rope_parameters"]["sliding_attention"] == config["rope_parameters"]["sliding_attention"]
    assert families.build_spec(changed)[1].max_positions == 60
    compare(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_latent_attention(case: Make, tmp_path: Path, kind: StretchKind) -> None:
    config = {**read_json(case("deepseek_v2").path / "config.json"), "max_position_embeddings": TRAINED}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5000.0}
    stretched(case("deepseek_v2").path, config, kind, 2.5, tmp_path / "model")
    compare(tmp_path / "model")
