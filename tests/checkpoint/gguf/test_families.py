"""Every family transformers has: written as GGUF, computed by llama.cpp, and read back into what it was."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file

from oarsmith.checkpoint.gguf.architectures import FAMILIES
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.family import Config
from oarsmith.checkpoint.gguf.links import expand
from oarsmith.checkpoint.gguf.write import write_gguf

from .files import llama_cpp_logits, random_model, rope, save_directory

T = transformers
INPUT_IDS = torch.tensor([[5, 17, 250, 3, 99, 120, 7, 64, 31, 200, 11, 12, 13, 290, 45, 46, 47, 48, 101, 102, 33, 44]])
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED = COMMON | {"tie_word_embeddings": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IDS = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FALCON = IDS | {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MLA = COMMON | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_shared_experts": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": True}
LITE = MLA | {"q_lora_rank": None, "num_hidden_layers": 27}  # llama.cpp knows the Lite model by its layers
WIDE = {"head_dim": 32}
GEMMA = TIED | WIDE | {"query_pre_attn_scalar": 32, "sliding_window": 8}
GPT_OSS = COMMON | WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
LONG = {"short_factor": [1 + i / 8 for i in range(6)], "long_factor": [2.0 + i for i in range(6)]}


def yarn(**values: Any) -> dict[str, Any]:
    return rope("yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, **values)


def phi3(original: int) -> dict[str, Any]:
    scaling = rope("longrope", rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=original)
    lengths = {"max_position_embeddings": 4 * original, "original_max_position_embeddings": original}
    return COMMON | lengths | {"rope_parameters": scaling | LONG}


CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama-llama3": T.LlamaConfig(
        **COMMON,
        rope_parameters=rope(
            "llama3",
            rope_theta=5e5,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-tied-bias": T.LlamaConfig(**TIED, attention_bias=True, mlp_bias=True),
    "llama-yarn": T.LlamaConfig(**COMMON, rope_parameters=yarn(attention_factor=1.3)),
    "mistral": T.MistralConfig(**COMMON, sliding_window=64),
    "mixtral": T.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": T.Qwen2Config(**TIED),
    "qwen3": T.Qwen3Config(**COMMON, **WIDE),
    "qwen2_moe": T.Qwen2MoeConfig(**COMMON, **MOE, shared_expert_intermediate_size=48),
    "qwen3_moe": T.Qwen3MoeConfig(**COMMON, **MOE, **WIDE, norm_topk_prob=True),
    "granite": T.GraniteConfig(
        **COMMON, embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2
    ),
    "smollm3": T.SmolLM3Config(**COMMON | {"num_hidden_layers": 4}),
    "olmo2": T.Olmo2Config(**COMMON),
    "cohere": T.CohereConfig(**TIED, logit_scale=0.25),
    "gemma": T.GemmaConfig(**TIED, **WIDE),
    "gemma2": T.Gemma2Config(**GEMMA | {"num_hidden_layers": 3}),
    "gemma3": T.Gemma3TextConfig(
        **GEMMA | {"num_hidden_layers": 7},
        rope_parameters={
            "full_attention": rope("linear", rope_theta=1e6, factor=8.0),
            "sliding_attention": rope("default", rope_theta=1e4),
        },
    ),
    "glm": T.GlmConfig(**COMMON, head_dim=16),
    "glm4": T.Glm4Config(**COMMON, head_dim=16),
    "phi3": T.Phi3Config(**COMMON),
    "phi3-short": T.Phi3Config(**phi3(512)),
    "phi3-long": T.Phi3Config(**phi3(16)),
    "bloom": T.BloomConfig(hidden_size=60, n_layer=2, n_head=5, **IDS),
    "falcon-7b": T.FalconConfig(**FALCON),
    "falcon-40b": T.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "falcon-11b": T.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1),
    "starcoder2": T.Starcoder2Config(**COMMON),
    "gpt2": T.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=256, **IDS),
    "deepseek_v2": T.DeepseekV2Config(**MLA, n_shared_experts=2, topk_method="greedy", routed_scaling_factor=1.5),
    "deepseek_v2-lite": T.DeepseekV2Config(**LITE, n_shared_experts=2, topk_method="greedy"),
    "deepseek_v3": T.DeepseekV3Config(**MLA, **GROUPS),
    "deepseek_v3-yarn": T.DeepseekV3Config(**MLA, **GROUPS, rope_parameters=yarn(mscale=0.707, mscale_all_dim=0.707)),
    "gpt_oss": T.GptOssConfig(**GPT_OSS, rope_parameters=rope("default", rope_theta=1e4)),
    "gpt_oss-yarn": T.GptOssConfig(**GPT_OSS, rope_parameters=yarn(truncate=True)),
}


@cache
def logits(name: str) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = random_model(CONFIGS[name])(INPUT_IDS).logits
    return result


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """written(name) -> a folder with the model (``hf``) and its file (``m.gguf``), made once."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        directory = save_directory(random_model(CONFIGS[name]), folder / "hf")
        write_gguf(directory, folder / "m.gguf", type="f32")
        return folder

    return make


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_what_transformers_does(name: str, written: Any) -> None:
    actual = llama_cpp_logits(written(name) / "m.gguf", INPUT_IDS)
    # llama.cpp keeps its cache in float16, 3 decimal digits; gemma3 has the most layers.
    torch.testing.assert_close(actual, logits(name)[0], rtol=0, atol=2e-2)


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_way_back_is_exact(name: str, written: Any) -> None:
    folder = written(name)
    report = convert_gguf(folder / "m.gguf", folder / "back")
    before, after = (load_file(folder / side / "model.safetensors") for side in ("hf", "back"))
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if "gemma" in name and key.endswith("norm.weight"):
            torch.testing.assert_close(after[key], tensor, rtol=0, atol=2e-7)  # through 1 + w
        else:
            assert torch.equal(after[key], tensor), key
    assert report.model_type == CONFIGS[name].model_type
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(INPUT_IDS).logits, logits(name), rtol=0, atol=2e-5)


