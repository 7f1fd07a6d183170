"""``oarsmith convert``: what is written, what is said of it, and what is left alone when it fails."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import oarsmith
from checkpoint.gguf.files import tiny_model, write_gguf
from oarsmith import cli
from oarsmith.adapters.peft_layout import write_adapter
from tiny import tiny_decoder, write_tiny_model

FAMILIES = Path(__file__).parents[1] / "fixtures" / "families"

IDS = torch.arange(40)[None]


def weights(folder):
    return {name: p.detach() for name, p in oarsmith.load_model(folder).named_parameters()}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("convert") / "model", "qwen2", rms_norm_eps=1e-6, rope_theta=1e4)


def convert(*words, **keys):
    return cli.main(["convert", *map(str, words), *(f"--{key}={value}" for key, value in keys.items())])


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_cast(model_dir, tmp_path, capsys, name, dtype):
    assert convert(model_dir, tmp_path / "out", dtype=name) == 0
    out = capsys.readouterr().out
    assert "names, shapes and hashes agree" in out and ("max |dlogit| 0\n" in out) == (name == "fp32")
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


@pytest.mark.parametrize("keys", [{"to": "bin"}, {"to": "paddle"}, {"to": "paddle", "paddle_layout": "pdparams"}])
def test_there_and_back(model_dir, tmp_path, capsys, keys):
    assert convert(model_dir, tmp_path / "out", **keys) == 0
    assert "logits are the same, max |dlogit| 0" in capsys.readouterr().out
    assert not (tmp_path / "out" / "pytorch_model.bin").exists() or keys["to"] == "bin"
    assert convert(tmp_path / "out", tmp_path / "back") == 0
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (model_dir / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(oarsmith.load_model(tmp_path / "out")(IDS), oarsmith.load_model(model_dir)(IDS))


@pytest.mark.parametrize(("kind", "exact"), [("f32", True), ("q8_0", False)])
def test_to_gguf_and_back(model_dir, tmp_path, capsys, kind, exact):
    assert convert(model_dir, tmp_path / "m.gguf", to="gguf", gguf_type=kind) == 0
    out = capsys.readouterr().out
    assert ("logits are the same" in out) == exact and ("KL" in out) != exact
    assert convert(tmp_path / "m.gguf", tmp_path / "out", to="bin", dtype="fp32") == 0
    with torch.no_grad():
        difference = (oarsmith.load_model(tmp_path / "out")(IDS) - oarsmith.load_model(model_dir)(IDS)).abs().max()
    assert difference == 0 if exact else 0 < difference < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "out"]


def test_gguf_names(model_dir, tmp_path, capsys):
    assert convert(model_dir, tmp_path / "out", to="gguf", gguf_type="f32") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert convert(tmp_path / "out", tmp_path / "back") == 0  # a directory with one GGUF file stands for it
    assert torch.equal(oarsmith.load_model(tmp_path / "back")(IDS), oarsmith.load_model(model_dir)(IDS))
    (tmp_path / "m.gguf").write_bytes(b"precious")
    assert convert(model_dir, tmp_path / "m.gguf", to="gguf") == 2
    assert "the destination exists" in capsys.readouterr().err
    assert convert(model_dir, tmp_path / "m.gguf", to="gguf", overwrite=True) == 0
    assert convert(tmp_path / "m.gguf", tmp_path / "n.gguf", to="gguf") == 2
    assert "a GGUF file already" in capsys.readouterr().err


def test_shards(model_dir, tmp_path):
    assert convert(model_dir, tmp_path / "out", max_shard_gb=0.0001, to="bin") == 0
    assert len(list((tmp_path / "out").glob("pytorch_model-*.bin"))) > 1
    assert torch.equal(oarsmith.load_model(tmp_path / "out")(IDS), oarsmith.load_model(model_dir)(IDS))


def write_adapter_of(model_dir, folder):
    model = tiny_decoder("qwen2", lora_rank=4)
    folder.mkdir()
    write_adapter(model, folder, base=str(model_dir))
    return folder


def test_adapters(model_dir, tmp_path, capsys):
    adapter = write_adapter_of(model_dir, tmp_path / "adapter")
    assert convert(adapter, tmp_path / "paddle", to="paddle") == 0
    assert "28 adapter tensors" in capsys.readouterr().out
    assert convert(tmp_path / "paddle", tmp_path / "peft") == 0
    file = "adapter_model.safetensors"
    mine, theirs = load_file(adapter / file), load_file(tmp_path / "peft" / file)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert convert(adapter, tmp_path / "no", to="bin") == 2
    assert "not converted to 'bin'" in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nowhere"}))
    assert convert(adapter, tmp_path / "no", to="paddle") == 2
    assert "--model_name_or_path BASE" in capsys.readouterr().err
    assert convert(adapter, tmp_path / "named", to="paddle", model_name_or_path=model_dir) == 0


def test_an_adapter_that_knows_only_paddles_config(model_dir, tmp_path):
    """PaddleNLP puts the base's config beside its adapters: that is enough."""
    assert convert(write_adapter_of(model_dir, tmp_path / "adapter"), tmp_path / "paddle", to="paddle") == 0
    shutil.rmtree(tmp_path / "adapter")
    settings = json.loads((tmp_path / "paddle" / "lora_config.json").read_text())
    (tmp_path / "paddle" / "lora_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert convert(tmp_path / "paddle", tmp_path / "peft") == 0


def test_a_family_paddlenlp_does_not_have(tmp_path, capsys):
    assert convert(FAMILIES / "gemma2", tmp_path / "out", to="paddle") == 2
    assert "no models of type 'gemma2'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
