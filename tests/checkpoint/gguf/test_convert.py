"""GGUF conversion against transformers (the original model) and llama.cpp (the format's own reader)."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from oarsmith.checkpoint.gguf.container import GgufInfo, GgufWriter
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.safetensors_stream import check_safetensors
from oarsmith.errors import CheckpointError, OarsmithError

from .files import CONFIGS, F32, tiny_model, write_gguf

Q = gguf.GGMLQuantizationType
INPUT_IDS = torch.tensor([[5, 17, 250, 3, 99, 120, 7, 64, 31, 200, 11, 12, 13, 290, 45, 46, 47, 48]])


def logits_of(directory: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(INPUT_IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_converted_model_computes_what_the_original_does(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    write_gguf(model, tmp_path / "m.gguf")
    report = convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with torch.no_grad():
        expected = model(INPUT_IDS).logits
    # float32 all the way; gemma's norms go through w + 1 - 1, llama3's and yarn's tables through rounded numbers.
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=2e-5)
    assert report.dtype == "float32"
    assert report.model_type == model.config.model_type
    assert report.tied_head == model.config.tie_word_embeddings
    assert report.num_parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_agrees(name: str, tmp_path: Path) -> None:
    """The test files are what llama.cpp takes them for: it computes the same from them."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = tmp_path / "m.gguf"
    write_gguf(tiny_model(name), path)
    convert_gguf(path, tmp_path / "out")
    llama = llama_cpp.Llama(
        model_path=str(path), verbose=False, logits_all=True, n_ctx=64, n_threads=1, flash_attn=False
    )
    llama.eval(INPUT_IDS[0].tolist())
    expected = torch.from_numpy(np.array(llama.scores[: INPUT_IDS.shape[1]]))
    llama.close()
    # llama.cpp ignores the sliding window of mistral files: only what the window cannot change is comparable.
    compared = 8 if name == "mistral" else INPUT_IDS.shape[1]
    # llama.cpp keeps its cache in float16: 3 decimal digits.
    torch.testing.assert_close(logits_of(tmp_path / "out")[0, :compared], expected[:compared], rtol=0, atol=2e-2)


def test_config_is_recovered_from_metadata(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        write_gguf(tiny_model(name), tmp_path / f"{name}.gguf")
        convert_gguf(tmp_path / f"{name}.gguf", tmp_path / name)
        loaded = transformers.AutoConfig.from_pretrained(tmp_path / name)
        assert loaded.architectures == [transformers.AutoModelForCausalLM._model_mapping[type(config)].__name__]
        keys = ["vocab_size", "max_position_embeddings", "tie_word_embeddings", "num_attention_heads", "hidden_size"]
        if name != "gpt2":
            keys += ["rms_norm_eps", "rope_parameters", "num_key_value_heads", "head_dim", "intermediate_size"]
        for key in keys:
            expected = getattr(config, key, 16)  # qwen2 has no head_dim: hidden / heads
            assert getattr(loaded, key) == expected, (name, key)


def test_tied_head_stored_as_a_copy_is_recognised(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    write_gguf(model, tmp_path / "m.gguf", store_tied_head=True)
    assert convert_gguf(tmp_path / "m.gguf", tmp_path / "out").tied_head
    assert "lm_head.weight" not in check_safetensors(tmp_path / "out" / "model.safetensors")


STORED = [Q.F16, Q.BF16, Q.Q8_0, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1]


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in STORED), ("gpt2", Q.F16), ("gpt2", Q.Q4_0)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_stored_types(name: str, kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """The result is the original with its matrices rounded to the type: permuting blocks loses nothing."""
    model = tiny_model(name)
    write_gguf(model, tmp_path / "m.gguf", quantization=kind)
    report = convert_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype="float32")
    assert report.tensor_types[kind.name] > 8
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 and "wpe" not in key:
                transposed = key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
                stored = (parameter.T if transposed else parameter).contiguous().numpy()
                rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind).copy())
                parameter.copy_(rounded.T if transposed else rounded)
        expected = model(INPUT_IDS).logits
    torch.testing.assert_close(logits_of(tmp_path / "out"), expected, rtol=0, atol=2e-5)  # float32 summation order