def test_names_are_llama_cpp_s() -> None:
    """The gguf package's own table of names agrees, wherever one tensor is one tensor on both sides."""
    compared = set()
    for name, config in CONFIGS.items():
        family = next(item for item in FAMILIES if item.model_type == config.model_type)
        where = Config(config.to_dict(), name)
        dims = family.dims(where)
        arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.arch)
        table = gguf.get_tensor_name_map(arch, dims["layers"])
        for link in family.links(where, dims):
            for item in expand(link):
                if len(item.parts) == 1 and "." in item.hf[0] and not item.per_expert:
                    hf = item.hf[0].replace("e_score_correction_bias", "e_score_correction.bias")
                    expected = table.get_name(hf, try_suffixes=(".weight", ".bias"))
                    if expected is not None:  # the table does not list a head for families that always tie it
                        # The conversion script adds the suffix where transformers' name has none.
                        suffix = ".weight" if family.arch == "gpt-oss" and "." not in expected[6:] else ""
                        assert item.parts[0].name == expected + suffix, (name, item)
                        compared.add(family.arch)
    assert compared == {family.arch for family in FAMILIES} - {"internlm2", "baichuan", "qwen"}


def test_experts_lie_one_after_the_other(written: Any) -> None:
    """Streamed one at a time, they still make llama.cpp's stack."""
    folder = written("mixtral")
    reader = gguf.GGUFReader(folder / "m.gguf")
    stack = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up_exps.weight")
    tensors = load_file(folder / "hf" / "model.safetensors")
    for expert in range(4):
        key = f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"
        assert torch.equal(torch.from_numpy(stack.data[expert].copy()), tensors[key])


def test_configs_survive(written: Any) -> None:
    """What config.json says of the computation is there again after both ways."""
    skipped = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "architectures", "rope_parameters"}
    differing: dict[str, set[str]] = {}
    for name in CONFIGS:
        folder = written(name)
        if not (folder / "back").exists():
            convert_gguf(folder / "m.gguf", folder / "back")
        before = json.loads((folder / "hf" / "config.json").read_text())
        after = transformers.AutoConfig.from_pretrained(folder / "back").to_dict()
        changed = {key for key, value in before.items() if key not in skipped and after.get(key) != value}
        if changed:
            differing[name] = changed
    # Null or the number it means; falcon-7b does not use its num_kv_heads.
    assert differing == {
        "mixtral": {"head_dim"},
        "falcon-7b": {"num_kv_heads", "num_ln_in_parallel_attn"},
        "deepseek_v2": {"n_group", "topk_group"},
        "deepseek_v2-lite": {"n_group", "topk_group"},
    }


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "gemma2", "bloom"])
def test_quantized_files_run(name: str, written: Any, tmp_path: Path) -> None:
    """llama.cpp takes the types each tensor was given; its answers are near those of the same rounded weights."""
    folder = written(name)
    write_gguf(folder / "hf", tmp_path / "m.gguf", type="q8_0")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back", "float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(INPUT_IDS).logits[0]
    difference = (llama_cpp_logits(tmp_path / "m.gguf", INPUT_IDS) - expected).abs().mean()
    # It rounds activations to 8 bits too, which may send a token to another expert.
    assert difference < 0.05 * expected.abs().max()
