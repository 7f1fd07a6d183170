"""Families that live in their authors' layout, against native twins: the oracle's weights packed by hand.

The fixtures (test_reference_outputs.py) show one configuration of each; these show the switches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from oarsmith.checkpoint.hf import load_decoder, write_decoder
from oarsmith.checkpoint.source import open_source
from oarsmith.errors import ModelError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder

from .conftest import Case, randomise, read_json, tokens
from .test_cache import AUTHORS, FAMILIES, Make, document
from .test_families import TOLERANCE
from .variants import GQA, SIZES, rope

Weights = dict[str, Tensor]
HEADS, DIM = 4, 8


def twin(kind: Any, **arguments: Any) -> tuple[Any, Weights]:
    """A random transformers model and its tensors by name."""
    model = transformers.AutoModelForCausalLM.from_config(kind(**arguments), attn_implementation="eager").eval()
    randomise(model, seed=3)
    return model, {key: value.detach().clone() for key, value in model.state_dict().items()}


def packed(folder: Path, config: dict[str, Any], weights: Weights) -> Decoder:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    return load_decoder(folder).eval()


@torch.no_grad()
def same(model: Decoder, oracle: Any, length: int = 40) -> None:
    ids = tokens(2, length)
    for row in ids:  # one at a time: a dynamic rope of the oracle keeps state
        torch.testing.assert_close(model(row[None]), oracle(row[None]).logits, rtol=0, atol=TOLERANCE)


def take(weights: Weights, layer: int, kind: str) -> list[Tensor]:
    return [weights.pop(f"model.layers.{layer}.self_attn.{name}_proj.{kind}") for name in "qkv"]


def by_group(parts: list[Tensor], groups: int) -> Tensor:
    """q, k and v rows, kv head by kv head: its queries, its key, its value."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


def renamed(weights: Weights, **words: str) -> Weights:
    found = {}
    for name, tensor in weights.items():
        for old, new in words.items():
            name = name.replace(old, new)
        found[name] = tensor
    return found


