"""``oarsmith eval``: perplexity, rows with answers and tasks, against transformers and the harness itself."""

import json
import math

import pytest
import torch
import transformers

import oarsmith
from harness_tasks import write_task
from oarsmith import cli
from tiny import run_sft, write_rows, write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog. " * 20 + "Größe 你好."


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("eval") / "model")


def evaluate(path, *words, code=0):
    command = ["eval", str(path), *map(str, words), "--num_threads", "1", "--dtype", "fp32"]
    assert cli.main(command) == code


def guide(path, ids, max_length, stride):
    """(nats, tokens): the windows of transformers' guide, each token's own log-probability."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    nats, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0, :-1].log_softmax(-1)
        logprobs = logits.gather(1, torch.tensor(ids[begin + 1 : end])[:, None])[:, 0]
        kept = logprobs[-(end - previous) :] if begin else logprobs
        nats, count, previous = nats - float(kept.sum()), count + len(kept), end
        if end == len(ids):
            return nats, count
    raise AssertionError("the windows reach the end")


def test_perplexity_of_a_text(path, tmp_path, capsys):
    file, output = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text(TEXT, encoding="utf-8")
    evaluate(path, file, "--max_length", 64, "--stride", 24, "--output_file", output)
    ids = oarsmith.load_tokenizer(path).encode(TEXT)
    nats, count = guide(path, ids, 64, 24)
    found = json.loads(output.read_text())
    assert found["num_tokens"] == count == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert f"perplexity {found['perplexity']:.4f}" in capsys.readouterr().out


def test_the_windows_when_nothing_is_said(path, tmp_path):
    file, output = tmp_path / "text.txt", tmp_path / "out.json"
    file.write_text(TEXT, encoding="utf-8")
    evaluate(path, file, "--output_file", output)
    found = json.loads(output.read_text())
    assert (found["max_length"], found["stride"]) == (256, 128), "the model's context, and half of it"


def test_documents_are_apart(path, tmp_path):
    file, output = tmp_path / "documents.jsonl", tmp_path / "out.json"
    texts = ["One document.", "Another one, a little longer than that.", "x"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    evaluate(path, file, "--output_file", output)
    tokenizer = oarsmith.load_tokenizer(path)
    parts = [guide(path, tokenizer.encode(text), 256, 128) for text in texts[:2]]
    found = json.loads(output.read_text())
    assert found["num_texts"] == 3
    assert found["loss"] == pytest.approx(sum(nats for nats, _ in parts) / sum(count for _, count in parts), rel=1e-5)


def test_rows_as_a_training_run_evaluates_them(path, tmp_path, capsys):
    """The same loss and accuracy that ``sft`` with do_train false gives."""
    rows, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out.json"
    evaluate(path, rows, "--output_file", output, "--max_length", 128)
    found = json.loads(output.read_text())
    capsys.readouterr()
    keys = {"do_train": "false", "eval_dataset_path": rows, "max_length": 128}
    assert run_sft(path, rows, tmp_path / "run", **keys) == 0
    out = capsys.readouterr().out
    assert f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}" in out
    assert f"token accuracy {found['accuracy']:.1%}" in out


def test_rows_by_generation(path, tmp_path, capsys):
    rows, output = write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out.json"
    evaluate(path, rows, "--eval_with_do_generation", "--max_new_tokens", 4, "--output_file", output)
    found = json.loads(output.read_text())
    assert 0 <= found["bleu4"] <= found["rouge1"] <= 1
    assert "3 answers generated: bleu4" in capsys.readouterr().out


def test_a_run_folder_and_its_adapter(path, tmp_path):
    rows, output = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out.json"
    keys = {"max_length": 64, "max_steps": 3, "save_strategy": "no", "lora": True, "learning_rate": 1e-2}
    assert run_sft(path, rows, tmp_path / "run", **keys) == 0
    evaluate(tmp_path / "run", rows, "--output_file", output)
    trained = json.loads(output.read_text())["loss"]
    evaluate(path, rows, "--output_file", output)
    assert trained < json.loads(output.read_text())["loss"]


# The harness takes seconds to look through its own thousands of tasks.
@pytest.mark.parametrize("chat", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_tasks_of_the_harness(path, tmp_path, capsys, chat):
    """The numbers that the harness computes with its own class for transformers."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    write_task(tmp_path)
    output = tmp_path / "out.json"
    words = ["--tasks", "tiny_choice,tiny_answer", "--include_path", tmp_path, "--limit", 3, "--num_fewshot", 0]
    evaluate(path, *words, "--output_file", output, "--apply_chat_template", chat)
    found = json.loads(output.read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(path), batch_size=1)
    expected = lm_eval.simple_evaluate(
        theirs,
        tasks=["tiny_choice", "tiny_answer"],
        limit=3,
        num_fewshot=0,
        apply_chat_template=chat,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]
    assert found["results"].keys() == expected.keys()
    for task, numbers in expected.items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    assert found["n-samples"]["tiny_choice"]["effective"] == 3
    assert "|tiny_choice|" in capsys.readouterr().out


MISTAKES = {
    "neither": ([], "give a file or tasks"),
    "both": (["x.txt", "--tasks", "a"], "give a file or tasks"),
    "only for tasks": (["x.txt", "--num_fewshot", "2"], "are for tasks"),
    "stride too long": (["x.txt", "--max_length", "8", "--stride", "9"], "stride 9 is longer"),
    "beyond the context": (["rows.jsonl", "--max_length", "999"], "longer than the model's context of 256"),
    "no such text": (["nothing.txt"], "no such file"),
    "no such rows": (["nothing.jsonl"], "nothing.jsonl"),
    "empty": (["empty.txt"], "shorter than two tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(path, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "empty.txt").write_text("")
    words, message = MISTAKES[name]
    evaluate(path, *words, code=2)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_an_unknown_task(path, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    evaluate(path, "--tasks", "no_such_task", "--include_path", write_task(tmp_path), code=2)
    assert "there is no task 'no_such_task'" in capsys.readouterr().err


def test_malformed_rows_are_counted(path, tmp_path, capsys):
    file, output = tmp_path / "documents.jsonl", tmp_path / "out.json"
    file.write_text('{"text": "One document of words."}\nnot json\n')
    evaluate(path, file, code=2)
    assert ":2" in capsys.readouterr().err
    evaluate(path, file, "--on_malformed", "skip", "--output_file", output)
    assert json.loads(output.read_text())["left_out"] == 1
    assert "1 malformed left out" in capsys.readouterr().out
