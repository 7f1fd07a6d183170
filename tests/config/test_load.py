"""From file and command line to a configuration: layers, names, refusals, provenance."""

import json

import pytest

from oarsmith.config.inference import GenerateConfig
from oarsmith.config.load import check_keys, load_config
from oarsmith.config.sft import SftConfig
from oarsmith.config.tools import PreviewConfig
from oarsmith.errors import ConfigError

NEEDED = ["--model_name_or_path", "model", "--dataset_name_or_path", "rows"]


def write(folder, text, name="config.json"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text, indent=1), encoding="utf-8")
    return path


def sft(*words, path=None):
    return load_config(SftConfig, path, [*NEEDED, *words])


def test_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path):
    path = write(tmp_path, {"learning_rate": 3e-5, "logging_steps": 5, "model_name_or_path": "m"})
    resolved = load_config(SftConfig, path, ["--dataset_name_or_path", "rows", "--logging_steps", "7"])
    assert resolved.config.learning_rate == 3e-5
    assert resolved.config.logging_steps == 7
    assert resolved.config.save_steps == 500
    assert resolved.provenance["learning_rate"] == f"{path}:2"
    assert resolved.provenance["logging_steps"] == "command line"
    assert resolved.provenance["save_steps"] == "default"
    assert resolved.provenance["eval_steps"] == "derived (as logging_steps)"
    assert set(resolved.provenance) == set(SftConfig.model_fields)


def test_yaml_and_json_give_the_same(tmp_path):
    text = "model_name_or_path: m\ndataset_name_or_path: d\nlearning_rate: 1e-5\nlora: yes\nevaluation_strategy: no\n"
    values = {"model_name_or_path": "m", "dataset_name_or_path": "d", "learning_rate": 1e-5, "lora": 1}
    from_yaml = load_config(SftConfig, write(tmp_path, text, "a.yaml"))
    from_json = load_config(SftConfig, write(tmp_path, {**values, "evaluation_strategy": "no"}))
    assert from_yaml.config == from_json.config
    assert from_yaml.provenance["lora"].endswith("a.yaml:4")


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("train_dataset_path", "dataset_name_or_path", "rows"),
        ("eval_strategy", "evaluation_strategy", "steps"),
        ("max_seq_length", "max_length", 512),
        ("gradient_checkpointing", "recompute", True),
        ("use_rslora", "rslora", True),
    ],
)
def test_other_names(tmp_path, name, key, value):
    path = write(tmp_path, {"model_name_or_path": "m", "dataset_name_or_path": "rows", "lora": True} | {name: value})
    if key == "dataset_name_or_path":
        path = write(tmp_path, {"model_name_or_path": "m", name: value})
    resolved = load_config(SftConfig, path)
    assert dict(resolved.config)[key] == value
    assert resolved.provenance[key].endswith(f"(as {name})")


def test_max_length_of_the_predictor_is_the_answer():
    assert load_config(GenerateConfig, None, ["m", "hi", "--max_length", "9"]).config.max_new_tokens == 9
    assert sft("--max_length", "9").config.max_length == 9


def test_two_names_of_one_key_must_agree(tmp_path):
    path = write(tmp_path, {"eval_strategy": "no", "evaluation_strategy": "steps"})
    with pytest.raises(ConfigError, match="'eval_strategy' and 'evaluation_strategy' are the same key"):
        sft(path=path)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lerning_rate", "learning_rate"), ("lora_ranks", "lora_rank"), ("use_flash_atention", "use_flash_attention")],
)
def test_unknown_key_names_the_nearest_and_the_place(tmp_path, wrong, right):
    path = write(tmp_path, {"seed": 1, wrong: 1})
    with pytest.raises(ConfigError) as caught:
        sft(path=path)
    assert caught.value.what == f"unknown key '{wrong}'"
    assert caught.value.where == f"{path}:3"
    assert caught.value.fix == f"did you mean '{right}'?"


def test_unknown_key_without_a_near_one():
    with pytest.raises(ConfigError) as caught:
        sft("--qqqq", "1")
    assert caught.value.where == "command line"
    assert "oarsmith sft --help" in caught.value.fix


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "fast"], "learning_rate = 'fast': must be a number"),
        (["--learning_rate", "0"], "learning_rate = '0': must be greater than 0"),
        (["--logging_steps", "2.5"], "logging_steps = '2.5': must be a whole number"),
        (["--train_on", "assistent"], "did you mean 'assistant'"),
        (["--lora", "--zero_padding=perhaps"], "zero_padding = 'perhaps': must be true or false"),
        (
            ["--lr_scheduler_type", "polynomal"],
            "must be linear or cosine or polynomial or constant",
        ),
    ],
)
def test_wrong_values(words, message):
    with pytest.raises(ConfigError, match="command line") as caught:
        sft(*words)
    assert message in str(caught.value)


def test_missing_key_says_what_it_is():
    with pytest.raises(ConfigError, match="'dataset_name_or_path' is required: Training rows"):
        load_config(SftConfig, None, ["model"])


def test_null_means_not_given(tmp_path):
    path = write(tmp_path, {"save_total_limit": 3, "disable_tqdm": None, "learning_rate": None})
    resolved = sft("--save_total_limit", "null", path=path)
    assert resolved.config.save_total_limit is None
    assert resolved.config.disable_tqdm is False
    assert resolved.config.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ('{"seed": 1,}', "c.json", "not valid JSON"),
        ('{"seed": 1, "seed": 2}', "c.json", "given twice: seed"),
        ("[1]", "c.json", "not a mapping"),
        ("seed: 1\nseed: 2\n", "c.yaml", "'seed' is given twice"),
        ("seed: [1\n", "c.yml", "not valid YAML"),
        ("- 1\n", "c.yaml", "not a mapping"),
    ],
)
def test_broken_files(tmp_path, text, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sft(path=write(tmp_path, text, name))
    assert name in caught.value.where


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        sft(path=tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        sft(path=tmp_path / "binary.json")


def test_values_that_need_a_word(tmp_path):
    resolved = sft(path=write(tmp_path, {"report_to": ["visualdl"], "metric_for_best_model": "eval_loss"}))
    assert resolved.config.report_to == ("tensorboard",)
    assert resolved.config.metric_for_best_model == "loss"
    assert len(resolved.notes) == 1 and "VisualDL" in resolved.notes[0]


def test_keys_of_jobs_that_do_not_exist_yet():
    with pytest.raises(ConfigError, match="'beta' belongs to 'oarsmith dpo'"):
        sft("--beta", "0.1")


def test_preview_reads_the_files_of_sft(tmp_path):
    path = write(
        tmp_path, {"model_name_or_path": "m", "dataset_name_or_path": "d", "learning_rate": 1e-5, "bf16": True}
    )
    resolved = load_config(PreviewConfig, path, ["--count", "2"])
    assert resolved.config.count == 2
    assert set(resolved.without_effect) == {"learning_rate", "bf16"}
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(PreviewConfig, path, ["--kount", "2"])


def test_check_keys_ignores_values_only():
    check_keys(SftConfig, ["MODEL", "DATA", "--learning_rate", "LR", "--bf16"])
    with pytest.raises(ConfigError, match="unknown key"):
        check_keys(SftConfig, ["MODEL", "--lerning_rate", "LR"])
