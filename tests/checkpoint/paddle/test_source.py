"""PaddleNLP's layouts, against files written with pickle and numpy by loops of their own."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file

import oarsmith
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.convert import Target, convert_directory
from oarsmith.checkpoint.paddle.config import from_paddle_config, to_paddle_config
from oarsmith.checkpoint.paddle.pdparams import PdparamsSource, read_pdparams
from oarsmith.errors import CheckpointError
from tiny import write_tiny_model

from .files import array, fuse, gpt_state, llama_state, save, shard

FIXTURES = Path(__file__).parents[2] / "fixtures" / "families"
PREFIXES = {"qwen3": "model"}  # otherwise the family's own name
LLAMA_LIKE = ("llama", "qwen2", "qwen3", "mistral", "gemma")


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny models."""


def hf_model(tmp_path: Path, family: str, **changes: Any) -> Path:
    return write_tiny_model(tmp_path / "hf", family, **changes)


def same_weights(a: Path, b: Path) -> None:
    mine, theirs = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def paddle_dir(hf: Path, folder: Path, files: dict[str, dict[str, np.ndarray]], **changes: Any) -> Path:
    """A directory as PaddleNLP leaves it: its config and pickles."""
    folder.mkdir()
    for name, state in files.items():
        save(state, folder / name, named="tp" in name)
    (folder / "config.json").write_text(json.dumps({**to_paddle_config(read_config(hf), "float32"), **changes}))
    return folder


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_reading_a_llama_like_model(family: str, tmp_path: Path) -> None:
    hf = hf_model(tmp_path, family)
    prefix = PREFIXES.get(family, family)
    state = llama_state(load_file(hf / "model.safetensors"), prefix)
    state[f"{prefix}.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, "f4")
    theirs = paddle_dir(hf, tmp_path / "paddle", {"model_state.pdparams": state})
    convert_directory(theirs, tmp_path / "back", "hf")
    same_weights(hf, tmp_path / "back")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(oarsmith.load_model(theirs)(ids), oarsmith.load_model(hf)(ids))


def test_reading_gpt(tmp_path: Path) -> None:
    hf = hf_model(tmp_path, "gpt2")
    state = gpt_state(load_file(hf / "model.safetensors"))
    state["lm_head.weight"] = state["gpt.embeddings.word_embeddings.weight"]
    convert_directory(paddle_dir(hf, tmp_path / "paddle", {"model_state.pdparams": state}), tmp_path / "back", "hf")
    same_weights(hf, tmp_path / "back")


@pytest.mark.parametrize(("degree", "fused"), [(2, False), (4, False), (2, True)])
def test_ranks_of_tensor_parallelism(degree: int, fused: bool, tmp_path: Path) -> None:
    """With 4 ranks and 2 key heads keys and values are copied to all ranks, not split."""
    hf = hf_model(tmp_path, "qwen2", tie_word_embeddings=False)
    state = llama_state(load_file(hf / "model.safetensors"), "qwen2")
    state = fuse(state, 4, 2) if fused else state
    files = {f"model_state.tp{rank:02}.pdparams": part for rank, part in enumerate(shard(state, degree, 2))}
    convert_directory(paddle_dir(hf, tmp_path / "paddle", files), tmp_path / "back", "hf")
    same_weights(hf, tmp_path / "back")


def test_pipeline_stages_beside_ranks(tmp_path: Path) -> None:
    hf = hf_model(tmp_path, "llama")
    ranks = shard(llama_state(load_file(hf / "model.safetensors"), "llama"), 2, 2)
    files = {}
    for rank, part in enumerate(ranks):
        late = {name for name in part if "layers.1" in name or "norm.weight" in name or "lm_head" in name}
        files[f"model_state.tp{rank:02}_pp00.pdparams"] = {n: v for n, v in part.items() if n not in late}
        files[f"model_state.tp{rank:02}_pp01.pdparams"] = {n: v for n, v in part.items() if n in late}
    theirs = paddle_dir(hf, tmp_path / "paddle", files)
    convert_directory(theirs, tmp_path / "back", "hf")
    same_weights(hf, tmp_path / "back")
    shutil.copy(theirs / "model_state.tp00_pp00.pdparams", theirs / "model_state.tp00_pp02.pdparams")
    with pytest.raises(CheckpointError, match="lies in two files"):
        oarsmith.load_model(theirs)


@pytest.mark.parametrize("stage", [False, True])
def test_missing_ranks(stage: bool, tmp_path: Path) -> None:
    hf = hf_model(tmp_path, "llama")
    ranks = shard(llama_state(load_file(hf / "model.safetensors"), "llama"), 2, 2)
    if stage:
        del ranks[1]["llama.layers.0.mlp.up_proj.weight"]
        files = {f"model_state.tp{rank:02}.pdparams": part for rank, part in enumerate(ranks)}
        message = "llama.layers.0.mlp.up_proj.weight is not in the files of all ranks"
    else:
        files, message = {"model_state.tp01.pdparams": ranks[1]}, r"files of ranks \[1\] are there"
    with pytest.raises(CheckpointError, match=message):
        oarsmith.load_model(paddle_dir(hf, tmp_path / "paddle", files))


def test_shards_that_do_not_make_up_the_shape(tmp_path: Path) -> None:
    hf = hf_model(tmp_path, "llama")
    state = llama_state(load_file(hf / "model.safetensors"), "llama")
    state["llama.layers.1.mlp.up_proj.weight"] = state["llama.layers.1.mlp.up_proj.weight"][:, :-2]
    theirs = paddle_dir(hf, tmp_path / "paddle", {"model_state.pdparams": state})
    with pytest.raises(CheckpointError, match=r"up_proj.weight: 1 ranks hold \(32, 46\) each, .* \(32, 48\)"):
        oarsmith.load_model(theirs)


@pytest.mark.parametrize("name", ["qkv_proj", "gate_up_fused_proj"])
def test_fused_tensors_of_another_size(name: str, tmp_path: Path) -> None:
    hf = hf_model(tmp_path, "llama")
    state = fuse(llama_state(load_file(hf / "model.safetensors"), "llama"), 4, 2)
    wrong = next(key for key in state if name in key)
    state[wrong] = state[wrong][:, :-8]
    with pytest.raises(CheckpointError, match=f"{name}.* the config asks for"):
        oarsmith.load_model(paddle_dir(hf, tmp_path / "paddle", {"model_state.pdparams": state}))


def test_a_config_cannot_ask_for_memory(tmp_path: Path) -> None:
    hf = hf_model(tmp_path, "llama")
    state = llama_state(load_file(hf / "model.safetensors"), "llama")
    theirs = paddle_dir(hf, tmp_path / "paddle", {"model_state.pdparams": state}, intermediate_size=10**12)
    with pytest.raises(CheckpointError, match="the config asks for"):
        oarsmith.load_model(theirs)


def test_fused_parts_of_qwen(tmp_path: Path) -> None:
    """c_attn is [q k v] on every rank; the whole has all q first."""
    hf = FIXTURES / "qwen1_ntk_logn"
    convert_directory(hf, tmp_path / "plain", "hf")
    state = {}
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        turned = tensor.t() if tensor.dim() == 2 and "wte" not in name else tensor
        state[name.replace("transformer.", "qwen.")] = array(turned)
    ranks: list[dict[str, np.ndarray]] = [{}, {}]
    for name, value in state.items():
        module = name.split(".")[-2]
        if module == "c_attn":
            thirds = [np.split(third, 2, -1) for third in np.split(value, 3, -1)]
            pieces = [np.concatenate([third[rank] for third in thirds], -1) for rank in range(2)]
        elif module in ("w1", "w2", "lm_head"):
            pieces = np.split(value, 2, -1)
        elif module == "c_proj":
            pieces = np.split(value, 2, 0)
        else:
            pieces = [value, value]
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name] = piece
    files = {f"model_state.tp{rank:02}.pdparams": part for rank, part in enumerate(ranks)}
    convert_directory(paddle_dir(hf, tmp_path / "paddle", files), tmp_path / "back", "hf")
    same_weights(tmp_path / "plain", tmp_path / "back")


