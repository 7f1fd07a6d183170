"""A compiled package answers as the engine does; and what its graphs compute is the decoder's forward pass."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import oarsmith
from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith import Sampling, cli
from oarsmith.engine import static
from oarsmith.engine.pages import PagePool
from oarsmith.engine.runner import Runner
from oarsmith.engine.scheduler import Scheduler
from oarsmith.engine.static import StaticBackend, StaticEngine
from oarsmith.engine.static_export import require_static, trace
from oarsmith.errors import CheckpointError, ConfigError, ModelError, OarsmithError
from oarsmith.models.caching import CacheRules
from tiny import environment, tiny_decoder, write_tiny_model

PROMPTS = ["Say one.", "b", "A longer prompt about many things. " * 3, "x y z", "What is one plus one?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("static") / "model")


@pytest.fixture(scope="module")
def package(model):
    """The one package that is compiled: half a minute."""
    folder = model.parent / "package"
    words = ["export", str(model), str(folder), "--num_threads", "1"]
    ran = subprocess.run(
        [sys.executable, "-m", "oarsmith", *words], capture_output=True, text=True, env=environment(), timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    assert "wrote" in ran.stdout and "--mode static" in ran.stdout
    return folder


def traced_engine(model, monkeypatch, **options):
    """An engine over the graphs before they are compiled."""
    engine = oarsmith.Engine(model, prefix_caching=False, **options)
    functions = {kind: trace(model, kind).module() for kind in ("read", "step")}
    facts = {
        "device": "cpu",
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "cache": [block.attention.cache_shape.slots for block in model.blocks()],
    }
    context, rows = model.spec.max_positions, engine.batch_size
    backend = StaticBackend(functions, facts, rows, context)
    rules = CacheRules.of(model.spec)
    scheduler = Scheduler(PagePool(rows, context), rules, max_running=rows, max_step_tokens=16, prefixes=False)
    monkeypatch.setitem(engine.__dict__, "runner", Runner(backend, scheduler))
    return engine


# Windows, soft caps, learned positions, ALiBi, sinks, latents, experts with and without shared ones and biases.
FAMILIES = ("llama", "qwen2", "mistral", "mixtral", "gemma2", "gpt2", "bloom", "gpt_oss", "deepseek_v3", "qwen2_moe")


@pytest.mark.slow
@pytest.mark.parametrize("row", FAMILIES)
def test_the_graphs_of_a_family(row, tmp_path, monkeypatch, few_threads):
    """In fp32: the engine's tokens and distributions, over chunks, rows that come and go, and room that grows."""
    monkeypatch.setattr(static, "_FIRST_PLACES", 8)
    bench = Bench(row, ROWS[row], tmp_path)
    model = bench.model()
    prompts = [bench.document(length, seed) for seed, length in enumerate((9, 23, 1, 33, 10, 2))]
    sampling = Sampling(max_new_tokens=24, ignore_eos=True, logprobs=0)
    expected = oarsmith.Engine(model).generate(prompts, sampling)
    found = traced_engine(model, monkeypatch, batch_size=3).generate(prompts, sampling)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)


@pytest.mark.parametrize("row", ["qwen", "chatglm", "yuan", "phi3"])
def test_families_that_cannot_be_exported(row, tmp_path):
    with pytest.raises(ModelError, match="cannot be exported") as caught:
        require_static(Bench(row, ROWS[row], tmp_path).model())
    assert ROWS[row].config["model_type"] in caught.value.what


def test_an_adapter_must_be_merged_first():
    with pytest.raises(ModelError, match="an adapter lies on the model"):
        require_static(tiny_decoder(lora_rank=2))


@pytest.mark.slow
def test_the_package_answers_as_the_engine(model, package):
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    expected = oarsmith.Engine(model, dtype="fp32").generate(PROMPTS, sampling)
    engine = StaticEngine(package, batch_size=2)
    assert [one.ids for one in engine.generate(PROMPTS, sampling)] == [one.ids for one in expected]
    # The same again, in rows that others have used.
    assert [one.ids for one in engine.generate(PROMPTS[::-1], sampling)] == [one.ids for one in expected[::-1]]


@pytest.mark.slow
def test_sampling_streams_and_several_answers(model, package):
    ours, theirs = StaticEngine(package, batch_size=4), oarsmith.Engine(model, dtype="fp32", batch_size=4)
    drawn = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3, n=3, ignore_eos=True)
    for a, b in zip(ours.generate(PROMPTS, drawn), theirs.generate(PROMPTS, drawn), strict=True):
        assert [a.ids, *(other.ids for other in a.others)] == [b.ids, *(other.ids for other in b.others)]
    beams = Sampling(max_new_tokens=12, num_beams=3)
    assert ours.generate(PROMPTS[0], beams)[0].ids == theirs.generate(PROMPTS[0], beams)[0].ids
    assert "".join(ours.stream("Say one.", Sampling(max_new_tokens=9))) == "".join(
        theirs.stream("Say one.", Sampling(max_new_tokens=9))
    )


@pytest.mark.slow
def test_a_text_may_fill_the_context(model, package):
    engine = StaticEngine(package, batch_size=2)
    prompt = list(range(10, 110))
    full, other = engine.generate([prompt, prompt[:5]], Sampling(max_new_tokens=1000, ignore_eos=True))
    assert len(full.prompt_ids) + full.num_tokens == engine.context_length == 256
    expected = oarsmith.Engine(model, dtype="fp32").generate(
        [prompt, prompt[:5]], Sampling(max_new_tokens=1000, ignore_eos=True)
    )
    assert [full.ids, other.ids] == [one.ids for one in expected]


