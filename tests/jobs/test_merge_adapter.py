"""``oarsmith merge-adapter``: the merged model is base plus adapter, with proof, or nothing is written."""

import json
import shutil

import pytest
import torch
import transformers

import oarsmith
from oarsmith import cli
from tiny import run_sft, write_rows, write_tiny_model

IDS = torch.arange(5, 50)[None]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def run_dir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    write_tiny_model(folder / "model", request.param)
    keys = {"max_length": 64, "max_steps": 5, "learning_rate": 3e-2, "lora": True, "lora_rank": 4}
    assert run_sft(folder / "model", write_rows(folder / "rows.jsonl"), folder / "run", **keys) == 0
    return folder / "run"


def merge(*words, **keys):
    return cli.main(["merge-adapter", *map(str, words), *(f"--{key}={value}" for key, value in keys.items())])


def logits(path, **options):
    with torch.no_grad():
        return oarsmith.load_model(path, **options)(IDS)


def test_merged_is_base_plus_adapter(run_dir, tmp_path, capsys):
    assert merge(run_dir, tmp_path / "merged") == 0
    adapted = logits(run_dir / "adapter")
    # fp32: one rounding of W + BA, and products in another order.
    assert (logits(tmp_path / "merged") - adapted).abs().max() < 1e-4
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        assert (theirs.eval()(IDS).logits - adapted).abs().max() < 1e-4
    proof = json.loads((tmp_path / "merged" / "merge_proof.json").read_text())
    assert proof["mean_kl"] <= proof["max_kl"] < 1e-9
    assert proof["effect_kl"] > 1e-4, "the adapter does something"
    assert proof["top1_agreement"] == 1.0
    out = capsys.readouterr().out
    assert "merge proof over" in out
    assert f"next: oarsmith chat {tmp_path / 'merged'}" in out
    assert oarsmith.load_tokenizer(tmp_path / "merged").chat_template is not None


def test_an_adapter_whose_base_has_moved(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "gone"}))
    assert merge(tmp_path / "adapter", tmp_path / "merged") == 2
    assert "base model 'gone' is not there" in capsys.readouterr().err
    assert merge(tmp_path / "adapter", tmp_path / "merged", model_name_or_path=run_dir.parent / "model") == 0
    assert (logits(tmp_path / "merged") - logits(run_dir / "adapter")).abs().max() < 1e-4


def test_over_budget_writes_nothing(run_dir, tmp_path, capsys):
    assert merge(run_dir, tmp_path / "merged", kl_budget=1e-30, dtype="bf16") == 2
    message = capsys.readouterr().err
    assert "nothing was written" in message
    assert "kl_budget" in message
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.iterdir())


def test_not_an_adapter(run_dir, capsys):
    assert merge(run_dir.parent / "model") == 2
    assert "there is no adapter here" in capsys.readouterr().err


def test_a_run_talks_with_its_merged_model(run_dir):
    assert merge(run_dir) == 0
    assert (run_dir / "merged" / "config.json").exists()
    merged = oarsmith.load_model(run_dir)
    assert all(".lora_" not in name for name, _ in merged.named_parameters())
    assert merge(run_dir) == 2, "the destination is there already"
    assert merge(run_dir, overwrite=True) == 0
