"""What --help and explain print about keys."""

import pytest

from oarsmith.config.base import groups_of
from oarsmith.config.help import default_of, keys_help, kind_of, shown
from oarsmith.config.names import ALIASES, ALIASES_WHERE_FREE, VALUE_NAMES, VALUE_NOTES, aliases_of, nearest
from oarsmith.config.registry import CONFIG_CLASSES, config_class
from oarsmith.config.sft import SftConfig


@pytest.mark.parametrize("job", CONFIG_CLASSES)
def test_every_key_is_described_and_listed_once(job):
    keys_class = config_class(job)
    assert keys_class.command == job
    listed = [key for keys in groups_of(keys_class).values() for key in keys]
    assert sorted(listed) == sorted(keys_class.model_fields)
    text = keys_help(keys_class)
    for key, field in keys_class.model_fields.items():
        assert field.description and field.description.endswith("."), key
        assert f"--{key} <" in text
    assert set(keys_class.positional) <= set(keys_class.model_fields)


def test_kinds_and_defaults():
    assert kind_of(SftConfig, "lora") == "true|false"
    assert kind_of(SftConfig, "learning_rate") == "number"
    assert kind_of(SftConfig, "save_total_limit") == "whole number"
    assert kind_of(SftConfig, "train_on") == "assistant|last|all"
    assert kind_of(SftConfig, "lora_target_modules") == "text or list"
    assert default_of(SftConfig, "model_name_or_path") == "required"
    assert default_of(SftConfig, "learning_rate") == "not given"
    assert shown(True) == "true" and shown(("a",)) == '["a"]' and shown(2e-5) == "2e-05" and shown("") == "''"
    assert shown("\n") == r"'\n'"


def test_lines_fit():
    assert max(map(len, keys_help(SftConfig, width=80).splitlines())) <= 110


def test_names_point_to_keys_that_exist():
    keys = {key for job in CONFIG_CLASSES for key in config_class(job).model_fields}
    assert set(ALIASES.values()) | set(ALIASES_WHERE_FREE.values()) <= keys
    assert {key for key, _ in VALUE_NAMES} <= keys
    assert set(VALUE_NOTES) <= set(VALUE_NAMES)
    assert "eval_strategy" in aliases_of("evaluation_strategy", SftConfig.model_fields)


def test_nearest():
    assert nearest("lora-rnk", SftConfig.model_fields) == "lora_rank"
    assert nearest("zzz", SftConfig.model_fields) is None
