"""``oarsmith sft`` from its words to its files, read by transformers and peft; and what it says when it cannot run."""

import json
import shutil

import pytest
import torch
import transformers
from peft import PeftModel

import oarsmith
from oarsmith import cli
from tiny import CONFIGS, read_lines, run_sft, write_rows, write_tiny_model

KEYS = {"max_length": 64, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-2}
IDS = torch.arange(7, 60)[None]


@pytest.fixture(autouse=True)
def _one_thread(few_threads):
    """Tiny matrices."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of each family and rows."""
    place = tmp_path_factory.mktemp("sft")
    for family in CONFIGS:
        write_tiny_model(place / family, family)
    write_rows(place / "rows.jsonl")
    return place


def logits(model):
    with torch.no_grad():
        found = model.eval()(IDS)
    return found if isinstance(found, torch.Tensor) else found.logits


@pytest.mark.parametrize("family", CONFIGS)
def test_full(folder, tmp_path, capsys, family):
    assert run_sft(folder / family, folder / "rows.jsonl", tmp_path / "run", **KEYS) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    ours = logits(oarsmith.load_model(tmp_path / "run"))
    assert (ours - logits(theirs)).abs().max() < 1e-4
    assert (ours - logits(oarsmith.load_model(folder / family))).abs().max() > 1e-2, "it was trained"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False).startswith("<|im_start|>")
    out = capsys.readouterr().out
    assert "24 rows read, 24 kept, 0 left out" in out
    assert "training all; weights in float32; 1 thread" in out
    assert f"next:   oarsmith chat {tmp_path / 'run'}" in out


@pytest.mark.parametrize("family", CONFIGS)
def test_lora(folder, tmp_path, capsys, family):
    keys = KEYS | {"lora": True, "lora_rank": 4}
    assert run_sft(folder / family, folder / "rows.jsonl", tmp_path / "run", **keys) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    ours = logits(oarsmith.load_model(tmp_path / "run"))
    assert (ours - logits(theirs)).abs().max() < 1e-4
    assert (ours - logits(oarsmith.load_model(folder / family))).abs().max() > 1e-2, "it was trained"
    assert f"oarsmith merge-adapter {tmp_path / 'run'}" in capsys.readouterr().out


def test_files_of_a_run(folder, tmp_path):
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **KEYS, eval_split_ratio=0.2) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"run.json", "log.jsonl", "timing.jsonl", "data_report.json", "environment.json", "report.html"}
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["learning_rate"], run["device"], run["dtype"]) == (1e-2, "cpu", "fp32")
    assert "eval_loss" in read_lines(tmp_path / "run" / "log.jsonl")[-1]


def test_the_saved_configuration_alone_replays_the_run(folder, tmp_path):
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "one", **KEYS) == 0
    assert cli.main(["sft", str(tmp_path / "one" / "run.json"), "--output_dir", str(tmp_path / "two")]) == 0
    for name in ("log.jsonl", "model/model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_evaluating_only(folder, tmp_path, capsys):
    keys = KEYS | {"do_train": False, "eval_split_ratio": 0.5}
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys) == 0
    assert "eval:   loss 7." in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_the_default_length_is_the_models(folder, tmp_path):
    keys = {key: value for key, value in KEYS.items() if key != "max_length"}
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["max_length"] == 256


