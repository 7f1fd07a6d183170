"""The GGUF writer: types, what reading back gives, refusals, and files that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from oarsmith.checkpoint.gguf.container import GgufInfo, GgufWriter
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.errors import CheckpointError

from .files import random_model, save_directory
from .test_families import COMMON, GEMMA, MLA, MOE, TIED, rope

T = transformers
Q = gguf.GGMLQuantizationType


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_directory(random_model(T.LlamaConfig(**COMMON)), tmp_path / "hf")


def change(directory: Path, **values: Any) -> None:
    """Change config.json; None takes a key out."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(directory: Path, **tensors: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    found = load_file(path) | {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({key: value for key, value in found.items() if value is not None}, path)


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_plain_types_keep_every_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save_directory(random_model(T.LlamaConfig(**COMMON)).to(dtype), tmp_path / "hf")
    report = write_gguf(directory, tmp_path / "m.gguf", type=name)
    assert report.tensor_types == ({"F32": 21} if name == "f32" else {name.upper(): 16, "F32": 5})
    assert (report.architecture, report.num_tensors, report.notes) == ("llama", 21, ())
    assert report.num_bytes == (tmp_path / "m.gguf").stat().st_size
    back = convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    assert back.dtype == str(dtype).removeprefix("torch.")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("hf", "back"))
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(("name", "kind"), [("q8_0", Q.Q8_0), ("q4_0", Q.Q4_0)])
def test_quantized_types_are_the_package_s(name: str, kind: gguf.GGMLQuantizationType, llama: Path) -> None:
    write_gguf(llama, llama / "m.gguf", type=name)
    tensors, reader = load_file(llama / "model.safetensors"), gguf.GGUFReader(llama / "m.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    expected = gguf.quants.quantize(tensors["model.layers.1.mlp.down_proj.weight"].numpy(), kind)
    down = stored["blk.1.ffn_down.weight"]
    assert down.tensor_type == kind
    assert np.array_equal(down.data, expected)
    assert stored["output.weight"].tensor_type == Q.Q8_0  # the head is worth more
    assert stored["token_embd.weight"].tensor_type == kind
    assert {tensor.tensor_type for key, tensor in stored.items() if key.endswith("norm.weight")} == {Q.F32}
    file_type = {"q8_0": gguf.LlamaFileType.MOSTLY_Q8_0, "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0}[name]
    assert reader.get_field("general.file_type").contents() == file_type


def test_rows_that_fill_no_block_stay_float16(tmp_path: Path) -> None:
    config = T.LlamaConfig(**COMMON | {"intermediate_size": 72})
    directory = save_directory(random_model(config), tmp_path / "hf")
    report = write_gguf(directory, tmp_path / "m.gguf", type="q8_0")
    assert report.tensor_types == {"Q8_0": 14, "F16": 2, "F32": 5}


def test_a_tied_head_is_left_out_and_its_embedding_spared(tmp_path: Path) -> None:
    directory = save_directory(random_model(T.LlamaConfig(**TIED)), tmp_path / "hf")
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, lm_head__weight=embedding.clone())  # as some files hold it
    write_gguf(directory, tmp_path / "m.gguf", type="q4_0")
    tensors = GgufFile(tmp_path / "m.gguf").tensors
    assert "output.weight" not in tensors
    assert tensors["token_embd.weight"].type == Q.Q8_0


def test_a_tied_head_is_stored_where_llama_cpp_wants_it(tmp_path: Path) -> None:
    config = T.Qwen2MoeConfig(**TIED, **MOE, shared_expert_intermediate_size=48)
    directory = save_directory(random_model(config), tmp_path / "hf")
    write_gguf(directory, tmp_path / "m.gguf", type="bf16")
    assert "output.weight" in GgufFile(tmp_path / "m.gguf").tensors
    assert convert_gguf(tmp_path / "m.gguf", tmp_path / "back").tied_head


def test_routers_and_positions_are_float32(tmp_path: Path) -> None:
    config = T.MixtralConfig(**COMMON, num_local_experts=4)
    write_gguf(save_directory(random_model(config), tmp_path / "hf"), tmp_path / "m.gguf", type="q8_0")
    tensors = GgufFile(tmp_path / "m.gguf").tensors
    assert tensors["blk.0.ffn_gate_inp.weight"].type == Q.F32
    assert tensors["blk.0.ffn_up_exps.weight"].type == Q.Q8_0
    gpt2 = T.GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=16, vocab_size=320)
    write_gguf(save_directory(random_model(gpt2), tmp_path / "gpt2"), tmp_path / "g.gguf", type="bf16")
    assert GgufFile(tmp_path / "g.gguf").tensors["position_embd.weight"].type == Q.F32


