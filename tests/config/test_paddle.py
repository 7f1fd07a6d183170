"""PaddleNLP's own files: every key is honoured, listed as without effect, or refused with a reason."""

import json
from pathlib import Path

import pytest

from oarsmith.config.dpo import DpoConfig
from oarsmith.config.load import load_config
from oarsmith.config.names import canonical_key
from oarsmith.config.paddle import NOT_BUILT, WITHOUT_EFFECT, refusal
from oarsmith.config.policy import GrpoConfig
from oarsmith.config.ppo import PpoConfig
from oarsmith.config.pretrain import PretrainConfig
from oarsmith.config.registry import CONFIG_CLASSES, config_class
from oarsmith.config.sft import SftConfig
from oarsmith.config.switches import SWITCHES
from oarsmith.errors import ConfigError

FILES = sorted((Path(__file__).parents[1] / "fixtures" / "configs").glob("*.json"))
SFT_FILE = next(path for path in FILES if "sft" in path.name)
DPO_FILE = next(path for path in FILES if "dpo" in path.name)
PPO_FILE = next(path for path in FILES if "ppo" in path.name)
GRPO_FILE = PPO_FILE.with_name("qwen_grpo.yaml")
PRETRAIN_FILE = next(path for path in FILES if "pretrain" in path.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_the_shipped_files_is_known(path):
    assert len(FILES) == 4
    kinds = (SftConfig, PretrainConfig, DpoConfig, PpoConfig)
    ours = {key for kind in kinds for key in kind.model_fields}
    known = {*ours, *SWITCHES, *WITHOUT_EFFECT, *NOT_BUILT}
    for key in json.loads(path.read_text()):
        assert canonical_key(key, ours) in known, key


def test_the_dpo_file_runs_unchanged():
    resolved = load_config(DpoConfig, DPO_FILE)
    config = resolved.config
    assert (config.dataset_name_or_path, config.eval_dataset_path) == ("./data/train.jsonl", "./data/dev.jsonl")
    assert (config.max_length, config.max_prompt_len, config.loss_type) == (4096, 2048, ("sigmoid",))
    assert (config.beta, config.learning_rate, config.evaluation_strategy) == (0.1, 1e-6, "steps")
    given = set(json.loads(DPO_FILE.read_text()))
    with pytest.raises(ConfigError, match="the key 'beta' belongs to 'oarsmith dpo'"):
        load_config(SftConfig, DPO_FILE)
    assert {"tensor_parallel_degree", "flash_mask", "lazy"} <= set(resolved.without_effect) & given


def test_the_ppo_file_runs_unchanged():
    resolved = load_config(PpoConfig, PPO_FILE)
    config = resolved.config
    assert (config.model_name_or_path, config.rewards) == ("./models/sft", ("./models/reward",))
    assert (config.critic_model_name_or_path, config.critic, config.critic_recompute) == (
        "./models/reward",
        "separate",
        True,
    )
    assert (config.prompts_per_step, config.samples_per_prompt, config.max_new_tokens) == (2, 1, 1024)
    assert (config.kl_coeff, config.clip_range_value, config.ptx_coeff) == (0.02, 5.0, 16.0)
    assert (config.critic_learning_rate, config.normalize_reward) == (1.5e-6, True)
    assert {"use_fusemt", "eval_mode", "gradient_accumulation_steps"} <= set(resolved.without_effect)


def test_the_grpo_file_runs_unchanged():
    resolved = load_config(GrpoConfig, GRPO_FILE)
    config = resolved.config
    assert (config.algorithm, config.rewards) == ("grpo", ("http://127.0.0.1:8731",))
    assert (config.prompts_per_step, config.samples_per_prompt, config.prompts_per_update) == (4, 8, -1)
    assert (config.max_new_tokens, config.min_new_tokens, config.max_length) == (4096, 32, 4608)
    assert (config.kl_loss_coeff, config.clip_range_ratio_high, config.overlong_buffer) == (0.001, 0.2, 0)
    assert {"balance_batch", "clip_range_value", "per_device_logprob_batch_size"} <= set(resolved.without_effect)


def test_the_sft_file_runs_unchanged():
    resolved = load_config(SftConfig, SFT_FILE)
    config = resolved.config
    assert (config.max_length, config.src_length, config.num_train_epochs) == (2048, 1024, 3.0)
    assert (config.learning_rate, config.dtype, config.metric_for_best_model) == (3e-5, "fp16", "accuracy")
    assert {"use_flash_attention", "sharding"} <= set(resolved.without_effect)
    given = set(json.loads(SFT_FILE.read_text()))
    honoured = {key for key in given if key in SftConfig.model_fields}
    assert given == honoured | set(resolved.without_effect) | {"fp16"}


def test_the_pretraining_file_runs_unchanged():
    resolved = load_config(PretrainConfig, PRETRAIN_FILE)
    config = resolved.config
    assert (config.max_length, config.max_steps, config.gradient_accumulation_steps) == (4096, 10000, 16)
    assert (config.learning_rate, config.min_learning_rate, config.warmup_steps) == (3e-5, 3e-6, 30)
    assert (config.dtype, config.continue_training, config.do_predict) == ("bf16", False, True)
    assert (config.split, config.evaluation_strategy, config.eval_steps) == ("949,50,1", "steps", 1000)
    given = set(json.loads(PRETRAIN_FILE.read_text()))
    honoured = {key for key in given if key in PretrainConfig.model_fields}
    assert given == honoured | set(resolved.without_effect) | {"bf16", "max_seq_length"}


@pytest.mark.parametrize(
    ("key", "neutral", "asking"),
    [
        ("do_ceval", [0, False, "false"], 1),
        ("quant_type", [None, ""], "a8w8"),
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
    tables = [ours, set(WITHOUT_EFFECT), set(NOT_BUILT), set(SWITCHES)]
    for index, table in enumerate(tables):
        for other in tables[index + 1 :]:
            assert not table & other


def test_sharding_with_offload_is_two_keys(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"sharding": "stage2 offload", "tensor_parallel_degree": -1}))
    resolved = load_config(SftConfig, path, ["m", "d", "--device", "cuda"])
    config = resolved.config
    assert (config.sharding, config.offload_optim, config.tensor_parallel_degree) == ("stage2", True, 1)
    assert "sharding" in resolved.without_effect
    path.write_text(json.dumps({"sharding": ""}))
    assert load_config(SftConfig, path, ["m", "d"]).config.sharding == "none"
