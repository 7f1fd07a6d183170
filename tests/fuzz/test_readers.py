"""Every reader of files against damaged ones: only errors of ours come out, in bounded time and memory.

By default each reader sees a few hundred mutations, the same ones every time. ``OARSMITH_FUZZ_SECONDS=120`` spends that
long on new ones.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith.adapters.paddle_layout import paddle_from_peft, peft_from_paddle
from oarsmith.adapters.peft_layout import adapter_rewrite, load_adapter_weights, write_adapter
from oarsmith.checkpoint.convert import convert_directory
from oarsmith.checkpoint.gguf.convert import convert_gguf
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.checkpoint.paddle.pdparams import PdparamsSource
from oarsmith.checkpoint.source import open_model, open_source
from oarsmith.errors import OarsmithError
from oarsmith.models import families
from tiny import tiny_decoder, write_tiny_model

SECONDS = float(os.environ.get("OARSMITH_FUZZ_SECONDS", "0"))
EXAMPLES = 60
MAX_SECONDS = 10  # an example takes milliseconds; this is for a machine that is busy
MAX_BYTES = 1_000_000_000  # of address space beyond what the process has at the start
FIXTURES = Path(__file__).parents[1] / "fixtures"


@dataclass(frozen=True)
class Reader:
    """A directory of valid files, the one that is damaged, and reading all of it."""

    folder: Path
    file: str
    read: Callable[[Path], object]


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
    write_adapter(tiny_decoder("llama", lora_rank=2), root / "adapter", base="x", settings={"r": 2, "lora_alpha": 4})
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


# Headers are at the start, the directory of a zip file is at the end.
PLACES = st.floats(0, 1, exclude_max=True) | st.floats(0, 0.02) | st.floats(0.97, 1, exclude_max=True)
NUMBERS = st.sampled_from(
    [0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1]
)


@st.composite
def mutations(draw: st.DrawFn) -> list[tuple]:
    """A few changes: (what, where as a fraction of the file, argument)."""
    change = st.one_of(
        st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
        st.tuples(st.just("byte"), PLACES, st.integers(0, 255)),
        st.tuples(st.just("number"), PLACES, st.tuples(NUMBERS, st.sampled_from([1, 2, 4, 8]))),
        st.tuples(st.just("cut"), PLACES, st.just(None)),
        st.tuples(st.just("drop"), PLACES, st.integers(1, 64)),
        st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("splice"), PLACES, st.tuples(PLACES, st.integers(1, 128))),
        st.tuples(st.just("digit"), PLACES, st.sampled_from([b"-1", b"1e9", b"999999999999", b"null", b"[]", b'"x"'])),
    )
    return draw(st.lists(change, min_size=1, max_size=4))


def mutate(data: bytes, changes: list[tuple]) -> bytes:
    for what, place, argument in changes:
        at = int(place * len(data))
        match what:
            case "flip" if data:
                data = data[:at] + bytes([data[at] ^ (1 << argument)]) + data[at + 1 :]
            case "byte":
                data = data[:at] + bytes([argument]) + data[at + 1 :]
            case "number":
                number, size = argument
                data = data[:at] + (number % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]
            case "cut":
                data = data[:at]
            case "drop":
                data = data[:at] + data[at + argument :]
            case "insert":
                data = data[:at] + argument + data[at:]
            case "splice":
                start = int(argument[0] * len(data))
                data = data[:at] + data[start : start + argument[1]] + data[at:]
            case "digit":
                found = next((i for i in range(at, len(data)) if data[i : i + 1].isdigit()), None)
                if found is not None:
                    end = next((i for i in range(found, len(data)) if not data[i : i + 1].isdigit()), len(data))
                    data = data[:found] + argument + data[end:]
    return data


class TooSlow(BaseException):
    """Not an Exception: nothing in between may swallow it."""


@pytest.fixture(scope="module", autouse=True)
def _limits() -> Iterator[None]:
    """Address space bounds memory; an alarm bounds time."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {MAX_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    signal.signal(signal.SIGALRM, before)


def check(reader: Reader, changes: list[tuple], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(reader.folder, folder)
    (folder / reader.file).write_bytes(mutate((reader.folder / reader.file).read_bytes(), changes))
    signal.alarm(MAX_SECONDS)
    try:
        reader.read(folder)
    except OarsmithError:
        pass
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(kind: str, readers: dict[str, Reader], tmp_path: Path, few_threads: None) -> None:
    if kind not in readers:
        pytest.skip("this tokenizer has no fixture")
    reader = readers[kind]
    reader.read(shutil.copytree(reader.folder, tmp_path / "valid"))
    deadline = time.monotonic() + SECONDS / len(KINDS)
    rounds = 0
    while rounds == 0 or time.monotonic() < deadline:

        @seed(rounds)
        @settings(
            max_examples=EXAMPLES if SECONDS == 0 else 200,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutations())
        def run(changes: list[tuple]) -> None:
            check(reader, changes, tmp_path / "damaged")

        run()
        rounds += 1


def test_the_mutations_mutate() -> None:
    data = bytes(range(48, 58)) * 20
    changes: list[tuple] = [("flip", 0.5, 3)], [("cut", 0.5, None)], [("insert", 0.0, b"ab")], [("digit", 0.1, b"-1")]
    assert all(mutate(data, change) != data for change in changes)
    assert mutate(b"", [("flip", 0.5, 3), ("number", 0.1, (2**64 - 1, 8)), ("cut", 0.0, None)]) == b""