def test_fused_parts_of_chatglm2(tmp_path: Path) -> None:
    hf = FIXTURES / "chatglm2_6b"
    config = read_config(hf)
    convert_directory(hf, tmp_path / "plain", "hf")
    query = config["num_attention_heads"] * config["kv_channels"]
    key = config["multi_query_group_num"] * config["kv_channels"]
    ranks: list[dict[str, np.ndarray]] = [{}, {}]
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        value = array(tensor.t() if tensor.dim() == 2 and "word_embeddings" not in name else tensor)
        module = name.split(".")[-2]
        sizes = {"query_key_value": (query, key, key), "dense_h_to_4h": (value.shape[-1] // 2,) * 2}.get(module)
        if sizes is not None:
            parts = np.split(value, np.cumsum(sizes)[:-1], -1)
            pieces = [np.concatenate([np.split(p, 2, -1)[rank] for p in parts], -1) for rank in range(2)]
        elif module == "output_layer":
            pieces = np.split(value, 2, -1)
        elif module in ("dense", "dense_4h_to_h", "word_embeddings"):
            pieces = np.split(value, 2, 0)
        else:
            pieces = [value, value]
        for rank, piece in zip(ranks, pieces, strict=True):
            rank[name.replace("transformer.", "chatglm_v2.", 1)] = piece
    ranks[0]["chatglm_v2.rotary_pos_emb.inv_freq"] = ranks[1]["chatglm_v2.rotary_pos_emb.inv_freq"] = np.ones(2, "f4")
    files = {f"model_state.tp{rank:02}.pdparams": part for rank, part in enumerate(ranks)}
    convert_directory(paddle_dir(hf, tmp_path / "paddle", files), tmp_path / "back", "hf")
    same_weights(tmp_path / "plain", tmp_path / "back")


def test_the_unified_layout(tmp_path: Path) -> None:
    """safetensors.numpy calls the bits of bfloat16 U16."""
    hf = write_tiny_model(tmp_path / "hf32", "llama")
    convert_directory(hf, tmp_path / "hf", "hf", dtype=torch.bfloat16)
    state = llama_state(load_file(tmp_path / "hf" / "model.safetensors"), "llama")
    names = sorted(state)
    folder = tmp_path / "paddle"
    folder.mkdir()
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: np.ascontiguousarray(state[name]) for name in names if files[name] == file}
        save_numpy(part, folder / file, {"format": "np"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text(json.dumps(to_paddle_config(read_config(tmp_path / "hf"), "bfloat16")))
    convert_directory(folder, tmp_path / "back", "hf")
    same_weights(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("to", ["paddle", "pdparams"])
@pytest.mark.parametrize("family", [*LLAMA_LIKE, "gpt2"])
def test_writing(family: str, to: Target, tmp_path: Path) -> None:
    """What is written is what the loops above make of the model."""
    hf = hf_model(tmp_path, family)
    convert_directory(hf, tmp_path / "paddle", to)
    weights = load_file(hf / "model.safetensors")
    expected = gpt_state(weights) if family == "gpt2" else llama_state(weights, PREFIXES.get(family, family))
    if to == "pdparams":
        with (tmp_path / "paddle" / "model_state.pdparams").open("rb") as file:
            found = pickle.load(file)
        assert set(found.pop("StructuredToParameterName@@")) == set(expected)
    else:
        found = {name: t.numpy() for name, t in load_file(tmp_path / "paddle" / "model.safetensors").items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name


def test_bfloat16_is_stored_as_uint16(tmp_path: Path) -> None:
    convert_directory(hf_model(tmp_path, "llama"), tmp_path / "paddle", "pdparams", dtype=torch.bfloat16)
    with (tmp_path / "paddle" / "model_state.pdparams").open("rb") as file:
        found = pickle.load(file)
    assert found["llama.norm.weight"].dtype == np.uint16
    assert oarsmith.load_model(tmp_path / "paddle").embedding.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "paddle" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("to", ["paddle", "pdparams"])
@pytest.mark.parametrize(
    "name", ["baichuan_13b", "chatglm2_6b", "chatglm3_6b", "deepseek_v3", "llama31_rope", "mistral_swa", "yuan2_2b"]
)
def test_round_trips_of_released_layouts(name: str, to: Target, tmp_path: Path) -> None:
    convert_directory(FIXTURES / name, tmp_path / "plain", "hf")
    convert_directory(FIXTURES / name, tmp_path / "paddle", to)
    convert_directory(tmp_path / "paddle", tmp_path / "back", "hf")
    same_weights(tmp_path / "plain", tmp_path / "back")
    before, after = read_config(tmp_path / "plain"), read_config(tmp_path / "back")
    for key in ("auto_map", "transformers_version", "use_flash_attention"):
        before.pop(key, None)
        after.pop(key, None)
    assert after == before


def test_a_head_that_is_not_the_table(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not the embedding table"):
        convert_directory(FIXTURES / "chatglm_6b", tmp_path / "paddle", "paddle")


def test_families_paddlenlp_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no models of type 'gemma2'"):
        convert_directory(FIXTURES / "gemma2", tmp_path / "paddle", "paddle")


def test_a_normalised_head_is_written_with_unit_rows(tmp_path: Path) -> None:
    """PaddleNLP's Llama multiplies with the head as it is stored."""
    source = FIXTURES / "baichuan2_13b"
    convert_directory(source, tmp_path / "paddle", "pdparams", dtype=torch.float32)
    with PdparamsSource([tmp_path / "paddle" / "model_state.pdparams"]) as source_file:
        head = source_file.read("lm_head.weight")
    torch.testing.assert_close(head.float().norm(dim=0), torch.ones(head.shape[1]))
    ids = torch.arange(5, 25)[None]
    ours, theirs = (oarsmith.load_model(path, dtype="fp32")(ids) for path in (source, tmp_path / "paddle"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"model_type": "chatglm", "num_hidden_layers": 3}, {"model_type": "chatglm", "num_layers": 3}),
        (
            {"model_type": "chatglm_v2", "num_hidden_layers": 3, "vocab_size": 9, "max_sequence_length": 7},
            {"model_type": "chatglm", "num_layers": 3, "padded_vocab_size": 9, "seq_length": 7},
        ),
        (
            {"model_type": "opt", "intermediate_size": 8, "hidden_act": "relu", "normalize_before": True},
            {"model_type": "opt", "ffn_dim": 8, "activation_function": "relu", "do_layer_norm_before": True},
        ),
        (
            {"model_type": "llama", "rope_scaling_type": "linear", "rope_scaling_factor": 2.0},
            {"model_type": "llama", "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
        ),
        ({"model_type": "llama", "rope_scaling_type": None, "rope_scaling_factor": 1.0}, {"model_type": "llama"}),
        ({"model_type": "llama", "fuse_attention_qkv": True, "paddlenlp_version": None}, {"model_type": "llama"}),
    ],
)
def test_configs(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    found = from_paddle_config({**theirs, "dtype": "bfloat16"})
    del found["architectures"]
    assert found == {**ours, "torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "ernie"}, "no PaddleNLP model of type 'ernie'"),
        ({"model_type": "llama", "rope_scaling_type": "ntk", "rope_scaling_factor": 2.0}, "rope_scaling_type 'ntk'"),
    ],
)
def test_configs_that_mean_nothing_here(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_paddle_config(config)


def pickled(path: Path, value: object, protocol: int = 4) -> Path:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [4, 5])
def test_arrays(protocol: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = {
        "plain": rng.standard_normal((3, 4)).astype("f4"),
        "columns": np.asfortranarray(rng.standard_normal((3, 4, 5))),
        "scalar": np.array(2.5, "f4"),
        "empty": np.zeros((0, 3), "f2"),
        "flags": np.array([True, False]),
        "whole": np.arange(70_000),
        "bytes": np.arange(5, dtype="u1"),
    }
    with PdparamsSource([pickled(tmp_path / "a.pdparams", values, protocol)]) as source:
        for name, value in values.items():
            assert np.array_equal(source.read(name).numpy(), value) and source.shapes[name] == value.shape


class Evil:
    def __reduce__(self) -> object:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: pickled(p, {"a": Evil()}), "posix.system, which is not part"),
        (lambda p: pickled(p, {"a": np.array([{}], dtype=object)}), "arrays of type 'O8'"),
        (lambda p: pickled(p, {"a": np.zeros(2, dtype=">f4")}), "byte order"),
        (lambda p: pickled(p, {"a": np.zeros(2, dtype=[("x", "f4")])}), "arrays of type 'V4'"),
        (lambda p: pickled(p, {"a": np.zeros(2, "c8")}), "arrays of type 'c8'"),
        (lambda p: pickled(p, {"a": np.zeros(2)}, 2), "protocol 2"),
        (lambda p: pickled(p, {"a": 3}), "is a int, not an array"),
        (lambda p: pickled(p, [np.zeros(2)]), "no dictionary of arrays"),
        (lambda p: pickled(p, {"UnpackBigParamInfor@@": {}, "a": np.zeros(1)}), "protocol 2"),
        (lambda p: p, "no such file"),
    ],
)
def test_hostile_pickles(make: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_pdparams(make(tmp_path / "a.pdparams"))


NEGATIVE = b"J\xfe\xff\xff\xffJ\xfd\xff\xff\xff\x86"
HUGE = b"K\x06\x8a\x08" + (10**18).to_bytes(8, "little") + b"\x86"


@pytest.mark.parametrize("shape", [NEGATIVE, HUGE, b"K\x07\x85", b"K\x06\x85K\x01\x86"])
def test_arrays_of_another_size(shape: bytes, tmp_path: Path) -> None:
    path = pickled(tmp_path / "a.pdparams", {"a": np.zeros((2, 3), "f4")})
    body = path.read_bytes()
    assert body.count(b"K\x02K\x03\x86") == 1
    path.write_bytes(body.replace(b"K\x02K\x03\x86", shape))
    with pytest.raises(CheckpointError, match=r"an array of shape|unknown state"):
        read_pdparams(path)
