"""bf16, fp16 and the other switches that set one of our keys."""

import json

import pytest

from oarsmith.config.load import load_config
from oarsmith.config.sft import SftConfig
from oarsmith.errors import ConfigError


def dtype_of(tmp_path, in_file, *words):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "dataset_name_or_path": "d", **in_file}))
    return load_config(SftConfig, path, words).config.dtype


@pytest.mark.parametrize(
    ("in_file", "words", "dtype"),
    [
        ({}, [], "auto"),
        ({"bf16": True, "fp16": False}, [], "bf16"),
        ({"bf16": 1}, [], "bf16"),
        ({"bf16": False, "fp16": False}, [], "fp32"),
        ({"fp16": False}, [], "auto"),
        ({"fp16": True}, ["--dtype", "bf16"], "bf16"),
        ({"fp16": True}, ["--bf16"], "bf16"),
        ({"fp16": True}, ["--fp16", "false"], "auto"),
        ({"dtype": "fp32"}, ["--bf16"], "bf16"),
        ({"bf16": True}, ["--dtype", "float32"], "fp32"),
        ({"bf16": True, "dtype": "auto"}, [], "bf16"),
        ({"bf16": True, "dtype": "bfloat16"}, [], "bf16"),
    ],
)
def test_what_decides_the_dtype(tmp_path, in_file, words, dtype):
    assert dtype_of(tmp_path, in_file, *words) == dtype


@pytest.mark.parametrize("in_file", [{"fp16": True, "fp16_opt_level": "O2"}, {"dtype": "fp16"}, {"dtype": "float16"}])
def test_fp16_has_one_name(tmp_path, in_file):
    assert dtype_of(tmp_path, in_file) == "fp16"


@pytest.mark.parametrize("in_file", [{"bf16": True, "fp16": True}, {"bf16": True, "dtype": "fp32"}])
def test_contradictions_in_one_layer(tmp_path, in_file):
    with pytest.raises(ConfigError, match="contradict"):
        dtype_of(tmp_path, in_file)


def test_a_switch_must_be_true_or_false(tmp_path):
    with pytest.raises(ConfigError, match="bf16 = 'some': must be true or false"):
        dtype_of(tmp_path, {"bf16": "some"})


def test_the_other_switches():
    words = ["m", "d", "--greedy_zero_padding", "--no_cuda"]
    resolved = load_config(SftConfig, None, words)
    assert resolved.config.zero_padding is True
    assert resolved.config.device == "cpu"
    assert resolved.provenance["device"] == "command line (as no_cuda)"
    unpacked = load_config(SftConfig, None, ["m", "d", "--zero_padding", "0", "--greedy_zero_padding", "0"])
    assert unpacked.config.zero_padding is False
    with pytest.raises(ConfigError, match="contradict"):
        load_config(SftConfig, None, ["m", "d", "--zero_padding=0", "--greedy_zero_padding"])


def test_long_sequence_strategies():
    words = ["m", "d", "--rope_scaling_factor", "4", "--strategy_name", "YaRNScalingRotaryEmbedding"]
    on = load_config(SftConfig, None, [*words, "--use_long_sequence_strategies", "true"]).config
    assert (on.rope_scaling_type, on.rope_scaling_factor) == ("yarn", 4.0)
    off = load_config(SftConfig, None, [*words, "--use_long_sequence_strategies", "false"]).config
    assert (off.rope_scaling_type, off.rope_scaling_factor) == ("none", 1.0)
