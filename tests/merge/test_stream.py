"""Merges of whole directories: any order, any number of processes, interrupted, of any format; what is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import oarsmith
from oarsmith import cli
from oarsmith.adapters.peft_layout import write_adapter
from oarsmith.checkpoint.convert import convert_directory
from oarsmith.checkpoint.gguf.write import write_gguf
from oarsmith.checkpoint.verify import Digests
from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.merge.recipe import read_recipe
from oarsmith.merge.run import Options, merge_models, staging_of
from oarsmith.merge.verify import verify
from tiny import environment, tiny_decoder, write_tiny_model


def merge(values, output, **options):
    return merge_models(read_recipe(values), output, Options(**options), progress=lambda *_: None)


def recipe(*models, method="linear", **changes):
    entries = [{"model": str(model), "parameters": {"weight": 1.0 / (i + 2)}} for i, model in enumerate(models)]
    return {"merge_method": method, "models": entries, **changes}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_tiny_model(folder / f"m{seed}", seed=seed) for seed in range(3)]


def weights(folder):
    found = {}
    for file in Path(folder).glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_processes_and_shards_change_nothing(models, tmp_path):
    values = recipe(models[1], models[2], method="dare_ties", base_model=str(models[0]), parameters={"density": 0.5})
    for name, options in {
        "one": {"num_processes": 1},
        "three": {"num_processes": 3},
        "shards": {"num_processes": 2, "max_shard_bytes": 40_000},
    }.items():
        merge(values, tmp_path / name, probe=False, **options)
    one = weights(tmp_path / "one")
    for name in ("three", "shards"):
        other = weights(tmp_path / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    merge(values, tmp_path / "seed", probe=False, seed=1)
    assert not torch.equal(one["lm_head.weight"], weights(tmp_path / "seed")["lm_head.weight"])


def test_shards_in_any_order(models, tmp_path):
    """The same model in shards of another order."""
    tensors = weights(models[1])
    folder = tmp_path / "shuffled"
    shutil.copytree(models[1], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors, key=lambda name: hash(name) % 7)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, chosen in parts.items():
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(recipe(models[0], models[1]), tmp_path / "a")
    merge(recipe(models[0], folder), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_killed_and_gone_on(models, tmp_path):
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe(models[0], models[1])))
    code = (
        "import sys, time\nfrom oarsmith.merge import stream\nrun = stream.Worker.run\n"
        "def slow(self, task):\n    time.sleep(0.25)\n    return run(self, task)\n"
        "stream.Worker.run = slow\nfrom oarsmith.cli import main\nmain(sys.argv[1:])"
    )
    words = [sys.executable, "-c", code, "merge", str(file), str(out), "--n_process", "1"]
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
    journal = staging_of(out) / "merging.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until and not (journal.is_file() and len(journal.read_text().splitlines()) > 4):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    kept = len(journal.read_text().splitlines()) - 1
    with journal.open("a") as half:
        half.write('["model.norm.wei')  # killed while writing
    report = merge(recipe(models[0], models[1]), out, max_shard_bytes=int(5e9))
    assert report.kept == kept > 3 and not staging_of(out).exists()
    merge(recipe(models[0], models[1]), tmp_path / "whole")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda code, shape, known: ("F16", shape, known), "not F16"),
        (lambda code, shape, known: (code, (shape[0] + 1,), known), r"not F32 \(33,\)"),
        (lambda code, shape, known: (code, shape, "0" * 64), "other values"),
    ],
)
def test_what_was_written_is_held_to_the_plan(models, change, words):
    meant = Digests()
    for name, tensor in weights(models[0]).items():
        meant.add(name, tensor)
    assert verify(models[0], meant, [], lambda *_: None, probe=False).known
    meant.known["model.norm.weight"] = change(*meant.known["model.norm.weight"])
    with pytest.raises(CheckpointError, match=words):
        verify(models[0], meant, [], lambda *_: None, probe=False)


def test_further_files(models, tmp_path):
    """The merge's own are not replaced by those of an input, which is said."""
    folder = tmp_path / "first"
    shutil.copytree(models[0], folder)
    (folder / "NOTES.md").write_text("notes")
    values = recipe(folder, models[1], dtype="bfloat16")
    report = merge(values, tmp_path / "out", copy_files=("NOTES.md", "config.json"), probe=False)
    assert (tmp_path / "out/NOTES.md").read_text() == "notes"
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert ["config.json" in note for note in report.notes] == [True]


def test_what_another_merge_left_is_not_taken(models, tmp_path):
    out = tmp_path / "out"
    staging_of(out).mkdir()
    (staging_of(out) / "merging.jsonl").write_text('"another"\n["lm_head.weight", "0", []]\n')
    assert merge(recipe(models[0], models[1]), out).kept == 0


