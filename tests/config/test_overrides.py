"""Command-line words to keys and values."""

import pytest

from oarsmith.config.inference import GenerateConfig
from oarsmith.config.overrides import parse_overrides
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError


def parsed(config_class, *words):
    return {entry.name: entry.value for entry in parse_overrides(config_class, words)}


def test_the_three_forms():
    words = ["--learning_rate", "1e-5", "--max_steps=-1", "--lora", "--warmup_steps", "-3"]
    assert parsed(SftConfig, *words) == {
        "learning_rate": "1e-5",
        "max_steps": "-1",
        "lora": "true",
        "warmup_steps": "-3",
    }


def test_a_switch_takes_only_a_word_that_says_true_or_false():
    assert parsed(SftConfig, "--lora", "model") == {"lora": "true", "model_name_or_path": "model"}
    assert parsed(SftConfig, "--bf16", "model") == {"bf16": "true", "model_name_or_path": "model"}
    assert parsed(SftConfig, "--lora", "0", "model") == {"lora": "0", "model_name_or_path": "model"}
    assert parsed(SftConfig, "--do_eval", "--lora=false") == {"do_eval": "true", "lora": "false"}


def test_values_may_hold_anything_after_an_equals_sign():
    assert parsed(GenerateConfig, "m", "--prompt=--key=value")["prompt"] == "--key=value"


def test_dashes_count_as_underscores():
    assert parse_overrides(SftConfig, ["--learning-rate", "1"])[0].name == "learning-rate"
    with pytest.raises(ConfigError, match="'learning_rate' is given twice"):
        parse_overrides(SftConfig, ["--learning-rate", "1", "--learning_rate", "2"])


def test_repeated_keys_make_a_list_where_one_is_taken():
    assert parsed(GenerateConfig, "--stop", "a", "--stop", "b", "--stop=c")["stop"] == ["a", "b", "c"]


def test_words_without_a_key():
    assert parsed(GenerateConfig, "model", "what is it?") == {"model_name_or_path": "model", "prompt": "what is it?"}
    with pytest.raises(ConfigError, match="cannot place 'third'"):
        parse_overrides(GenerateConfig, ["model", "prompt", "third"])


def test_a_key_that_needs_a_value():
    with pytest.raises(ConfigError, match="--learning_rate needs a value"):
        parse_overrides(SftConfig, ["--learning_rate", "--lora"])
