"""GGUF files made to do harm, or damaged: a clear error each, and nothing is left behind."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from oarsmith.checkpoint.gguf.container import GgufInfo, GgufWriter, encode_value
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.errors import CheckpointError, OarsmithError

from .files import random_model, save_directory
from .test_families import COMMON, CONFIGS

Q = gguf.GGMLQuantizationType


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(name: str, dims: list[int], start: int, kind: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, start)


def gguf_bytes(*tensors: bytes, metadata: dict[str, Any] | None = None, num_data: int = 256, raw: bytes = b"") -> bytes:
    """A file by hand. ``raw``: metadata entries as bytes."""
    values = {"general.architecture": "llama"} | (metadata or {})
    keys = b"".join(string(key) + encode_value(value) for key, value in values.items()) + raw
    count = len(values) + bool(raw)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + keys + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32 + num_data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gguf_bytes(tensor("a", [8, 4], 0), tensor("b", [8], 96)), "b: .*overlaps another's or is not aligned"),
        (gguf_bytes(tensor("a", [8], 0), tensor("b", [8], 0)), "b: .*overlaps"),
        (gguf_bytes(tensor("a", [8], 8)), "a: .*not aligned"),
        (gguf_bytes(tensor("a", [8], 0), tensor("a", [8], 32)), "a: the tensor occurs twice"),
        (gguf_bytes(tensor("a", [0], 0)), r"a: shape \(0,\) does not fill"),
        (gguf_bytes(tensor("a", [1 << 63, 1 << 62], 0)), "the file is truncated: 1 tensors need"),
        (gguf_bytes(tensor("a", [8], 1 << 62)), "the file is truncated"),
        (gguf_bytes(tensor("a", [7], 0, kind=8)), "does not fill Q8_0 blocks of 32"),
        (gguf_bytes(tensor("a", [8], 0, kind=99)), "tensor type 99 is not known"),
        (gguf_bytes(string("a") + struct.pack("<I", 1 << 30)), "1073741824 dimensions, 1 to 4 are possible"),
        (gguf_bytes(tensor("a", [], 0)), "0 dimensions"),
        (gguf_bytes(metadata={"general.alignment": 24}), "general.alignment 24 is not a power of two"),
        (gguf_bytes(tensor("a", [8], 0), metadata={"general.alignment": 1 << 31}), "truncated"),
        (gguf_bytes(metadata={"general.alignment": "32"}), "general.alignment '32'"),
        (gguf_bytes(raw=string("general.architecture") + encode_value("x")), "'general.architecture' occurs twice"),
        (gguf_bytes(raw=string("x") + struct.pack("<I", 77)), "x has the unknown value type 77"),
        (gguf_bytes(raw=string("x") + struct.pack("<IIQ", 9, 4, 1 << 60)), "truncated or damaged: x needs"),
        (gguf_bytes(raw=string("x") + struct.pack("<IIQ", 9, 8, 1 << 60)), "truncated or damaged: x needs"),
        (gguf_bytes(raw=string("x") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40), "nests arrays deeper"),
        (gguf_bytes(raw=string("x") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"), "x is not UTF-8"),
    ],
)
def test_headers(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_K, Q.IQ2_XS, Q.MXFP4], ids=lambda kind: kind.name)
def test_scales_that_are_not_numbers(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    num_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.full((2, num_bytes * 2), 0xFF, dtype=np.uint8)  # NaN in every float format
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="x: the tensor holds NaN or infinite values"):
        file.read(file.tensors["x"], torch.bfloat16)


def _rewritten(source: Path, target: Path, **changes: Any) -> None:
    """The file again with other metadata (dots as double underscores; None takes a key out)."""
    file = GgufFile(source)
    values = file.metadata | {key.replace("__", "."): value for key, value in changes.items()}
    tensors = {name: GgufInfo(item.shape, item.type) for name, item in file.tensors.items()}
    with GgufWriter(target, {key: value for key, value in values.items() if value is not None}, tensors) as writer:
        for name, item in file.tensors.items():
            writer.write(name, file.read(item, torch.float32))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    directory = save_directory(random_model(transformers.LlamaConfig(**COMMON)), folder / "hf")
    write_gguf(directory, folder / "m.gguf", type="f32")
    return folder / "m.gguf"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama__block_count": 1 << 31}, "2,147,483,648 layers, but the file has 21 tensors"),
        ({"llama__block_count": 1}, "no place for the tensor .model of 1 layers"),
        ({"llama__block_count": [2, 3]}, r"layers of different sizes \(\[2, 3\]\)"),
        ({"llama__attention__head_count": 0}, "0 is not a positive whole number"),
        ({"llama__attention__head_count": 3}, "3 heads do not divide among 2"),
        ({"llama__attention__head_count": -4}, "-4 is not a positive whole number"),
        ({"llama__attention__key_length": 1 << 40}, "1099511627776"),
        ({"llama__attention__key_length": 15, "llama__attention__value_length": 15}, "differs from the head size 15"),
        ({"llama__embedding_length": "64"}, "'64' is not a positive whole number"),
        ({"llama__embedding_length": None}, "'llama.embedding_length' is missing"),
        ({"llama__attention__layer_norm_rms_epsilon": float("nan")}, "nan is not a positive number"),
        ({"llama__rope__freq_base": float("inf")}, "inf is not a positive number"),
        ({"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": -1.0}, "-1.0 is not a positive number"),
        ({"general__architecture": 7}, "unknown GGUF architecture '7'"),
        ({"tokenizer__ggml__token_type": [1]}, "1 types for 320 tokens"),
        (
            {"tokenizer__ggml__tokens": ["a", "b"], "tokenizer__ggml__token_type": [1, 1]},
            "merge 0 .* is not two tokens",
        ),
        ({"tokenizer__ggml__tokens": [1, 2]}, "the list is missing, empty or of the wrong type"),
        ({"tokenizer__ggml__model": None}, "unknown tokenizer model ''"),
    ],
)
def test_metadata(changes: dict[str, Any], message: str, llama: Path, tmp_path: Path) -> None:
    _rewritten(llama, tmp_path / "m.gguf", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_becomes_shorter(llama: Path, tmp_path: Path) -> None:
    shutil.copy(llama, tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(llama.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="become shorter"):
        file.read(list(file.tensors.values())[-1], torch.float32)


@pytest.mark.usefixtures("few_threads")
@pytest.mark.parametrize("name", ["llama-yarn", "mixtral", "deepseek_v3-yarn", "falcon-40b"])
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """Random bytes anywhere: a conversion or an error of ours, and never half a directory."""
    directory = save_directory(random_model(CONFIGS[name]), tmp_path / "hf")
    path = tmp_path / "m.gguf"
    write_gguf(directory, path, type="q8_0")
    good = path.read_bytes()
    own_keys, header = good.index(b"tokenizer.ggml.tokens"), good.index(b"token_embd.weight") + 4000
    rng = random.Random(name)
    refused = 0
    for _ in range(60):
        data = bytearray(good)
        end = rng.choice([own_keys, own_keys, header, len(data)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(end)] = rng.choice([0, 1, 2, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(data)
        try:
            convert_gguf(path, tmp_path / "out")
        except OarsmithError:
            refused += 1
            assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert refused > 20