def test_the_written_model_is_the_mean(models, tmp_path):
    merge(recipe(models[0], models[1], dtype="bfloat16"), tmp_path / "out")
    a, b, found = weights(models[0]), weights(models[1]), weights(tmp_path / "out")
    for name, tensor in found.items():
        expected = (a[name].double() / 2 + b[name].double() / 3) / (5 / 6)
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), expected, atol=0, rtol=2**-8)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    model = oarsmith.load_model(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(5)[None])).all()


def test_adapters_tensor_by_tensor(models, tmp_path):
    """MODEL+ADAPTER is what merge-adapter makes of the two."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(tiny_decoder(lora_rank=4), adapter, base=str(models[0]))
    assert cli.main(["merge-adapter", str(adapter), str(tmp_path / "whole"), "--kl_budget", "1"]) == 0
    for name, reference in (("plus", f"{models[0]}+{adapter}"), ("alone", str(adapter))):
        merge({"merge_method": "passthrough", "models": [{"model": reference}]}, tmp_path / name)
        expected = weights(tmp_path / "whole")
        for key, tensor in weights(tmp_path / name).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0)


def test_other_formats(models, tmp_path):
    convert_directory(models[1], tmp_path / "paddle", "pdparams")
    convert_directory(models[1], tmp_path / "bin", "bin")
    write_gguf(models[1], tmp_path / "m.gguf", type="f32", with_tokenizer=True, progress=lambda *_: None)
    merge(recipe(models[0], models[1]), tmp_path / "plain", probe=False)
    for name in ("paddle", "bin", "m.gguf"):
        merge(recipe(models[0], tmp_path / name), tmp_path / f"out-{name}", probe=False)
        expected, found = weights(tmp_path / "plain"), weights(tmp_path / f"out-{name}")
        assert all(torch.equal(found[key], expected[key]) for key in expected), name
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma", "qwen3"])
def test_families(family, tmp_path):
    one, two = (write_tiny_model(tmp_path / f"{seed}", family, seed=seed) for seed in (1, 2))
    report = merge(recipe(one, two), tmp_path / "out")
    assert report.verified.known and len(report.verified.answers) == 2


def test_stacked_layers(models, tmp_path):
    slices = [
        {"sources": [{"model": str(models[0]), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models[1]), "layer_range": [0, 2]}]},
    ]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
    found, second = weights(tmp_path / "out"), weights(models[1])
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(found[name.format(3)], second[name.format(1)])


def test_a_family_that_is_not_known(tmp_path):
    folders = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"tok_emb.weight": (10, 4), "blocks.0.w": (4, 4), "blocks.1.w": (4, 4), "out.weight": (10, 4)}
        save_file({k: torch.randn(s, generator=generator) for k, s in shapes.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "newer", "vocab_size": 10}))
        folders.append(folder)
    values = recipe(*folders, parameters={"weight": [0.0, 1.0]})
    values["models"] = [{"model": str(folders[0]), "parameters": {"weight": [0, 1]}}, {"model": str(folders[1])}]
    values["parameters"] = {"weight": 1, "normalize": False}
    report = merge(values, tmp_path / "out")
    assert not report.verified.known
    a, b, found = weights(folders[0]), weights(folders[1]), weights(tmp_path / "out")
    torch.testing.assert_close(found["blocks.0.w"], b["blocks.0.w"])
    torch.testing.assert_close(found["blocks.1.w"], a["blocks.1.w"] + b["blocks.1.w"])


def changed(models, tmp_path, change, **config):
    folder = tmp_path / "changed"
    shutil.copytree(models[1], folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if "layers.1.mlp.up" not in k}, {}, "layers.1.mlp.up_proj.weight"),
        (lambda t: t | {"surplus": torch.ones(2)}, {}, "surplus"),
        (lambda t: t | {"model.norm.weight": torch.ones(31)}, {}, "model.norm.weight"),
        (
            lambda t: {k: v[:1100] if len(v) == 1120 else v for k, v in t.items()},
            {"vocab_size": 1100},
            "tokenizer_source: union",
        ),
        (lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, {"num_hidden_layers": 1}, "numbers of layers"),
        (
            lambda t: (
                {k: v for k, v in t.items() if k != "lm_head.weight"} | {"lm_head.weight": t["lm_head.weight"].int()}
            ),
            {},
            "lm_head.weight",
        ),
        (lambda t: t | {"model.norm.weight": torch.full((32,), float("nan"))}, {}, "model.norm.weight"),
    ],
)
def test_what_does_not_fit_is_refused(models, tmp_path, change, config, words):
    folder = changed(models, tmp_path, change, **config)
    with pytest.raises(OarsmithError) as error:
        merge(recipe(models[0], folder), tmp_path / "out")
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_base_of_more_layers_is_not_cut(models, tmp_path):
    base = write_tiny_model(tmp_path / "base", num_hidden_layers=3)
    with pytest.raises(OarsmithError, match="different numbers of layers: 2, 2, 3"):
        merge(recipe(models[0], models[1], method="task_arithmetic", base_model=str(base)), tmp_path / "out")
    sources = [{"model": str(models[0]), "layer_range": [0, 2], "parameters": {"weight": 1.0}}]
    slices = {"merge_method": "task_arithmetic", "base_model": str(base), "slices": [{"sources": sources}]}
    merge(slices, tmp_path / "chosen")
    assert json.loads((tmp_path / "chosen/config.json").read_text())["num_hidden_layers"] == 2


def test_a_tied_head_beside_one_of_its_own(tmp_path):
    tied = write_tiny_model(tmp_path / "tied", tie_word_embeddings=True)
    own = write_tiny_model(tmp_path / "own", seed=1)
    merge(recipe(own, tied), tmp_path / "out")
    a, b = weights(own), weights(tied)
    expected = (a["lm_head.weight"].double() / 2 + b["model.embed_tokens.weight"].double() / 3) / (5 / 6)
    torch.testing.assert_close(weights(tmp_path / "out")["lm_head.weight"].double(), expected, atol=1e-6, rtol=0)
    with pytest.raises(OarsmithError, match=r"lm_head\.weight"):
        merge(recipe(tied, own), tmp_path / "other")


def test_parameters_and_models_that_are_not_there(models, tmp_path):
    for values, words in (
        (recipe(models[0], models[1], parameters={"weihgt": 1}), "did you mean 'weight'"),
        (recipe(models[0], tmp_path / "nowhere"), "no such model"),
        ({"merge_method": "linear", "models": [{"model": str(models[0])}]}, "'weight' is required"),
        (recipe(models[0], models[1], method="tie"), "did you mean 'ties'"),
        (recipe(models[0], models[1], method="ties"), "needs a base"),
        (recipe(models[0], models[1], models[2], method="nuslerp"), "not 3"),
    ):
        with pytest.raises(OarsmithError) as error:
            merge(values, tmp_path / "out")
        assert words in str(error.value)


def test_a_model_that_is_damaged_while_it_is_read(models, tmp_path):
    folder = tmp_path / "short"
    shutil.copytree(models[1], folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        merge(recipe(models[0], folder), tmp_path / "out")


def test_lineage(models, tmp_path):
    """The hashes are of the models' tensors, whatever the shards, and of adapters."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(tiny_decoder(lora_rank=4), adapter, base=str(models[0]))
    report = merge(recipe(f"{models[0]}+{adapter}", models[1]), tmp_path / "a", max_shard_bytes=40_000)
    again = merge(recipe(models[0], models[1]), tmp_path / "b")
    assert report.inputs[0].hash == again.inputs[0].hash != again.inputs[1].hash
    assert report.inputs[0].adapter_hash and again.inputs[0].adapter_hash is None
    assert merge(recipe(tmp_path / "a", models[2]), tmp_path / "c").inputs[0].hash == report.hash


