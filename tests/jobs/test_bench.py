"""``oarsmith bench``: real processes on a tiny model; numbers, table, picture."""

import importlib.util
import json
import random
import subprocess
import sys

import pytest

from oarsmith import cli
from oarsmith.config.bench import BenchConfig
from oarsmith.config.load import load_config
from oarsmith.errors import DataError
from oarsmith.jobs import bench
from oarsmith.jobs.bench_report import QUANTITIES, disturbed, draw, numbers_of, quantile, same_tokens, spread, table
from oarsmith.jobs.bench_requests import bench_requests
from oarsmith.text import load_tokenizer
from tiny import command, environment, write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "model", torch_dtype="float32")


def run(folder, model, *words):
    given = [*command(["bench", str(model)]), "--output_dir", str(folder / "out"), *map(str, words)]
    return subprocess.run(given, capture_output=True, text=True, env=environment(), cwd=folder, timeout=300)


SHORT = ("--num_requests", 3, "--input_tokens", 9, "--output_tokens", 5, "--concurrency", 2, "--num_threads", 1)


@pytest.mark.slow
def test_measured_beside_transformers(model, tmp_path):
    """Whole processes: both engines give the same tokens, each as many as were asked for."""
    ran = run(tmp_path, model, *SHORT, "--repetitions", 2, "--compare", "transformers", "--dtype", "fp32")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "| first token, alone" in ran.stdout and "transformers" in ran.stdout
    assert "3 requests of 9 + 5 tokens, 2 at a time; 3 of them alone; median of 2 (least-most)" in ran.stdout
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["same_tokens"] == {"transformers": 1.0}
    assert set(found["environment"]) >= {"cpu", "torch", "usable_cpus", "memory_gib", "load_before"}
    assert found["versions"]["oarsmith"]["threads"] == found["versions"]["transformers"]["threads"] == "1"
    for ones in found["measurements"].values():
        assert len(ones) == 2
        for one in ones:
            assert one["cold_start_s"] > one["load_s"] > 0
            assert 30 < one["peak_mb"] < 4000
            assert [len(answer["ids"]) for answer in one["together"]["answers"]] == [5, 5, 5]
            for answer in (*one["together"]["answers"], *one["alone"]["answers"]):
                assert answer["begin"] < answer["times"][0] and answer["times"] == sorted(answer["times"])
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["llama.cpp", "openvino-genai"])
def test_measured_beside_readers_of_gguf(tmp_path, peer):
    module = {"llama.cpp": "llama_cpp", "openvino-genai": "openvino_genai"}[peer]
    pytest.importorskip(module)
    # Their fast paths want rows that are multiples of 32.
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = write_tiny_model(tmp_path / "model", **sizes)
    ran = run(tmp_path, model, *SHORT, "--repetitions", 1, "--compare", peer, "--dtype", "fp32")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["same_tokens"] == {peer: 1.0}


