"""Values that follow from other values."""

import pytest

from oarsmith.config.derive import RULES, rule_for
from oarsmith.config.inference import GenerateConfig
from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig


def sft(*words):
    return load_config(SftConfig, None, ["m", "d", *words]).config


def test_learning_rate_and_alpha_follow_lora():
    assert sft().learning_rate == 2e-5 and sft().lora_alpha is None
    assert sft("--lora").learning_rate == 2e-4
    assert sft("--lora", "--lora_rank", "16").lora_alpha == 32
    assert sft("--lora", "--rslora").lora_alpha == 4
    assert sft("--lora", "--lora_alpha", "7", "--learning_rate", "1").lora_alpha == 7


def test_evaluation_follows_the_eval_data():
    assert sft().evaluation_strategy == "no" and sft().do_eval is False
    assert sft("--eval_split_ratio", "0.1").evaluation_strategy == "epoch"
    assert sft("--eval_dataset_path", "dev.jsonl").do_eval is True
    assert sft("--eval_split_ratio", "0.1", "--evaluation_strategy", "steps", "--logging_steps", "4").eval_steps == 4


def test_small_ones():
    config = sft("--metric_for_best_model", "accuracy", "--output_dir", "out")
    assert config.greater_is_better is True
    assert sft().greater_is_better is False
    assert config.logging_dir == "out/tensorboard"
    assert config.tokenizer_name_or_path == "m"


@pytest.mark.parametrize(
    ("words", "strategy", "temperature"),
    [
        ([], "greedy", None),
        (["--temperature", "0"], "greedy", 0),
        (["--temperature", "0.3"], "sampling", 0.3),
        (["--top_k", "5"], "sampling", 0.7),
        (["--decode_strategy", "sampling"], "sampling", 0.7),
        (["--decode_strategy", "greedy_search"], "greedy", None),
    ],
)
def test_decode_strategy(words, strategy, temperature):
    config = load_config(GenerateConfig, None, ["m", "hi", *words]).config
    assert (config.decode_strategy, config.temperature) == (strategy, temperature)


def test_rules_are_for_optional_keys_that_exist():
    for rule in RULES:
        assert rule.keys.model_fields[rule.key].default is None, rule.key
    assert rule_for(SftConfig, "learning_rate") is not None
    assert rule_for(SftConfig, "seed") is None
