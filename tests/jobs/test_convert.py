"""``oarsmith convert``: what is written, and what is left alone when it fails."""

import pytest
import torch
from gguf_files import tiny_model, write_gguf

import oarsmith
from oarsmith import cli
from tiny import write_tiny_model

IDS = torch.arange(40)[None]


def weights(folder):
    return {name: p.detach() for name, p in oarsmith.load_model(folder).named_parameters()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("convert") / "model", "qwen2")


def convert(*words, **keys):
    return cli.main(["convert", *map(str, words), *(f"--{key}={value}" for key, value in keys.items())])


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_cast(model_dir, tmp_path, capsys, name, dtype):
    assert convert(model_dir, tmp_path / "out", dtype=name) == 0
    assert "read back and complete" in capsys.readouterr().out
    for key, tensor in weights(model_dir).items():
        assert torch.equal(weights(tmp_path / "out")[key], tensor.to(dtype))
    assert oarsmith.load_tokenizer(tmp_path / "out").encode("hello") == oarsmith.load_tokenizer(model_dir).encode(
        "hello"
    )


def test_same_dtype_is_bit_for_bit(model_dir, tmp_path):
    assert convert(model_dir, tmp_path / "out") == 0
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (model_dir / name).read_bytes()


def test_gguf(tmp_path, capsys):
    theirs = tiny_model("llama")
    write_gguf(theirs, tmp_path / "model.gguf")
    assert convert(tmp_path / "model.gguf", tmp_path / "out", dtype="fp32") == 0
    with torch.no_grad():
        difference = (oarsmith.load_model(tmp_path / "out")(IDS) - theirs(IDS).logits).abs().max()
    assert difference < 1e-4
    assert "oarsmith chat" in capsys.readouterr().out


def test_a_full_destination_is_kept(model_dir, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("precious")
    assert convert(model_dir, tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err
    assert convert(model_dir, tmp_path / "out", overwrite=True) == 2
    assert "something else than a model" in capsys.readouterr().err
    assert (tmp_path / "out" / "letter.txt").read_text() == "precious"


def test_overwriting_a_model(model_dir, tmp_path):
    assert convert(model_dir, tmp_path / "out", dtype="fp16") == 0
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"")
    assert convert(model_dir, tmp_path / "out", dtype="bf16", overwrite=True) == 0
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert next(iter(weights(tmp_path / "out").values())).dtype == torch.bfloat16


def test_overwriting_with_a_gguf(model_dir, tmp_path):
    write_gguf(tiny_model("llama"), tmp_path / "model.gguf")
    assert convert(model_dir, tmp_path / "out") == 0
    assert convert(tmp_path / "model.gguf", tmp_path / "out", overwrite=True) == 0
    assert oarsmith.load_model(tmp_path / "out").config["model_type"] == "llama"


@pytest.mark.parametrize("source", ["nowhere", "broken.gguf"])
def test_a_failed_conversion_costs_nothing(model_dir, tmp_path, source):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and then nothing")
    assert convert(model_dir, tmp_path / "out") == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert convert(tmp_path / source, tmp_path / "out", overwrite=True) == 2
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_the_source_is_never_replaced(tmp_path, capsys):
    outer = write_tiny_model(tmp_path / "outer")
    write_tiny_model(outer / "inner")
    assert convert(outer / "inner", outer, overwrite=True) == 2
    assert "would delete" in capsys.readouterr().err
    assert (outer / "inner" / "model.safetensors").exists()
