"""The saved configuration alone replays the run."""

import json

import pytest

from oarsmith.config.inference import ChatConfig, GenerateConfig
from oarsmith.config.load import load_config
from oarsmith.config.resolved import RUN_FILE
from oarsmith.config.sft import SftConfig
from oarsmith.config.tools import PreviewConfig
from oarsmith.errors import ConfigError


@pytest.mark.parametrize(
    ("config_class", "words"),
    [
        (SftConfig, ["m", "d"]),
        (
            SftConfig,
            ["m", "d", "--lora", "--lora_target_modules", "q_proj,v_proj", "--bf16", "--eval_split_ratio", "0.1"],
        ),
        (SftConfig, ["m", "d", "--lora", "--lora_target_modules", r".*\.q_proj", "--greedy_zero_padding"]),
        (GenerateConfig, ["m", "häé\n", "--stop", "a", "--stop", "b,c", "--top_k", "3"]),
        (ChatConfig, ["m"]),
    ],
)
def test_saved_and_loaded_is_identical(tmp_path, config_class, words):
    first = load_config(config_class, None, words)
    first.save(tmp_path / "deep" / "c.json")
    again = load_config(config_class, tmp_path / "deep" / "c.json")
    assert again.config == first.config
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.json"], "no temporary file is left"
    again.save(tmp_path / "again.json")
    assert load_config(config_class, tmp_path / "again.json").config == first.config


def test_replay_says_where_a_value_came_from_the_first_time(tmp_path):
    path = tmp_path / "c.json"
    load_config(SftConfig, None, ["m", "d", "--seed", "7"]).save(path)
    replay = load_config(SftConfig, path, ["--logging_steps", "3"])
    assert replay.provenance["seed"].startswith(str(path))
    assert replay.provenance["seed"].endswith("saved from: command line")
    assert replay.provenance["logging_steps"] == "command line"


def test_a_run_folder_stands_for_its_configuration(tmp_path):
    load_config(SftConfig, None, ["m", "d", "--seed", "7"]).save(tmp_path / RUN_FILE)
    assert load_config(SftConfig, tmp_path).config.seed == 7


def test_settle_fixes_what_the_machine_decided(tmp_path):
    resolved = load_config(SftConfig, None, ["m", "d"]).settle("auto: this CPU has bf16", dtype="bf16", device="cpu")
    assert resolved.provenance["dtype"] == "derived (auto: this CPU has bf16)"
    resolved.save(tmp_path / "c.json")
    assert load_config(SftConfig, tmp_path / "c.json").config.dtype == "bf16"


def test_a_saved_run_belongs_to_its_command(tmp_path):
    path = tmp_path / "c.json"
    load_config(SftConfig, None, ["m", "d"]).save(path)
    with pytest.raises(ConfigError, match="saved by 'oarsmith sft'"):
        load_config(ChatConfig, path)
    assert load_config(PreviewConfig, path).config.dataset_name_or_path == "d"


def test_saved_file_is_flat_and_complete(tmp_path):
    path = tmp_path / "c.json"
    load_config(SftConfig, None, ["m", "d"]).save(path)
    saved = json.loads(path.read_text())
    assert set(saved) == set(SftConfig.model_fields) | {"oarsmith"}
    assert saved["learning_rate"] == 2e-5