@pytest.mark.parametrize("scaling", [{}, rope("linear", factor=2.0), rope("dynamic", factor=2.0)], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_internlm2(tmp_path: Path, bias: bool, scaling: dict[str, Any]) -> None:
    sizes = {**GQA, "attention_bias": bias, "max_position_embeddings": 16, **scaling}
    oracle, weights = twin(transformers.LlamaConfig, **sizes)
    for layer in range(3):
        for kind in ("weight", "bias") if bias else ("weight",):
            rows = by_group(take(weights, layer, kind), 2)
            weights[f"model.layers.{layer}.self_attn.wqkv.{kind}"] = rows
    weights = renamed(
        weights,
        embed_tokens="tok_embeddings",
        self_attn="attention",
        o_proj="wo",
        mlp="feed_forward",
        gate_proj="w1",
        up_proj="w3",
        down_proj="w2",
        input_layernorm="attention_norm",
        post_attention_layernorm="ffn_norm",
        lm_head="output",
    )
    old = {"type": scaling["rope_parameters"]["rope_type"], "factor": 2.0} if scaling else None
    config = {**GQA, "model_type": "internlm2", "bias": bias, "rope_scaling": old, "max_position_embeddings": 16}
    config["rope_theta"] = 5000.0 if scaling else 10000.0
    same(packed(tmp_path / "m", config, weights), oracle)


@pytest.mark.parametrize(
    ("keys", "normalized"),
    [
        ({"architectures": ["BaiChuanForCausalLM"]}, False),
        ({"architectures": ["BaichuanForCausalLM"]}, True),
        ({"architectures": ["BaichuanForCausalLM"], "norm_head": False}, False),
    ],
)
def test_baichuan_with_rope(tmp_path: Path, keys: dict[str, Any], normalized: bool) -> None:
    oracle, weights = twin(transformers.LlamaConfig, **SIZES)
    for layer in range(3):
        weights[f"model.layers.{layer}.self_attn.W_pack.weight"] = torch.cat(take(weights, layer, "weight"))
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if normalized:
        head = oracle.lm_head.weight.data
        head /= head.norm(dim=1, keepdim=True)
    same(packed(tmp_path / "m", {**SIZES, "model_type": "baichuan", **keys}, weights), oracle)


@pytest.mark.parametrize("name", AUTHORS)
def test_saved_as_the_authors_name_it(name: str, tmp_path: Path) -> None:
    """What a .bin held is written to safetensors bit for bit, but for buffers and a head that repeats the table."""
    model, ids = load_decoder(FAMILIES / name), document(name, 20, 5)[None]
    write_decoder(model, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    with open_source(FAMILIES / name) as source:
        kept = {key: torch.empty(shape, dtype=model.embedding.weight.dtype) for key, shape in source.shapes.items()}
        for key, tensor in kept.items():
            source.read_into(key, tensor)
    dropped = {key for key in kept if key not in written}
    assert all(key.endswith("inv_freq") or (key == "lm_head.weight" and model.spec.head.tied) for key in dropped)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in written.items())
    assert read_json(tmp_path / "config.json")["auto_map"] == read_json(FAMILIES / name / "config.json").get("auto_map")
    with torch.no_grad():
        assert torch.equal(load_decoder(tmp_path).eval()(ids), model.eval()(ids))


def test_baichuan_by_its_config() -> None:
    """Rope or ALiBi, NormHead or not: what told them apart is all that the released configs have."""
    sizes = {key: value for key, value in SIZES.items() if key != "max_position_embeddings"}
    base = {**sizes, "model_type": "baichuan", "model_max_length": 99, "architectures": ["BaichuanForCausalLM"]}
    for keys, normalized in (
        ({}, False),
        ({"tokenizer_class": "BaichuanTokenizer"}, True),
        ({"vocab_size": 125696}, True),
        ({"norm_head": True}, True),
        ({"vocab_size": 125696, "norm_head": False}, False),
    ):
        spec = families.build_spec({**base, **keys})[1]
        assert type(spec.layers[0].attention.position).__name__ == "Alibi" and spec.max_positions == 2 * 99
        assert spec.head.normalized == normalized, keys
        assert spec.embedding.padding_id == 0 and not spec.head.tied


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_chatglm2_layout(tmp_path: Path, shared: bool, bias: bool) -> None:
    """Also GLM-4-9B, whose rope_ratio multiplies the base; kv_channels times heads is not the hidden size."""
    groups, ratio = 2 if shared else HEADS, 1.0 if shared else 50.0
    sizes = {**SIZES, "num_key_value_heads": groups, "head_dim": 12, "partial_rotary_factor": 0.5}
    more = {"attention_bias": bias, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0 * ratio}}
    more["rope_parameters"]["partial_rotary_factor"] = 0.5
    oracle, weights = twin(transformers.GlmConfig, **sizes, **more, rms_norm_eps=1e-4, pad_token_id=0)
    for layer in range(3):
        for kind in ("weight", "bias") if bias else ("weight",):
            parts = take(weights, layer, kind)
            rows = torch.cat(parts) if shared else by_group(parts, HEADS)
            weights[f"model.layers.{layer}.self_attn.query_key_value.{kind}"] = rows
    weights = renamed(
        weights,
        **{"model.embed_tokens": "embedding.word_embeddings", "model.layers": "encoder.layers"},
        **{"model.norm": "encoder.final_layernorm", "lm_head": "output_layer", "self_attn": "self_attention"},
        o_proj="dense",
        gate_up_proj="dense_h_to_4h",
        down_proj="dense_4h_to_h",
    )
    config = {
        "model_type": "chatglm",
        "num_layers": 3,
        "hidden_size": 32,
        "ffn_hidden_size": 40,
        "padded_vocab_size": 101,
        "vocab_size": 90,
        "num_attention_heads": HEADS,
        "kv_channels": 12,
        "multi_query_attention": shared,
        "multi_query_group_num": 2,
        "add_qkv_bias": bias,
        "layernorm_epsilon": 1e-4,
        "rope_ratio": ratio,
        "seq_length": 64,
    }
    weights = {f"transformer.{name}": tensor for name, tensor in weights.items()}
    weights["transformer.rotary_pos_emb.inv_freq"] = torch.ones(3)
    same(packed(tmp_path / "m", config, weights), oracle)


def test_chatglm2_switches() -> None:
    config = {"model_type": "chatglm", "num_layers": 2, "padded_vocab_size": 11, "tie_word_embeddings": True}
    plain = families.build_spec(config)[1]
    assert (plain.hidden_size, plain.layers[0].attention.num_kv_heads, plain.max_positions) == (4096, 32, 2048)
    assert plain.layers[0].attention.packing == "grouped" and not plain.layers[0].attention.qkv.bias
    assert not plain.head.tied, "the authors' code does not tie"
    other = families.build_spec(
        {
            **config,
            "rmsnorm": False,
            "post_layer_norm": False,
            "add_bias_linear": True,
            "apply_residual_connection_post_layernorm": True,
        }
    )[1]
    layer = other.layers[0]
    assert other.final_norm is None and type(layer.wiring.ffn).__name__ == "NormedStream"
    assert type(layer.wiring.ffn.norm).__name__ == "LayerNormSpec"
    assert all(linear.bias for linear in (layer.attention.qkv, layer.attention.out, layer.ffn.gate_up, layer.ffn.down))
    names = {place.file for place in families.find(config).names(other).places}
    assert "transformer.encoder.final_layernorm.weight" not in names
    assert "transformer.encoder.layers.1.mlp.dense_4h_to_h.bias" in names