def test_what_only_the_machine_can_tell(folder, tmp_path, capsys, monkeypatch):
    """The device is auto when the keys are read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keys = {"max_length": 64, "max_steps": 1, "offload_optim": True}
    assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys) == 0
    captured = capsys.readouterr()
    assert captured.out.count("note: offload_optim has no effect: on a CPU") == 1
    assert "offload_optim" not in captured.err


def rows_with(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_brackets_in_names_are_printed_as_they_are(folder, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows[bold].jsonl")
    assert run_sft(folder / "llama", rows, tmp_path / "run", **KEYS) == 0
    assert "rows[bold].jsonl: 24 rows read" in capsys.readouterr().out


class TestMessages:
    """Exit status 2, the place, and what to do."""

    def failing(self, capsys, model, rows, output_dir, **keys):
        assert run_sft(model, rows, output_dir, **KEYS | keys) == 2
        assert not output_dir.exists(), "nothing is written before the run can start"
        return capsys.readouterr().err

    def test_missing_model(self, folder, tmp_path, capsys):
        message = self.failing(capsys, tmp_path / "nowhere", folder / "rows.jsonl", tmp_path / "run")
        assert "no such directory" in message
        assert str(tmp_path / "nowhere") in message

    def test_missing_data_names_the_nearest_file(self, folder, tmp_path, capsys):
        message = self.failing(capsys, folder / "llama", folder / "row.jsonl", tmp_path / "run")
        assert "no such file" in message
        assert "rows.jsonl" in message

    def test_malformed_row(self, folder, tmp_path, capsys):
        rows = rows_with(tmp_path / "rows.jsonl", '{"src": "a", "tgt": "b"}', '{"src": "a", "tgt": ')
        assert f"{rows}:2" in self.failing(capsys, folder / "llama", rows, tmp_path / "run")

    def test_wrong_field(self, folder, tmp_path, capsys):
        rows = rows_with(tmp_path / "rows.jsonl", '{"src": "a", "tgt": "b"}', '{"src": 3, "tgt": "b"}')
        message = self.failing(capsys, folder / "llama", rows, tmp_path / "run")
        assert f"{rows}:2" in message
        assert "'src' is the number 3" in message

    def test_rows_without_trained_tokens(self, folder, tmp_path, capsys):
        rows = rows_with(tmp_path / "rows.jsonl", '{"src": "a", "tgt": ""}', '{"src": "b", "tgt": ""}')
        message = self.failing(capsys, folder / "llama", rows, tmp_path / "run")
        assert "no token would be trained: 2 rows read, 0 kept" in message
        assert f"{rows}:1" in message

    def test_unknown_key(self, folder, tmp_path, capsys):
        message = self.failing(capsys, folder / "llama", folder / "rows.jsonl", tmp_path / "run", lerning_rate=1)
        assert "unknown key 'lerning_rate'" in message
        assert "did you mean 'learning_rate'?" in message

    def test_longer_than_the_model(self, folder, tmp_path, capsys):
        message = self.failing(capsys, folder / "llama", folder / "rows.jsonl", tmp_path / "run", max_length=300)
        assert "max_length 300 is longer than the model's context of 256 tokens" in message

    def test_lora_on_nothing(self, folder, tmp_path, capsys):
        keys = {"lora": True, "lora_target_modules": "query"}
        message = self.failing(capsys, folder / "llama", folder / "rows.jsonl", tmp_path / "run", **keys)
        assert "query selects no projection of this model" in message
        assert "q_proj" in message

    def test_training_an_adapter(self, folder, tmp_path, capsys):
        keys = KEYS | {"lora": True, "max_steps": 1}
        assert run_sft(folder / "llama", folder / "rows.jsonl", tmp_path / "first", **keys) == 0
        message = self.failing(capsys, tmp_path / "first", folder / "rows.jsonl", tmp_path / "run")
        assert "is an adapter" in message
        assert "oarsmith merge-adapter" in message

    def test_a_model_directory_as_output(self, folder, capsys):
        assert run_sft(folder / "llama", folder / "rows.jsonl", folder / "gpt2", **KEYS) == 2
        assert "holds a model, not a run" in capsys.readouterr().err
        assert not (folder / "gpt2" / "run.json").exists()


def test_a_tokenizer_of_another_model(folder, tmp_path, capsys):
    """Rows whose ids the embedding does not have are refused before anything is trained."""
    small = write_tiny_model(tmp_path / "small", "llama", vocab_size=40)
    for path in (folder / "llama").glob("tokenizer*"):
        shutil.copy(path, small)
    assert run_sft(small, folder / "rows.jsonl", tmp_path / "run", **KEYS) == 2
    message = capsys.readouterr().err
    assert "is outside the model's vocabulary of 40" in message and "rows.jsonl:" in message


def test_evaluation_by_generation(tmp_path, capsys):
    model = write_tiny_model(tmp_path / "model")
    keys = {"eval_with_do_generation": True, "save_generation_output": True, "eval_split_ratio": 0.2, "max_steps": 2}
    keys |= {"evaluation_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "bleu4", "max_length": 64}
    assert run_sft(model, write_rows(tmp_path / "rows.jsonl"), tmp_path / "run", **keys) == 0
    record = next(line for line in read_lines(tmp_path / "run" / "log.jsonl") if "eval_bleu4" in line)
    assert {"eval_bleu4", "eval_rouge1", "eval_rouge2", "eval_rougel", "eval_loss"} <= record.keys()
    answers = read_lines(tmp_path / "run" / "generated_output.json")
    assert answers and {"output", "tgt"} == answers[0].keys()
    assert all(answer["tgt"].startswith("It is ") for answer in answers)
    assert "bleu4" in capsys.readouterr().out
