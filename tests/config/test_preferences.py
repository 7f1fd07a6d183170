"""Keys of the data of preference training: PaddleNLP's and TRL's names, and what cannot be."""

import pytest

from oarsmith.config.load import load_config
from oarsmith.config.preferences import PreferenceDataKeys, StepKeys
from oarsmith.errors import ConfigError


def test_other_names(tmp_path):
    file = tmp_path / "dpo.json"
    file.write_text(
        '{"train_dataset_path": "a.jsonl", "dev_dataset_path": "b.jsonl", "max_seq_len": 512, "max_prompt_len": 200,'
        ' "greedy_zero_padding": true, "lazy": false}'
    )
    resolved = load_config(PreferenceDataKeys, file)
    config = resolved.config
    assert (config.dataset_name_or_path, config.eval_dataset_path) == ("a.jsonl", "b.jsonl")
    assert (config.max_length, config.max_prompt_len, config.zero_padding) == (512, 200, True)
    assert list(resolved.without_effect) == ["lazy"]
    assert load_config(PreferenceDataKeys, file, ["--max_prompt_length", "100"]).config.max_prompt_len == 100
    assert load_config(StepKeys, None, ["--placeholder_token", "ки"]).config.step_separator == "ки"


def test_no_room_for_answers():
    words = ["--dataset_name_or_path", "a.jsonl", "--max_length", "512", "--max_prompt_len", "512"]
    with pytest.raises(ConfigError, match="max_prompt_len 512 leaves no room for answers in max_length 512"):
        load_config(PreferenceDataKeys, None, words)
    assert load_config(PreferenceDataKeys, None, words[:4]).config.max_prompt_len is None