@pytest.mark.parametrize("first", [False, True], ids=["released", "first spelling"])
def test_qwen_up_to_its_context(tmp_path: Path, first: bool) -> None:
    """Within seq_length it is Qwen2 with other names; ``intermediate_size`` counts both halves."""
    eps = 1e-5 if first else 1e-6
    oracle, weights = twin(transformers.Qwen2Config, **SIZES, num_key_value_heads=HEADS, rms_norm_eps=eps)
    for layer in range(3):
        for kind in ("weight", "bias"):
            weights[f"model.layers.{layer}.self_attn.c_attn.{kind}"] = torch.cat(take(weights, layer, kind))
    weights = renamed(
        weights,
        **{"model.embed_tokens": "transformer.wte", "model.layers": "transformer.h", "model.norm": "transformer.ln_f"},
        self_attn="attn",
        o_proj="c_proj",
        down_proj="c_proj",
        gate_proj="w2",
        up_proj="w1",
        input_layernorm="ln_1",
        post_attention_layernorm="ln_2",
    )
    words = ("n_embd", "n_head", "n_layer", "n_positions", "ffn_hidden_size")
    names = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings", "intermediate_size")
    config = dict(zip(words if first else names, (32, HEADS, 3, 64, 80), strict=True))
    config |= {"model_type": "qwen", "vocab_size": 101, "kv_channels": DIM, "seq_length": 8 if first else 40}
    model = packed(tmp_path / "m", config, weights)
    assert (model.spec.layers[0].attention.log_n is None) == first, "the first release had both rules off by default"
    same(model, oracle)


def test_qwen_switches() -> None:
    base = {"model_type": "qwen", "vocab_size": 101, "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8}
    base |= {"num_hidden_layers": 2, "intermediate_size": 80, "seq_length": 16}
    on = families.build_spec(base)[1].layers[0]
    assert on.attention.log_n == 16 and on.attention.position.scaling.original_length == 16
    assert on.attention.qkv.bias and not on.attention.out.bias and not on.ffn.down.bias
    switched = {"use_dynamic_ntk": False, "use_logn_attn": False, "no_bias": False, "rotary_pct": 0.5}
    off = families.build_spec({**base, **switched, "scale_attn_weights": False, "rotary_emb_base": 7.0})[1].layers[0]
    assert off.attention.log_n is None and off.attention.position.scaling is None
    assert (off.attention.position.dim, off.attention.position.theta, off.attention.scale) == (4, 7.0, 1.0)
    assert off.attention.out.bias and off.ffn.gate_up.bias and off.ffn.down.bias
    key = {"apply_residual_connection_post_layernorm": True}
    assert families.build_spec({**base, **key})[1].layers[0] == on, "only the first release's code reads it"
    first = families.build_spec({**base, **key, "n_embd": 32})[1].layers[0]
    assert type(first.wiring.attention).__name__ == "NormedStream" and first.attention.log_n is None


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("falcon_7b", "RefinedWebModel"),
        ("falcon_40b", "RefinedWeb"),
        ("falcon_rw", "RefinedWebModel"),
        ("falcon_sequential", "RefinedWebModel"),
    ],
)
def test_the_first_falcons(case: Make, name: str, model_type: str, tmp_path: Path) -> None:
    """n_layer, n_head, n_head_kv, no new_decoder_architecture, and a rotary buffer in the file."""
    made, new = case(name), read_json(case(name).path / "config.json")
    keep = ("vocab_size", "hidden_size", "alibi", "bias", "multi_query", "parallel_attn", "layer_norm_epsilon")
    config = {key: new[key] for key in keep} | {"model_type": model_type, "architectures": ["RWForCausalLM"]}
    config |= {"n_layer": new["num_hidden_layers"], "n_head": new["num_attention_heads"]}
    config |= {"n_head_kv": new["num_kv_heads"]} if name == "falcon_40b" else {}
    weights = transformers_weights(made)
    model = packed(tmp_path / "m", config, weights)
    ids = tokens(1, 20)
    with torch.no_grad():
        assert torch.equal(model(ids), made.decoder()(ids))