@pytest.mark.slow
def test_what_a_package_does_not_give(package):
    with pytest.raises(ConfigError, match="no log-probabilities of prompts"):
        StaticEngine(package).generate("a", Sampling(prompt_logprobs=1))
    with pytest.raises(ConfigError, match="takes no adapters"):
        StaticEngine(package).add_adapter("mine", "some/path")


@pytest.mark.slow
def test_generate_static(model, package, tmp_path, capsys):
    """The command, one prompt and a file; the same answers as without."""
    rows = "".join(f"{json.dumps({'prompt': prompt})}\n" for prompt in PROMPTS)
    (tmp_path / "in.jsonl").write_text(rows)
    found = []
    for path, mode in ((model, "dynamic"), (package, "static")):
        words = ["--mode", mode, "--max_new_tokens", "8", "--num_threads", "1"]
        files = ["--input_file", str(tmp_path / "in.jsonl"), "--output_file", str(tmp_path / f"{mode}.jsonl")]
        assert cli.main(["generate", str(path), *words, *files]) == 0
        assert cli.main(["generate", str(path), "Say one.", *words]) == 0
        found.append((capsys.readouterr().out, (tmp_path / f"{mode}.jsonl").read_text()))
    assert found[0] == found[1]
    assert cli.main(["generate", str(package), "a", "--mode", "static", "--dtype", "bf16"]) == cli.EXIT_BAD_INPUT
    assert "a compiled package is what it is" in capsys.readouterr().err
    assert cli.main(["generate", str(package), "a"]) == cli.EXIT_BAD_INPUT
    assert "--mode static" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_needs_nothing_of_ours(model, package, tmp_path):
    """As it lies in the package, where oarsmith cannot be imported; the page shows the very same lines."""
    (tmp_path / "oarsmith.py").write_text("raise ImportError('not here')\n")
    shutil.copytree(package, tmp_path / "elsewhere")
    words = [sys.executable, str(tmp_path / "elsewhere" / "generate.py"), "Say one."]
    env = {**environment(), "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(words, capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, ran.stderr
    engine = oarsmith.Engine(model, dtype="fp32")
    (expected,) = engine.generate("Say one.", Sampling(max_new_tokens=64))
    ids = [*expected.prompt_ids, *(index for index in expected.ids if index not in engine.tokenizer.stop_ids)]
    assert ran.stdout.removesuffix("\n") == engine.tokenizer.decode(ids)
    script, page = (package / "generate.py").read_text().strip(), (package / "README.md").read_text()
    assert script in page and "$" not in page
    assert script in (Path(__file__).parents[2] / "docs" / "export.md").read_text()


@pytest.mark.slow
def test_a_package_says_what_it_was_made_with(package, tmp_path):
    folder = tmp_path / "package"
    shutil.copytree(package, folder)
    facts = json.loads((folder / "package.json").read_text())
    assert facts["cache"] == [[[2, 8], [2, 8]]] * 2 and facts["dtype"] == "float32" and facts["context"] == 256
    for change, message in (
        ({"cpu": "SSE9"}, "cpu SSE9, here"),
        ({"torch": "1.13.1+cpu"}, "torch 1.13, here"),
        ({"format": "another"}, "format another"),
    ):
        (folder / "package.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(CheckpointError, match="made for another machine or version") as caught:
            StaticEngine(folder)
        assert message in caught.value.what
    (folder / "package.json").write_text(json.dumps(facts))
    (folder / "model.pt2").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(OarsmithError, match=r"model\.pt2"):
        StaticEngine(folder).generate("a")
    (folder / "package.json").unlink()
    with pytest.raises(CheckpointError, match="no static package"):
        StaticEngine(folder)


def test_a_folder_in_the_way_is_kept(model, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert cli.main(["export", str(model), str(tmp_path / "mine")]) == cli.EXIT_BAD_INPUT
    assert "exists already" in capsys.readouterr().err
    words = ["export", str(model), str(tmp_path / "mine"), "--overwrite_output_dir"]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    assert "is no package: it is not replaced" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_without_a_compiler(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert cli.main(["export", str(model), str(tmp_path / "package"), "--device", "cpu"]) == cli.EXIT_BAD_INPUT
    assert "install g++" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()


def test_rows_nobody_asks_leave_no_trace(monkeypatch, few_threads):
    """A step computes rows without a token too: what those hold stays as it is."""
    monkeypatch.setattr(static, "_FIRST_PLACES", 16)
    seen = []

    def step(ids, start, cache):
        seen.append((ids.tolist(), start.tolist(), [tensor.shape for layer in cache for tensor in layer]))
        return torch.arange(float(len(ids)))[:, None]

    facts = {"device": "cpu", "dtype": "float32", "cache": [[[2]]]}
    backend = StaticBackend({"read": step, "step": step}, facts, 4, 64)
    parts = [static.Part([7], 3, 0, [2], 3), static.Part([8, 9], 0, 1, [0], 5), static.Part([5], 9, 2, [1], 9)]
    backend.compute(parts)
    assert seen[0] == ([[8, 9]], [0], [(1, 16, 2)])
    # Row 0 has no single token: it writes into the last place, which no text reaches.
    assert seen[1] == ([[0], [5], [7]], [15, 9, 3], [(3, 16, 2)])
    assert backend.logits([0, 2, 3]).tensor[:, 0].tolist() == [2.0, 0.0, 1.0]
    backend.compute([static.Part([1], 15, 0, [2], 3)])
    assert seen[2][2] == [(3, 32, 2)]