def test_a_peer_that_is_not_there(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", str(model), "--compare", "transformers,llama.cpp"]) == cli.EXIT_BAD_INPUT
    assert "pip install transformers" in capsys.readouterr().err


def test_a_peer_would_not_have_the_adapter(model, capsys):
    words = ["bench", str(model), "--compare", "transformers", "--adapter", "some"]
    assert cli.main(words) == cli.EXIT_BAD_INPUT
    assert "merge the adapter first" in capsys.readouterr().err


def test_a_process_that_fails_is_shown(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho beginning\necho no memory is left >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(bench.sys, "executable", str(script))
    assert cli.main(["bench", str(model), *map(str, SHORT)]) == cli.EXIT_BAD_INPUT
    printed = capsys.readouterr().err
    assert "oarsmith could not be measured: no memory is left" in printed and "exit status 3" in printed
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    assert cli.main(["bench", str(model), *map(str, SHORT)]) == cli.EXIT_BAD_INPUT
    assert "ended by SIGKILL" in capsys.readouterr().err
    assert not (tmp_path / "bench").exists()


def configuration(model, *words):
    return load_config(BenchConfig, None, [str(model), *words]).config


def test_made_prompts(model):
    tokenizer = load_tokenizer(model)
    words = ("--num_requests=5", "--input_tokens=40", "--output_tokens=7")
    made = bench_requests(configuration(model, *words), tokenizer, 1120, 256)
    assert [(len(one.ids), one.output_tokens) for one in made] == [(40, 7)] * 5
    assert len({tuple(one.ids[:8]) for one in made}) == 5
    assert not set(tokenizer.special_ids) & {index for one in made for index in one.ids}
    assert made == bench_requests(configuration(model, *words), tokenizer, 1120, 256)
    assert made != bench_requests(configuration(model, *words, "--seed=1"), tokenizer, 1120, 256)


def test_requests_of_a_file(model, tmp_path):
    tokenizer = load_tokenizer(model)
    rows = [
        {"prompt": "count"},
        {"src": "count", "output_tokens": 3},
        {"messages": [{"role": "user", "content": "count"}]},
        {"input_tokens": 21, "output_tokens": 4},
        {"prompt": "beyond the number that is wanted"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = configuration(model, f"--requests={path}", "--num_requests=4", "--output_tokens=6")
    made = bench_requests(config, tokenizer, 1120, 256)
    chat = tokenizer.encode_chat([{"role": "user", "content": "count"}], None, True)
    assert [one.ids for one in made[:3]] == [list(chat)] * 3
    assert [(len(one.ids), one.output_tokens) for one in made[1:]] == [(len(chat), 3), (len(chat), 6), (21, 4)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "the line is not JSON"),
        ({"input_tokens": 0}, "input_tokens is 0"),
        ({"prompt": "a", "output_tokens": "many"}, "output_tokens is 'many'"),
        ({"input_tokens": 250, "output_tokens": 7}, "are more than the model's context of 256"),
        ({"question": "a"}, "fit no known format"),
    ],
)
def test_a_row_that_is_no_request(model, tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps({'prompt': 'fine'})}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        bench_requests(configuration(model, f"--requests={path}"), load_tokenizer(model), 1120, 256)
    assert message in caught.value.what


def answers(*times, begin=10.0):
    return {"prompt_tokens": 100, "begin": begin, "times": [begin + t for t in times], "ids": list(range(len(times)))}


MEASURED = {
    "load_s": 1.0,
    "cold_start_s": 1.5,
    "peak_mb": 300.0,
    "alone": {"answers": [answers(0.5, 0.6, 0.8), answers(0.3, 0.4, 0.5)], "waited": 0.02},
    "together": {"answers": [answers(0.5, 1.0), answers(1.0, 3.0, begin=11.0)], "waited": 0.05},
}


def test_numbers_by_hand():
    numbers = numbers_of(MEASURED)
    assert numbers["first_token_ms"] == pytest.approx(400) and numbers["first_token_p95_ms"] == pytest.approx(500)
    # Gaps alone: 0.1, 0.2, 0.1, 0.1.
    assert numbers["token_ms"] == pytest.approx(100) and numbers["token_p95_ms"] == pytest.approx(200)
    assert numbers["decode_tokens_per_s"] == pytest.approx(4 / 0.5)
    assert numbers["prefill_tokens_per_s"] == pytest.approx(200 / 0.8)
    # From 10.0, when the first began, to 14.0, when the last ended.
    assert numbers["output_tokens_per_s"] == pytest.approx(4 / 4.0)
    assert numbers["total_tokens_per_s"] == pytest.approx(204 / 4.0)
    assert numbers["together_first_token_ms"] == pytest.approx(750)
    assert numbers["together_token_p95_ms"] == pytest.approx(2000)
    assert {quantity.name for quantity in QUANTITIES} | {"waited"} == set(numbers)


def test_quantiles_and_spreads():
    values = [float(n) for n in range(1, 101)]
    random.Random(0).shuffle(values)
    assert quantile(values, 0.95) == 95 and quantile([3.0], 0.95) == 3.0 and quantile([1.0, 2.0], 0.95) == 2.0
    assert spread([1234.56], 1) == "1,234.6" and spread([3.0, 1.0, 2.0], 0) == "2 (1-3)"


def test_table_picture_and_warning():
    numbers = numbers_of(MEASURED)
    found = {"oarsmith": [numbers, {**numbers, "peak_mb": 320.0}], "transformers": [numbers]}
    text = table(found, {"transformers": 0.5})
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "310 (300-320)" in text and "50%" in text
    assert disturbed(found) is None
    warning = disturbed({**found, "transformers": [{**numbers, "waited": 0.4}]})
    assert warning is not None and "transformers 40%" in warning and "oarsmith" not in warning
    assert draw(found, "a title").startswith(b"\x89PNG")


def test_same_tokens_counts_whole_answers():
    other = {"alone": {"answers": [answers(1, 2, 3), {**answers(1, 2, 3), "ids": [0, 1, 9]}]}}
    assert same_tokens(MEASURED, other) == 0.5


def test_what_peers_compute_in(model, tmp_path, monkeypatch):
    def dtype(stored, fast, *words):
        monkeypatch.setattr(bench, "has_fast_bf16", lambda device: fast)
        (tmp_path / "config.json").write_text(json.dumps({**json.loads((model / "config.json").read_text()), **stored}))
        return bench._dtype(configuration(model, *words), tmp_path)

    assert dtype({"torch_dtype": "bfloat16"}, True) == "bf16"
    assert dtype({"torch_dtype": "bfloat16"}, False) == "fp32"
    assert dtype({"torch_dtype": "float16"}, True, "--device=cpu") == "fp32"
    assert dtype({"torch_dtype": "float32"}, True) == "fp32"
    assert dtype({"torch_dtype": "float32"}, True, "--dtype=bf16") == "bf16"


def test_the_worker_imports_nothing_before_it_must():
    """What one engine imports must not be paid for by another: neither time nor memory."""
    code = "import sys; import oarsmith.jobs.bench_worker; print([n for n in ('torch', 'numpy') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert ran.stdout.strip() == "[]"