@pytest.mark.parametrize(
    ("kind", "dtype"), [(F32, "float32"), (Q.F16, "float16"), (Q.BF16, "bfloat16"), (Q.Q8_0, "bfloat16")]
)
def test_dtype_auto(kind: gguf.GGMLQuantizationType, dtype: str, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", quantization=kind)
    assert convert_gguf(tmp_path / "m.gguf", tmp_path / "out").dtype == dtype
    stored = check_safetensors(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


BLOCK_TYPES = [kind for kind in Q if kind in gguf.quants._type_traits]  # all that the package dequantizes


@pytest.mark.parametrize("kind", BLOCK_TYPES, ids=lambda kind: kind.name)
def test_block_types_the_package_only_reads(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    """Random blocks: the chunked reader gives what the package gives for the whole tensor at once."""
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (5, 3, 2 * block)
    raw = np.random.default_rng(0).integers(0, 60, size=(5, 3, 2 * num_bytes), dtype=np.uint8)  # < 60: finite scales
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert file.tensors["x"].shape == shape
    actual = file.read(file.tensors["x"], torch.float32)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, kind).reshape(shape).copy())
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    one = file.read(file.tensors["x"], torch.float32, index=3)
    torch.testing.assert_close(one, expected[3], rtol=0, atol=0)


@pytest.mark.parametrize("kind", [Q.Q8_1, Q.Q8_K, Q.I32], ids=lambda kind: kind.name)
def test_types_without_weights_are_refused(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", np.zeros((2, num_bytes), dtype=np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=f"cannot dequantize {kind.name}"):
        file.read(file.tensors["x"], torch.float32)


def test_reading_in_chunks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", quantization=Q.Q4_1)
    file = GgufFile(tmp_path / "m.gguf")
    whole = {name: file.read(tensor, torch.float32) for name, tensor in file.tensors.items()}
    monkeypatch.setattr("oarsmith.checkpoint.gguf.reader._CHUNK_ELEMENTS", 200)  # 3 rows of 64: leaves a rest
    for name, tensor in file.tensors.items():
        assert torch.equal(file.read(tensor, torch.float32), whole[name]), name


def test_progress_and_existing_destination(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    seen: list[tuple[int, int]] = []
    convert_gguf(tmp_path / "m.gguf", tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(CheckpointError, match="not empty"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="auto or one of bfloat16"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "other", dtype="int3")
    assert not (tmp_path / "other").exists()


# Files that are broken or not understood.


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_gguf(tiny_model("llama"), path)
    return path.read_bytes()


def test_any_truncation_is_reported(good_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 10, 23, 24, 30, *range(40, len(good_bytes), len(good_bytes) // 150), len(good_bytes) - 1]:
        path.write_bytes(good_bytes[:length])
        with pytest.raises(CheckpointError, match="bytes") as caught:
            GgufFile(path)
        assert str(path) in str(caught.value)
        assert caught.value.fix


def test_damaged_headers_never_hang_or_crash(good_bytes: bytes, tmp_path: Path) -> None:
    rng = random.Random(0)
    header = good_bytes.index(b"token_embd.weight") + 3000  # metadata and the tensor list
    path = tmp_path / "bad.gguf"
    refused = 0
    for _ in range(300):
        data = bytearray(good_bytes)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(header)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            GgufFile(path)
        except OarsmithError:
            refused += 1
    assert refused > 50  # most of the header is token text, where a changed byte is still a legal file


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"PK\x03\x04", "not a GGUF file"),
        (4, (9).to_bytes(4, "little"), "version 9 is newer than 3"),
        (4, (1).to_bytes(4, "little"), "version 1 is too old"),
        (4, (3).to_bytes(4, "big"), "big-endian"),
        (8, (2**60).to_bytes(8, "little"), "truncated or damaged"),
        (16, (2**60).to_bytes(8, "little"), "truncated or damaged"),
    ],
)
def test_wrong_header_fields(offset: int, value: bytes, message: str, good_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(good_bytes[:offset] + value + good_bytes[offset + len(value) :])
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def test_unknown_architecture_names_the_known_ones(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba'; known are llama, .*gpt2, bloom, falcon.*deepseek2"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such file"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "out")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_shared_count": 8}, "llama.expert_shared_count.*8 is not supported"),
        ({"llama.expert_count": 8}, "expert_used_count' is missing"),
        ({"llama.block_count": 1 << 31}, "2,147,483,648 layers, but the file has 21 tensors"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count.*differs from the head size 16"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported; known are none, linear, yarn"),
        ({"split.count": 3}, "one of 3 parts, but it is not named NAME-00001-of-00003.gguf"),
        ({"split.count": "3"}, "one of 3 parts"),
        ({"llama.vocab_size": 320, "llama.attention.clamp_kqv": 8.0}, "clamp_kqv"),
    ],
)
def test_what_cannot_be_honoured_stops(extra: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _split(source: Path, folder: Path, count: int) -> list[Path]:
    """As llama-gguf-split does: the first part has the metadata, each some tensors."""
    file = GgufFile(source)
    names = list(file.tensors)
    paths = [folder / f"m-{index + 1:05}-of-{count:05}.gguf" for index in range(count)]
    for index, path in enumerate(paths):
        metadata = {"split.no": index, "split.count": count, "split.tensors.count": len(names)}
        own = {name: file.tensors[name] for name in names[index::count]}
        infos = {name: GgufInfo(tensor.shape, tensor.type) for name, tensor in own.items()}
        with GgufWriter(path, metadata | (file.metadata if index == 0 else {}), infos) as writer:
            for name, tensor in own.items():
                writer.write(name, file.read(tensor, torch.float32))
    return paths


def test_split_models(tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_gguf(model, tmp_path / "m.gguf")
    parts = _split(tmp_path / "m.gguf", tmp_path, 3)
    convert_gguf(parts[0], tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(tmp_path / "out"), model(INPUT_IDS).logits, rtol=0, atol=2e-5)
    with pytest.raises(CheckpointError, match="not the first of 3 parts") as caught:
        GgufFile(parts[1])
    assert str(parts[0]) in str(caught.value)
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match="this is not part 2 of 3"):
        GgufFile(parts[0])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"m-00002-of-00003\.gguf: no such file"):
        GgufFile(parts[0])


def test_unexpected_missing_and_misshapen_tensors(tmp_path: Path, good_bytes: bytes) -> None:
    path = tmp_path / "m.gguf"
    for old, new, message in [
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_ub.weight", "blk.1.ffn_ub.weight: this architecture has no place"),
        (b"blk.1.ffn_up.weight", b"blk.7.ffn_up.weight", "blk.7.ffn_up.weight: this architecture has no place"),
        (b"output_norm.weight", b"rope_freqs.weight\0"[:17] + b"x", "no place"),
    ]:
        assert good_bytes.count(old) == 1
        path.write_bytes(good_bytes.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            convert_gguf(path, tmp_path / "out")
    model = tiny_model("llama")
    write_gguf(model, path)
    data = path.read_bytes()
    key = b"llama.feed_forward_length"
    at = data.index(key) + len(key) + 4
    path.write_bytes(data[:at] + (100).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(
        CheckpointError, match=r"ffn_gate.weight: shape \(96, 64\), but the metadata says .* \(100, 64\)"
    ):
        convert_gguf(path, tmp_path / "out")


def test_missing_layer_is_named(tmp_path: Path) -> None:
    write_gguf(tiny_model("llama"), tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    at = data.index(b"llama.block_count") + len(b"llama.block_count") + 4
    (tmp_path / "m.gguf").write_bytes(data[:at] + (3).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"9 tensors are missing, first blk\.2\."):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
