"""Streaming conversions: what arrives is what left, nothing appears that was not verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import oarsmith
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.convert import Target, convert_directory
from oarsmith.checkpoint.safetensors_stream import check_safetensors
from oarsmith.checkpoint.streamed import difference, probe_tokens, streamed_logits
from oarsmith.checkpoint.verify import Digests, check_written, compare
from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.models import families
from tiny import write_tiny_model

FIXTURES = sorted((Path(__file__).parents[1] / "fixtures" / "families").iterdir())


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny models."""


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_round_trip_through_bin(folder: Path, tmp_path: Path) -> None:
    """Every released layout: the decoder sees the same model in each, and the tensors come back bit for bit."""
    convert_directory(folder, tmp_path / "hf", "hf")
    convert_directory(tmp_path / "hf", tmp_path / "bin", "bin")
    convert_directory(tmp_path / "bin", tmp_path / "back", "hf")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) and first[name].dtype == last[name].dtype for name in first)
    assert read_config(tmp_path / "back") == read_config(tmp_path / "hf")
    ids = probe_tokens(families.build_spec(read_config(folder))[1])
    assert difference(streamed_logits(folder, ids), streamed_logits(tmp_path / "bin", ids)).none


@pytest.mark.parametrize("folder", FIXTURES, ids=lambda path: path.name)
def test_the_streamed_forward_is_the_decoder(folder: Path) -> None:
    ids = probe_tokens(families.build_spec(read_config(folder))[1])
    with torch.no_grad():
        whole = oarsmith.load_model(folder, dtype="fp32")(ids[None])[0]
    assert difference(whole, streamed_logits(folder, ids)).none


def test_difference() -> None:
    a = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[2, 3] += 50
    found = difference(a, b)
    assert abs(found.max_logit - 50) < 1e-4 and found.kl > 1 and found.top1 == 0.75
    expected = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean()
    assert abs(found.kl - float(expected)) < 1e-5
    b[0, 0] = float("nan")
    assert difference(a, b).max_logit == float("inf") and difference(b, b).none


def test_side_files_and_shards(tmp_path: Path) -> None:
    src = write_tiny_model(tmp_path / "src", "llama")
    for name in ("generation_config.json", "merges.txt", "LICENSE", "modeling_x.py", "training_args.bin", "notes.txt"):
        (src / name).write_text("{}")
    seen: list[tuple[str, int, int]] = []
    report = convert_directory(
        src, tmp_path / "dst", "hf", max_shard_bytes=100_000, progress=lambda *what: seen.append(what)
    )
    names = {path.name for path in (tmp_path / "dst").iterdir()}
    assert {"generation_config.json", "merges.txt", "LICENSE", "tokenizer.json", "config.json"} <= names
    assert not names & {"modeling_x.py", "training_args.bin", "notes.txt"}
    assert "model.safetensors.index.json" in names and report.num_tensors == 21
    assert {what for what, _, _ in seen} == {"writing", "verifying"}
    assert all(done <= total == report.num_bytes for _, done, total in seen) and seen[-1][1] == report.num_bytes


def test_casting_keeps_what_must_stay_float32(tmp_path: Path) -> None:
    """DeepSeek-V3's router bias."""
    source = next(path for path in FIXTURES if path.name == "deepseek_v3")
    convert_directory(source, tmp_path / "dst", "hf", dtype=torch.bfloat16)
    kinds = {name: info.dtype for name, info in check_safetensors(tmp_path / "dst" / "model.safetensors").items()}
    biases = {name for name in kinds if name.endswith("e_score_correction_bias")}
    assert biases and all(kinds[name] == ("F32" if name in biases else "BF16") for name in kinds)
    model = oarsmith.load_model(tmp_path / "dst")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    wide = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert len(wide) == len(biases) and model.embedding.weight.dtype == torch.bfloat16


def test_float64_stays(tmp_path: Path) -> None:
    src = write_tiny_model(tmp_path / "src", "llama")
    weights = load_file(src / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].double()
    save_file(weights, src / "model.safetensors")
    convert_directory(src, tmp_path / "dst", "bin")
    convert_directory(tmp_path / "dst", tmp_path / "back", "hf")
    assert load_file(tmp_path / "back" / "model.safetensors")["model.norm.weight"].dtype == torch.float64


@pytest.mark.parametrize("to", ["hf", "bin", "paddle", "pdparams"])
def test_a_wrong_source_leaves_nothing(to: Target, tmp_path: Path) -> None:
    src = write_tiny_model(tmp_path / "src", "llama")
    weights = load_file(src / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, src / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors are missing, first model\.norm\.weight"):
        convert_directory(src, tmp_path / "dst", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_a_check_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    def refuse(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise CheckpointError("no")

    with pytest.raises(CheckpointError, match="no"):
        convert_directory(write_tiny_model(tmp_path / "src"), tmp_path / "dst", "hf", check=refuse)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def test_damage_between_writing_and_reading_back(tmp_path: Path) -> None:
    src = write_tiny_model(tmp_path / "src", "llama")
    weights = load_file(src / "model.safetensors")
    digests = Digests()
    for name, tensor in weights.items():
        digests.add(name, tensor)
    check_written(src, digests, 1)
    path = src / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="has other values than were written"):
        check_written(src, digests, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.ones(3)}, "a is F32"),
        ({"a": torch.ones(2).half()}, "a is F16"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "b was not meant to be there"),
        ({"b": torch.ones(1)}, "a is missing"),
    ],
)
def test_what_comparing_sees(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    from oarsmith.checkpoint.safetensors_source import SafetensorsSource

    digests = Digests()
    digests.add("a", torch.ones(2))
    save_file(change, tmp_path / "x.safetensors")
    with SafetensorsSource(tmp_path / "x.safetensors") as source, pytest.raises(CheckpointError, match=message):
        compare(source, digests, 1)


def test_a_linked_tokenizer(tmp_path: Path) -> None:
    """A link out of the directory is refused, also for a file that holds no weights."""
    src = write_tiny_model(tmp_path / "src", "llama")
    (tmp_path / "secret").write_text("secret")
    (src / "tokenizer_extra.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        convert_directory(src, tmp_path / "dst", "hf")


def test_an_unknown_family(tmp_path: Path) -> None:
    src = write_tiny_model(tmp_path / "src", "llama")
    (src / "config.json").write_text(json.dumps({"model_type": "no_such_thing"}))
    with pytest.raises(OarsmithError, match="no_such_thing"):
        convert_directory(src, tmp_path / "dst", "bin")