def test_older_files_hold_kv_b_whole(tmp_path: Path) -> None:
    """As llama.cpp wrote DeepSeek before 2025: one kv_b, and the true sizes of a head."""
    directory = save_directory(random_model(T.DeepseekV2Config(**MLA, n_shared_experts=1)), tmp_path / "hf")
    write_gguf(directory, tmp_path / "m.gguf", type="f32")
    file = GgufFile(tmp_path / "m.gguf")
    metadata = {key: value for key, value in file.metadata.items() if not key.endswith("_mla")}
    metadata |= {"deepseek2.attention.key_length": 24, "deepseek2.attention.value_length": 24}
    metadata |= {"deepseek2.attention.head_count_kv": 4}
    kept = {
        name: GgufInfo(tensor.shape, tensor.type)
        for name, tensor in file.tensors.items()
        if not name.endswith(("attn_k_b.weight", "attn_v_b.weight"))
    }
    old = {f"blk.{layer}.attn_kv_b.weight": GgufInfo((160, 32), Q.F32) for layer in range(3)}
    weights = load_file(directory / "model.safetensors")
    with GgufWriter(tmp_path / "old.gguf", metadata, kept | old) as writer:
        for name in kept:
            writer.write(name, file.read(file.tensors[name], torch.float32))
        for layer, name in enumerate(old):
            writer.write(name, weights[f"model.layers.{layer}.self_attn.kv_b_proj.weight"])
    convert_gguf(tmp_path / "old.gguf", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in weights.items())


def test_names_without_their_first_word_are_found(tmp_path: Path) -> None:
    config = T.GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=16, vocab_size=320)
    directory = save_directory(random_model(config), tmp_path / "hf")
    tensors = load_file(directory / "model.safetensors")
    short = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(short | {"h.0.attn.bias": torch.ones(1, 1, 16, 16)}, directory / "model.safetensors")
    write_gguf(directory, tmp_path / "m.gguf", type="f32")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_the_file_appears_whole_or_not_at_all(llama: Path) -> None:
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        seen.append((done, total))
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(llama, llama / "m.gguf", progress=stop)
    assert not list(llama.glob("*gguf*"))
    write_gguf(llama, llama / "m.gguf", progress=lambda *item: seen.append(item))
    assert seen[-1][0] == seen[-1][1]
    before = (llama / "m.gguf").read_bytes()
    with pytest.raises(CheckpointError, match="destination exists"):
        write_gguf(llama, llama / "m.gguf")
    change_tensors(llama, model__norm__weight=None)
    with pytest.raises(CheckpointError, match=r"the tensor model\.norm\.weight is missing"):
        write_gguf(llama, llama / "m.gguf", overwrite=True)
    assert (llama / "m.gguf").read_bytes() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act: llama.cpp computes llama with 'silu'; config.json says 'relu'"),
        ({"num_hidden_layers": 5000}, "5,000 layers, but there are 21 tensors"),
        ({"num_hidden_layers": 3}, r"the tensor model\.layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: '2' is not a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads: must not be 0"),
        ({"num_key_value_heads": 3}, "4 heads do not divide among 3"),
        ({"intermediate_size": 100}, r"gives blk\.0\.ffn_gate\.weight \(96, 64\); the config asks for .* \(100, 64\)"),
        ({"head_dim": 15}, r"q_proj\.weight has shape \(64, 64\)"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "llama.cpp has no rotary scaling 'proportional'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "rope_scaling, factor: 'x' is not a positive"),
        ({"rope_parameters": [1]}, r"\[1\] is not an object"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not a finite number"),
    ],
)
def test_configs_that_cannot_be_honoured(values: dict[str, Any], message: str, llama: Path) -> None:
    change(llama, **values)
    with pytest.raises(CheckpointError, match=message):
        write_gguf(llama, llama / "m.gguf")
    assert not (llama / "m.gguf").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T.Gemma2Config(**GEMMA | {"query_pre_attn_scalar": 16}), "query_pre_attn_scalar: llama.cpp takes 32"),
        (T.Gemma3TextConfig(**GEMMA, layer_types=["full_attention"] * 2), "every 6th layer a full one"),
        (T.SmolLM3Config(**COMMON, no_rope_layers=[1, 0]), "rotary embedding in every fourth layer"),
        (
            T.Qwen3MoeConfig(**COMMON, **MOE, norm_topk_prob=False),
            "norm_topk_prob: llama.cpp computes qwen3moe with True",
        ),
        (T.Qwen3MoeConfig(**COMMON, **MOE, norm_topk_prob=True, mlp_only_layers=[0]), r"mlp\.gate\.weight is missing"),
        (T.CohereConfig(**TIED, use_qk_norm=True), "models of 64 layers and more"),
        (T.DeepseekV2Config(**MLA | {"q_lora_rank": None}, n_shared_experts=1), "models of 26 or 27 layers"),
        (
            T.DeepseekV2Config(
                **MLA,
                n_shared_experts=1,
                rope_parameters=rope("yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=32),
            ),
            "YaRN without mscale_all_dim",
        ),
    ],
    ids=lambda value: value.model_type if hasattr(value, "model_type") else "",
)
def test_options_llama_cpp_does_not_have(config: Any, message: str, tmp_path: Path) -> None:
    random_model(config).save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError, match=message):
        write_gguf(tmp_path / "hf", tmp_path / "m.gguf")


