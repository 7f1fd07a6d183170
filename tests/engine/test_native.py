"""The engine on the compiled step: the answers that PyTorch gives, and no PyTorch where weights are packed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from matrix.bench import Bench
from matrix.rows import ROWS
from oarsmith import Engine, Sampling
from oarsmith.compiling import BuildError
from oarsmith.engine.native_backend import NativeBackend
from oarsmith.errors import ConfigError
from oarsmith.models.cache_form import INT8_GROUPS
from oarsmith.native.library import load

try:
    load()
except BuildError as error:
    pytest.skip(str(error), allow_module_level=True)

FAMILIES = ["llama", "gemma2", "qwen3_moe", "chatglm", "yuan", "deepseek_v2", "phi3", "bloom"]


@pytest.fixture(autouse=True)
def _one_thread(few_threads: None) -> None:
    """Tiny matrices."""


def both(row: str, folder: Path, **options: object) -> tuple[Bench, Engine, Engine]:
    """A model, and engines on PyTorch and on the compiled step."""
    bench = Bench(row, ROWS[row], folder)
    engines = [Engine(bench.path, object_of(bench), compute=c, block_size=16, **options) for c in ("torch", "native")]
    return bench, *engines


def object_of(bench: Bench) -> None:
    """No tokenizer: prompts are ids."""


@pytest.fixture
def ids_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oarsmith.engine.engine.find_tokenizer", lambda *_: None)


@pytest.mark.parametrize("row", FAMILIES)
def test_answers_of_families(row: str, tmp_path: Path, ids_only: None) -> None:
    """Prompts in chunks, side by side, with pages lost on the way."""
    bench, plain, native = both(row, tmp_path, batch_size=3, max_step_tokens=40, num_pages=9)
    prompts = [bench.document(length, seed) for seed, length in enumerate((30, 9, 44, 17))]
    sampling = Sampling(max_new_tokens=24, ignore_eos=True, logprobs=3)
    assert isinstance(native.runner._backend, NativeBackend)
    for expected, found in zip(plain.generate(prompts, sampling), native.generate(prompts, sampling), strict=True):
        assert found.ids == expected.ids
        assert [one.logprob for one in found.logprobs] == pytest.approx(
            [o.logprob for o in expected.logprobs], abs=1e-4
        )
    assert native.runner.scheduler.pool.num_free == native.runner.scheduler.pool.num_pages


def test_every_way_to_answer(tmp_path: Path, ids_only: None) -> None:
    bench, plain, native = both("llama", tmp_path, batch_size=6)
    prompt = bench.document(20, 1)
    ways = [
        Sampling(max_new_tokens=12, temperature=0.9, top_p=0.9, seed=3),
        Sampling(max_new_tokens=12, temperature=1.0, n=3, seed=5),
        Sampling(max_new_tokens=12, num_beams=3),
        Sampling(max_new_tokens=12, prompt_logprobs=2, repetition_penalty=1.2, logit_bias={7: 2.0}),
        Sampling(max_new_tokens=12, min_new_tokens=5, bad_words=[[9], [10, 11]], presence_penalty=0.5),
    ]
    for sampling in ways:
        expected, found = plain.generate(prompt, sampling)[0], native.generate(prompt, sampling)[0]
        assert [one.ids for one in (found, *found.others)] == [one.ids for one in (expected, *expected.others)]
        if sampling.prompt_logprobs is not None:
            values = [[one.logprob for one in completion.prompt_logprobs] for completion in (found, expected)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_a_model_guesses(tmp_path: Path, ids_only: None) -> None:
    """The draft model runs on the compiled step too, in pages of the same numbers; drawn answers do not change."""
    for name in ("other", "draft"):
        (tmp_path / name).mkdir()
    bench, draft = Bench("llama", ROWS["llama"], tmp_path / "other"), Bench("llama", ROWS["llama"], tmp_path / "draft")
    plain = Engine(bench.path, compute="native", block_size=16)
    for by in (draft.path, bench.path):
        engine = Engine(bench.path, compute="native", block_size=16, speculative=by, batch_size=3)
        for sampling in (
            Sampling(max_new_tokens=30, ignore_eos=True),
            Sampling(max_new_tokens=30, ignore_eos=True, temperature=1.0, seed=1, n=2),
        ):
            prompts = [bench.document(length, seed) for seed, length in enumerate((30, 9, 44, 17))]
            found = engine.generate(prompts, sampling)
            if sampling.greedy:
                assert [one.ids for one in found] == [one.ids for one in plain.generate(prompts, sampling)]
        assert isinstance(engine.runner._drafter.backends[0], NativeBackend)
        assert engine.runner.num_accepted >= 0.99 * engine.runner.num_drafted > 100
    pool = engine.runner.scheduler.pool
    assert pool.num_free == pool.num_pages


def test_a_cache_in_8_bits(tmp_path: Path, ids_only: None) -> None:
    """Half the memory of fp32's quarter and scales; prompts in chunks, prefixes that are shared, pages lost."""
    bench, plain, native = both("llama", tmp_path, cache_dtype="int8", batch_size=3, max_step_tokens=40, num_pages=9)
    prompts = [bench.document(length, seed) for seed, length in enumerate((30, 9, 44, 17))]
    sampling = Sampling(max_new_tokens=24, ignore_eos=True, logprobs=3)
    for _ in range(2):
        for expected, found in zip(plain.generate(prompts, sampling), native.generate(prompts, sampling), strict=True):
            assert found.ids == expected.ids
            assert [one.logprob for one in found.logprobs] == pytest.approx(
                [o.logprob for o in expected.logprobs], abs=1e-2
            )
    program = native._served.native.program
    assert program.page_bytes(16, form=INT8_GROUPS) * 3 < program.page_bytes(16)
    with pytest.raises(ConfigError, match="cache_dtype cannot be 'int3'"):
        Engine(bench.path, cache_dtype="int3")


