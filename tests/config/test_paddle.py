"""PaddleNLP's own files: every key is honoured, listed as without effect, or refused with a reason."""

import json
from pathlib import Path

import pytest

from oarsmith.config.load import load_config
from oarsmith.config.names import canonical_key
from oarsmith.config.paddle import NOT_BUILT, OTHER_JOBS, WITHOUT_EFFECT, refusal
from oarsmith.config.registry import CONFIG_CLASSES, config_class
from oarsmith.config.sft import SftConfig
from oarsmith.config.switches import SWITCHES
from oarsmith.errors import ConfigError

FILES = sorted((Path(__file__).parents[1] / "fixtures" / "configs").glob("*.json"))
SFT_FILE = next(path for path in FILES if "sft" in path.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_the_shipped_files_is_known(path):
    assert len(FILES) == 3
    known = {*SftConfig.model_fields, *SWITCHES, *WITHOUT_EFFECT, *NOT_BUILT, *OTHER_JOBS}
    for key in json.loads(path.read_text()):
        assert canonical_key(key, SftConfig.model_fields) in known, key


def test_the_sft_file_runs_once_its_two_requests_are_taken_back():
    with pytest.raises(ConfigError, match="fp16"):
        load_config(SftConfig, SFT_FILE)
    with pytest.raises(ConfigError, match="sharded data parallelism is not built yet") as caught:
        load_config(SftConfig, SFT_FILE, ["--dtype", "bf16"])
    line = next(n for n, text in enumerate(SFT_FILE.read_text().splitlines(), start=1) if '"sharding"' in text)
    assert caught.value.where == f"{SFT_FILE}:{line}"
    resolved = load_config(SftConfig, SFT_FILE, ["--dtype", "bf16", "--sharding", ""])
    config = resolved.config
    assert (config.max_length, config.src_length, config.num_train_epochs) == (2048, 1024, 3.0)
    assert (config.learning_rate, config.dtype, config.metric_for_best_model) == (3e-5, "bf16", "accuracy")
    assert "use_flash_attention" in resolved.without_effect
    given = set(json.loads(SFT_FILE.read_text()))
    honoured = {key for key in given if key in SftConfig.model_fields}
    neutral = {key for key in given if key in NOT_BUILT} | {"fp16"}
    assert given == honoured | set(resolved.without_effect) | neutral


@pytest.mark.parametrize(
    ("key", "neutral", "asking"),
    [
        ("tensor_parallel_degree", [1, -1, "", "1", None], 8),
        ("sharding", ["", None, "none"], "stage1"),
        ("sequence_parallel", [0, False, "false"], 1),
        ("recompute_granularity", ["full"], "core_attn"),
        ("weight_quantize_algo", [None, ""], "nf4"),
        ("no_recompute_layers", [[], None], [0, 1]),
    ],
)
def test_neutral_values_pass_and_requests_stop(tmp_path, key, neutral, asking):
    for value in neutral:
        assert refusal(key, value) is None
    path = tmp_path / "c.json"
    path.write_text(json.dumps({key: asking}))
    with pytest.raises(ConfigError, match="not built yet") as caught:
        load_config(SftConfig, path, ["m", "d"])
    assert caught.value.fix


def test_no_name_stands_in_two_tables():
    ours = {key for job in CONFIG_CLASSES for key in config_class(job).model_fields}
    tables = [ours, set(WITHOUT_EFFECT), set(NOT_BUILT), set(OTHER_JOBS), set(SWITCHES)]
    for index, table in enumerate(tables):
        for other in tables[index + 1 :]:
            assert not table & other