def test_tensors_that_do_not_fit(llama: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown GGUF type 'q5_k'"):
        write_gguf(llama, llama / "m.gguf", type="q5_k")
    change_tensors(llama, model__layers__0__extra=torch.ones(2))
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.0\.extra has no place"):
        write_gguf(llama, llama / "m.gguf")
    change_tensors(llama, model__layers__0__extra=None, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is stored as I8: quantized weights"):
        write_gguf(llama, llama / "m.gguf")


def test_values_that_do_not_fit(llama: Path) -> None:
    weight = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    weight[3, 5] = 1e6
    change_tensors(llama, model__layers__0__mlp__up_proj__weight=weight)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight: a value does not fit into float16"):
        write_gguf(llama, llama / "m.gguf", type="f16")
    write_gguf(llama, llama / "m.gguf", type="bf16")
    with pytest.raises(CheckpointError, match="does not fit into float16"):
        convert_gguf(llama / "m.gguf", llama / "back", dtype="float16")
    weight[3, 5] = float("nan")
    change_tensors(llama, model__layers__0__mlp__up_proj__weight=weight)
    with pytest.raises(CheckpointError, match="NaN or infinite value cannot be quantized"):
        write_gguf(llama, llama / "q.gguf", type="q8_0")
    assert sorted(path.name for path in llama.glob("*.gguf")) == ["m.gguf"]


def test_a_file_without_a_tokenizer(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer found"):
        write_gguf(llama, llama / "m.gguf")
    write_gguf(llama, llama / "m.gguf", with_tokenizer=False)
    assert not [key for key in GgufFile(llama / "m.gguf").metadata if key.startswith("tokenizer")]
    report = convert_gguf(llama / "m.gguf", llama / "back")
    assert "no tokenizer" in report.notes[0] and not list((llama / "back").glob("tokenizer*"))


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    directory = save_directory(random_model(T.LlamaConfig(**COMMON | {"vocab_size": 200})), tmp_path / "hf")
    with pytest.raises(CheckpointError, match="token id 299, but the embedding has 200 rows"):
        write_gguf(directory, tmp_path / "m.gguf")


def test_metadata_values_come_back(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "a.bool": True,
        "a.small": 7,
        "a.large": 1 << 40,
        "a.negative": -3,
        "a.float": 1e-5,
        "a.text": "日本\n",
        "a.texts": ["", "x"],
        "a.numbers": [1, -2],
        "a.reals": [0.5, 2.0],
        "a.flags": [True, False],
        "a.bytes": b"\x00\xff",
    }
    with GgufWriter(tmp_path / "m.gguf", values, {"x": GgufInfo((3, 2), Q.F32)}) as writer:
        for index in range(3):
            writer.write("x", torch.full((2,), float(index)), index=index)
    file = GgufFile(tmp_path / "m.gguf")
    assert file.metadata == values | {"a.bytes": [0, 255]}
    assert file.read(file.tensors["x"], torch.float32).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert file.read(file.tensors["x"], torch.float32, index=1).tolist() == [1, 1]
    package = gguf.GGUFReader(tmp_path / "m.gguf")
    assert package.get_field("a.texts").contents() == ["", "x"]
    assert package.tensors[0].data.tolist() == [[0, 0], [1, 1], [2, 2]]


def test_declared_tensors_must_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="never written"),
        GgufWriter(tmp_path / "m.gguf", {}, {"x": GgufInfo((2, 2), Q.F32)}) as writer,
    ):
        writer.write("x", torch.ones(2), index=0)
    assert not list(tmp_path.iterdir())