def test_files_in_fp16_are_served_in_fp16(tmp_path: Path, ids_only: None) -> None:
    bench = Bench("llama", ROWS["llama"], tmp_path)
    prompt, sampling = bench.document(20, 1), Sampling(max_new_tokens=12, ignore_eos=True)
    engine = Engine(bench.path, dtype="fp16", compute="native", block_size=16)
    plain = Engine(bench.model().half().float(), block_size=16)
    assert engine.generate(prompt, sampling)[0].ids == plain.generate(prompt, sampling)[0].ids
    assert {op.matrix.format for op in engine._served.native.program.body if op.matrix} == {"fp16"}


def test_guesses(tmp_path: Path, ids_only: None) -> None:
    bench, plain, native = both("llama", tmp_path, speculative="ngram")
    prompt = bench.document(12, 2) * 3
    sampling = Sampling(max_new_tokens=30, ignore_eos=True)
    assert native.generate(prompt, sampling)[0].ids == plain.generate(prompt, sampling)[0].ids


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_weights_are_the_same_model_on_both(weights: str, tmp_path: Path, ids_only: None) -> None:
    bench, plain, native = both("llama", tmp_path, weights=weights)
    ids = bench.document(40, 1)
    sampling = Sampling(max_new_tokens=1, prompt_logprobs=0)
    found = [engine.generate(ids, sampling)[0].prompt_logprobs for engine in (plain, native)]
    # The compiled step rounds activations too.
    assert [one.logprob for one in found[1]] == pytest.approx([one.logprob for one in found[0]], abs=0.2)


def test_the_decoder_is_there_when_asked_for(tmp_path: Path, ids_only: None) -> None:
    bench, _, native = both("llama", tmp_path)
    ids = torch.tensor([bench.document(10, 1)])
    with torch.no_grad():
        assert torch.equal(native.model(ids), bench.model()(ids))


def test_where_it_cannot_serve(tmp_path: Path, ids_only: None) -> None:
    bench = Bench("llama", ROWS["llama"], tmp_path)
    engine = Engine(bench.path, block_size=10)
    assert not isinstance(engine.runner._backend, NativeBackend)
    with pytest.raises(ConfigError, match="block_size 10 is no multiple of 16"):
        Engine(bench.path, block_size=10, compute="native")
    with pytest.raises(ConfigError, match="weights cannot be 'int3'"):
        Engine(bench.path, weights="int3")
    with pytest.raises(ConfigError, match="compute cannot be 'gpu'"):
        Engine(bench.path, compute="gpu")


def test_packed_weights_need_no_pytorch(tmp_path: Path, chain_model) -> None:
    path = chain_model("one two three")
    command = [sys.executable, "-m", "oarsmith", "generate", str(path), "Hi", "--weights", "int8", "--device", "cpu"]
    script = (
        "import sys; sys.argv = sys.argv[1:]; from oarsmith.cli import main; code = main();"
        "import json; found = ['torch' in sys.modules, 'numpy' in sys.modules];"
        "print(json.dumps(found), file=sys.stderr); sys.exit(code)"
    )
    first = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    again = subprocess.run(
        [sys.executable, "-c", script, *command[2:]], capture_output=True, text=True, timeout=120, check=True
    )
    assert first.stdout == again.stdout == "one two three\n"
    assert json.loads(again.stderr.splitlines()[-1]) == [False, False]
