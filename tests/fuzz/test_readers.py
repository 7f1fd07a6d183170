"""Every reader of files against damaged ones: only errors of ours come out, in bounded time and memory.

By default each reader sees a few hundred mutations, the same ones every time. ``OARSMITH_FUZZ_SECONDS=120`` spends that
long on new ones.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import oarsmith
from fuzz.damage import Reader, fuzz, mutate
from oarsmith.adapters.paddle_layout import paddle_from_peft, peft_from_paddle
from oarsmith.adapters.peft_layout import adapter_rewrite, load_adapter_weights, write_adapter
from oarsmith.checkpoint.convert import convert_directory
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.checkpoint.paddle.pdparams import PdparamsSource
from oarsmith.checkpoint.source import open_model, open_source
from oarsmith.models import families
from tiny import tiny_decoder, write_tiny_model

FIXTURES = Path(__file__).parents[1] / "fixtures"


def read_all(folder: Path) -> None:
    with open_source(folder) as source:
        for name in source.shapes:
            source.read(name)


def read_model(folder: Path) -> None:
    load_decoder(folder)


def read_packed(folder: Path) -> None:
    with open_model(folder)[1] as source:
        for name in source.shapes:
            source.read(name)


def read_paddle_adapter(folder: Path) -> None:
    config = tiny_decoder("llama").config
    shutil.rmtree(folder.with_name("peft"), ignore_errors=True)
    peft_from_paddle(folder, folder.with_name("peft"), config, base=None)


def read_gguf(folder: Path) -> None:
    convert_gguf(folder / "model.gguf", folder / "out")


def read_pdparams(folder: Path) -> None:
    with PdparamsSource([folder / "model_state.pdparams"]) as source:
        for name in source.shapes:
            source.read(name)


def read_tokenizer(folder: Path) -> None:
    tokenizer = oarsmith.load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("Hello, wörld <|im_end|>"))


def read_adapter(folder: Path) -> None:
    model = tiny_decoder("llama")
    adapter_rewrite(folder)(families.find(model.config), model.spec)
    load_adapter_weights(tiny_decoder("llama", lora_rank=2), folder)


SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "rms_norm_eps": 1e-6}


def make_files(root: Path) -> dict[str, Reader]:
    """Small valid files of every kind."""
    model = write_tiny_model(root / "model", "llama", **SIZES)
    weights = load_file(model / "model.safetensors")
    for name, zipped in (("zip", True), ("older", False)):
        (root / name).mkdir()
        torch.save(weights, root / name / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    (root / "shards").mkdir()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({n: weights[n] for n, home in files.items() if home == file}, root / "shards" / file)
    (root / "shards" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (root / "paddle").mkdir()
    with (root / "paddle" / "model_state.pdparams").open("wb") as file:
        pickle.dump({name: tensor.numpy() for name, tensor in weights.items()}, file, protocol=4)
    convert_directory(model, root / "unified", "pdparams")
    (root / "packed").mkdir()
    packed = {"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(1, 1)}
    save_file(packed, root / "packed" / "model.safetensors")
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (root / "packed" / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    (root / "gguf").mkdir()
    spoken = write_tiny_model(root / "spoken", "llama", num_hidden_layers=1, rms_norm_eps=1e-6)
    write_gguf(spoken, root / "gguf" / "model.gguf", type="q8_0")
    (root / "adapter").mkdir()
    write_adapter(tiny_decoder("llama", lora_rank=2), root / "adapter", base="x")
    config = tiny_decoder("llama").config
    paddle_from_peft(root / "adapter", root / "paddle_adapter", config, base=None, pickled=True)
    readers = {
        "paddle": Reader(root / "unified", "model_state.pdparams", read_model),
        "paddle_config": Reader(root / "unified", "config.json", read_model),
        "paddle_adapter": Reader(root / "paddle_adapter", "lora_model_state.pdparams", read_paddle_adapter),
        "paddle_adapter_config": Reader(root / "paddle_adapter", "lora_config.json", read_paddle_adapter),
        "packed": Reader(root / "packed", "model.safetensors", read_packed),
        "packed_config": Reader(root / "packed", "config.json", read_packed),
        "safetensors": Reader(model, "model.safetensors", read_all),
        "config": Reader(model, "config.json", read_model),
        "zip": Reader(root / "zip", "pytorch_model.bin", read_all),
        "older": Reader(root / "older", "pytorch_model.bin", read_all),
        "index": Reader(root / "shards", "model.safetensors.index.json", read_all),
        "pdparams": Reader(root / "paddle", "model_state.pdparams", read_pdparams),
        "gguf": Reader(root / "gguf", "model.gguf", read_gguf),
        "adapter": Reader(root / "adapter", "adapter_model.safetensors", read_adapter),
        "adapter_config": Reader(root / "adapter", "adapter_config.json", read_adapter),
    }
    for kind, file in (
        ("qwen25_bpe_json", "tokenizer.json"),
        ("qwen25_bpe_json", "tokenizer_config.json"),
        ("llama2_spm_legacy", "tokenizer.model"),
        ("gpt2_vocab_merges", "vocab.json"),
        ("gpt2_vocab_merges", "merges.txt"),
        ("qwen1_tiktoken", "qwen.tiktoken"),
    ):
        folder = FIXTURES / "tokenizers" / kind
        if (folder / file).is_file():
            readers[f"{kind}-{file}"] = Reader(folder, file, read_tokenizer)
    return readers


KINDS = (
    *("paddle", "paddle_config", "paddle_adapter", "paddle_adapter_config", "packed", "packed_config"),
    *("safetensors", "config", "zip", "older", "index", "pdparams", "gguf", "adapter", "adapter_config"),
    *("qwen25_bpe_json-tokenizer.json", "qwen25_bpe_json-tokenizer_config.json", "llama2_spm_legacy-tokenizer.model"),
    *("gpt2_vocab_merges-vocab.json", "gpt2_vocab_merges-merges.txt", "qwen1_tiktoken-qwen.tiktoken"),
)


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    return make_files(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, readers: dict[str, Reader], tmp_path: Path, few_threads: None) -> None:
    if kind not in readers:
        pytest.skip("this tokenizer has no fixture")
    fuzz(readers[kind], tmp_path, 1 / len(KINDS))


def test_the_mutations_mutate() -> None:
    data = bytes(range(48, 58)) * 20
    changes: list[tuple] = [("flip", 0.5, 3)], [("cut", 0.5, None)], [("insert", 0.0, b"ab")], [("digit", 0.1, b"-1")]
    assert all(mutate(data, change) != data for change in changes)
    assert mutate(b"", [("flip", 0.5, 3), ("number", 0.1, (2**64 - 1, 8)), ("cut", 0.0, None)]) == b""
