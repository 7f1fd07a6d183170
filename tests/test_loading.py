"""A path the user typed, and what is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import oarsmith
from oarsmith.adapters.linear import attach
from oarsmith.adapters.lora import Lora
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.adapters.targets import adapt_rewrite, match_targets
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.errors import CheckpointError, ConfigError, ModelError, OarsmithError
from oarsmith.loading import dtype_name, load_model, pick_device, pick_dtype, save_model
from oarsmith.model_path import resolve
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import init_weights
from random_adapter import randomise

CONFIG = {
    "model_type": "llama",
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "torch_dtype": "float32",
}
IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny models."""


def make_model(path: Path, seed: int = 1) -> Path:
    model = Decoder(families.build_spec(CONFIG)[1], CONFIG)
    init_weights(model, seed)
    save_model(model, path)
    return path


def make_adapter(path: Path, base: Path, named: str | None = None) -> Path:
    rewrite = adapt_rewrite(
        lambda modules: dict.fromkeys(match_targets(modules, "all-linear"), Lora(rank=2, alpha=8.0))
    )
    model = load_decoder(base, rewrite=rewrite)
    attach(model, seed=2)
    randomise(model, 1.0, seed=5)
    path.mkdir(parents=True)
    write_adapter(model, path, base=str(base) if named is None else named)
    return path


def logits(path: Path, **arguments: object) -> torch.Tensor:
    with torch.no_grad():
        return load_model(path, device="cpu", **arguments)(IDS)


def refused(path: Path, **arguments: object) -> str:
    with pytest.raises(OarsmithError) as caught:
        load_model(path, **arguments)
    return str(caught.value)


def test_model_directory(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    model = oarsmith.load_model(str(path))
    assert not model.training and resolve(path).base == path and resolve(path).adapter is None
    assert model(IDS).shape == (1, 5, 30)
    assert torch.equal(logits(path), logits(path))


def test_save_replaces_at_once_and_with_everything(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    (path / "stale.txt").write_text("of the old model")
    make_model(path, seed=2)
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_model_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    base = make_model(tmp_path / "m")
    model = load_model(base, adapter=make_adapter(tmp_path / "a", base))
    with pytest.raises(ModelError, match="carries an adapter"):
        save_model(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m"]


def test_adapter_beside_its_base(tmp_path: Path) -> None:
    base = make_model(tmp_path / "m")
    adapter = make_adapter(tmp_path / "a", base)
    assert (resolve(adapter).base, resolve(adapter).adapter) == (base, adapter)
    on_top, by_name = logits(base, adapter=adapter), logits(adapter)
    assert torch.equal(on_top, by_name) and not torch.allclose(on_top, logits(base))


def test_a_relative_base_is_looked_up_from_the_adapter_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "there" / "m")
    adapter = make_adapter(tmp_path / "there" / "a", base, named="../m")
    elsewhere = tmp_path / "elsewhere" / "here"
    make_model(tmp_path / "elsewhere" / "m", seed=9)
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert resolve(adapter).base.resolve() == base
    other = make_adapter(tmp_path / "far" / "b" / "a", base, named="../m")
    assert resolve(other).base.resolve() == tmp_path / "elsewhere" / "m"


def test_an_adapter_without_its_base(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", make_model(tmp_path / "m"), named="someone/some-model")
    message = refused(adapter)
    assert "'someone/some-model' is not there" in message and "--adapter" in message
    config = json.loads((adapter / "adapter_config.json").read_text())
    del config["base_model_name_or_path"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "base model None is not there" in refused(adapter)
    assert torch.equal(logits(tmp_path / "m", adapter=adapter), logits(tmp_path / "m", adapter=adapter))


def test_an_adapter_on_an_adapter(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", make_model(tmp_path / "m"))
    assert "the path is an adapter already" in refused(adapter, adapter=adapter)


def test_run_folder(tmp_path: Path) -> None:
    """The merged model if there is one, else the trained one, else the adapter on its base."""
    run, base = tmp_path / "run", make_model(tmp_path / "m")
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert "this run has not finished" in refused(run) and "resume" in refused(run)
    adapter = make_adapter(run / "adapter", base)
    assert (resolve(run).base, resolve(run).adapter) == (base, adapter)
    assert torch.equal(logits(run), logits(base, adapter=run)), "a run folder is also good for its adapter"
    model = make_model(run / "model", seed=3)
    assert (resolve(run).base, resolve(run).adapter) == (model, None)
    merged = make_model(run / "merged", seed=4)
    assert torch.equal(logits(run), logits(merged))


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert f"fix: oarsmith convert {tmp_path / 'm.gguf'} OUT" in refused(tmp_path / "m.gguf")
    assert "no such directory" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json in the directory" in refused(tmp_path / "empty")
    base = make_model(tmp_path / "m")
    assert "no adapter_config.json in the directory" in refused(base, adapter=tmp_path / "nowhere")
    (base / "model.safetensors").rename(base / "m.gguf")
    assert "no model.safetensors in the directory; it holds config.json, m.gguf" in refused(base)
    with pytest.raises(CheckpointError):
        load_model(base)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        ("auto", None),
    ],
)
def test_dtype_names(name: str, dtype: torch.dtype | None) -> None:
    assert pick_dtype(name) == dtype
    if dtype is not None:
        assert pick_dtype(dtype_name(dtype)) == dtype


def test_dtype_of_the_loaded_model(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    for given, expected in (("auto", torch.float32), ("bf16", torch.bfloat16), (torch.float16, torch.float16)):
        assert load_model(path, dtype=given).embedding.weight.dtype == expected
    with pytest.raises(ConfigError, match=r"dtype: unknown dtype 'int8'\n  fix: use auto or one of fp32, bf16, fp16"):
        load_model(path, dtype="int8")


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="unknown device 'tpux'"):
        pick_device("tpux")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    assert pick_device("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="no CUDA device is available"):
            load_model(path, device=device)


def test_a_config_alone_makes_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    models = [oarsmith.new_model(source, seed=5) for source in (tmp_path, tmp_path / "config.json", CONFIG)]
    first = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    assert not models[0].training and models[0](IDS).isfinite().all()
    assert not torch.equal(oarsmith.new_model(CONFIG, seed=6).embedding.weight, models[0].embedding.weight)
    oarsmith.save_model(models[0], tmp_path / "saved")
    assert torch.equal(oarsmith.load_model(tmp_path / "saved")(IDS), models[0](IDS))
    assert oarsmith.new_model(CONFIG, dtype="bf16").embedding.weight.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="no such directory"):
        oarsmith.new_model(tmp_path / "nowhere")


def test_a_directory_with_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"holds model.gguf") as caught:
        resolve(tmp_path)
    assert f"oarsmith convert {tmp_path / 'model.gguf'} OUT" in str(caught.value)