def test_after_the_parent_has_computed(models, tmp_path):
    """Processes are forked after this one's threads have worked; they must not wait for them."""
    code = (
        "import sys, torch\ntorch.set_num_threads(2)\n"
        "for _ in range(3): torch.randn(2000, 2000) @ torch.randn(2000, 2000)\n"
        "from oarsmith.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(models[0], models[1], method="task_arithmetic", base_model=str(models[2]))))
    words = [sys.executable, "-c", code, "merge", str(file), str(tmp_path / "out"), "--n_process", "2"]
    threads = {**environment(), "OMP_NUM_THREADS": "2"}
    subprocess.run(words, env=threads, check=True, timeout=120, stdout=subprocess.DEVNULL)


def test_a_process_that_is_killed(models, tmp_path):
    """One error line, and what was done is kept; the processes of a killed merge end with it."""
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(recipe(models[0], models[1])))
    code = (
        "import os, signal, sys\nfrom oarsmith.merge import stream\nrun = stream.Worker.run\n"
        "def killed(self, task):\n"
        "    if task.name == 'model.norm.weight': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(self, task)\n"
        "stream.Worker.run = killed\nfrom oarsmith.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, "merge", str(file), str(out), "--n_process", "2"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "ended from outside" in done.stderr and not out.exists()
    assert merge(recipe(models[0], models[1]), out, max_shard_bytes=int(5e9)).kept > 0