def transformers_weights(made: Case) -> Weights:
    weights = {key: value.detach().clone() for key, value in made.oracle().state_dict().items()}
    weights["transformer.h.0.self_attention.maybe_rotary.inv_freq"] = torch.ones(4)
    return weights


def test_bloom_as_released(case: Make) -> None:
    """n_embed and num_attention_heads, in files without the "transformer." prefix."""
    new = read_json(case("bloom").path / "config.json")
    config = {"model_type": "bloom", "vocab_size": 101, "n_embed": 32, "n_layer": 3, "num_attention_heads": 4}
    assert families.build_spec({**config, "hidden_size": 8})[1] == families.build_spec(new)[1]


QWEN = {"model_type": "qwen", "hidden_size": 32, "num_attention_heads": 4, "kv_channels": 8, "seq_length": 16}
CHATGLM = {"model_type": "chatglm", "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2}
YUAN = {**SIZES, "model_type": "yuan", "pad_token_id": 0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**QWEN, "kv_channels": 16}, "kv_channels 16 times 4 heads is not hidden_size 32"),
        ({**QWEN, "rotary_pct": 1.5}, "rotary_pct must lie in (0, 1], got 1.5"),
        ({**QWEN, "seq_length": None}, "seq_length must be a positive integer, got None"),
        ({**QWEN, "pos_emb": "learned"}, "pos_emb 'learned' is not supported"),
        ({**QWEN, "use_cache_quantization": True}, "use_cache_quantization True is not supported"),
        ({**QWEN, "vocab_size": 90, "padded_vocab_size": 101}, "padded_vocab_size 101 is not supported"),
        ({**CHATGLM, "quantization_bit": 8}, "quantization_bit 8 is not supported"),
        ({**CHATGLM, "pre_seq_len": 128}, "pre_seq_len 128 is not supported"),
        ({**CHATGLM, "position_encoding_2d": False}, "position_encoding_2d False is not supported"),
        ({**CHATGLM, "hidden_size": 72}, "hidden_size 72 does not give each of 4 heads a multiple of 4 entries"),
        ({**CHATGLM, "padded_vocab_size": 9, "quantization_bit": 4}, "quantization_bit 4 is not supported"),
        ({**CHATGLM, "padded_vocab_size": 9, "vision_config": {}}, "vision_config {} is not supported"),
        (
            {**CHATGLM, "padded_vocab_size": 9, "multi_query_attention": True, "multi_query_group_num": 3},
            "4 heads cannot be shared by 3 key/value heads",
        ),
        ({**YUAN, "use_shareqk": True}, "use_shareqk True is not supported"),
        ({**YUAN, "causal_mask": False}, "causal_mask False is not supported"),
        ({**YUAN, "moe_config": {"moe_num_experts": 32}}, "is not supported"),
        ({**YUAN, "pad_token_id": 101}, "pad_token_id 101 is outside the vocabulary of 101"),
        ({**YUAN, "num_attention_heads": 5}, "hidden_size 32 is not a multiple of 5 heads"),
        ({"model_type": "bloom", "slow_but_exact": True, "pretraining_tp": 4}, "slow_but_exact True is not supported"),
        ({"model_type": "bloom", "n_head": 7}, "hidden_size 64 is not a multiple of 7 heads"),
        ({**SIZES, "model_type": "opt", "num_attention_heads": 5}, "hidden_size 32 is not a multiple of 5 heads"),
        ({**SIZES, "model_type": "falcon", "num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn must be 1 or 2"),
        (
            {**SIZES, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 3},
            "4 heads cannot be shared by 3 key/value heads",
        ),
    ],
)
def test_refused_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        families.build_spec({"vocab_size": 101, "num_hidden_layers": 2, **config})
    assert message in str(caught.value) and str(caught.value).startswith("config.json"), caught.value


def test_two_families_under_one_model_type() -> None:
    for keys, name in (
        ({"position_encoding_2d": True, "inner_hidden_size": 128}, "chatglm"),
        ({}, "chatglm"),
        ({"padded_vocab_size": 9}, "chatglm2"),
        ({"multi_query_attention": True, "kv_channels": 16}, "chatglm2"),
    ):
        assert families.find({"model_type": "chatglm", **keys}).name == name
    for keys, name in (
        ({}, "falcon"),
        ({"new_decoder_architecture": True}, "falcon_40b"),
        ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}, "falcon"),
    ):
        assert families.find({"model_type": "falcon", **keys}).name == name
