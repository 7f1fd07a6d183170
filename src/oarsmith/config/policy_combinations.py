"""Combinations that learning from rewards cannot run with (see ``combinations.py``)."""

from __future__ import annotations

import os
from typing import Any

from .impossible import Impossible
from .policy import GrpoConfig, PolicyConfig
from .ppo import PpoConfig

# A group of one has no mean to be compared with; these have another baseline.
_ALONE = frozenset({"reinforce++", "remax"})


def _not_here(key: str, why: str, off: str) -> Impossible[Any]:
    """A key of training on texts, given to a command that learns from rewards."""

    def given(c: PolicyConfig) -> bool:
        return bool(dict(c)[key])

    return Impossible(PolicyConfig, given, f"{key} is for training on texts: {why}", f"set {key} to {off}")


def _no_prompts_to_evaluate(c: PolicyConfig) -> bool:
    one_file = os.path.isfile(c.dataset_name_or_path)
    wanted = c.evaluation_strategy != "no" or c.do_eval is True or not c.do_train
    return wanted and one_file and c.eval_dataset_path is None and c.eval_split_ratio == 0


POLICY: tuple[Impossible[Any], ...] = (
    _not_here("z_loss", "the loss here is of sampled tokens, not of a softmax alone", "0"),
    _not_here("use_ssa", "its groups follow a text's whole length, so answers could not share a prompt", "false"),
    _not_here("use_pose_convert", "answers go on where their prompt ends", "false"),
    _not_here("neftune", "with noise the trainer's probabilities are not those that answers were drawn by", "false"),
    _not_here("do_predict", "there are no rows with answers to score", "false"),
    Impossible(
        PolicyConfig,
        lambda c: not c.rewards and c.environment is None,
        "nothing says what an answer is worth",
        "give rewards, such as reward.py:reward, a built-in's name, or the directory of a reward model",
    ),
    Impossible(
        PolicyConfig,
        lambda c: not c.rewards and bool(c.reward_weights),
        "reward_weights weigh rewards, and the environment alone gives them",
        "remove reward_weights, or name rewards",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.environment is not None and bool(c.tools),
        "environment and tools both say what speaks between the model's turns",
        "give one of them; an environment can call tools itself",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.raw and (c.environment is not None or bool(c.tools)),
        "an environment's messages are rendered by the chat template, which raw leaves out",
        "set raw to false",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.max_length is not None and c.max_prompt_len >= c.max_length,
        "max_prompt_len {max_prompt_len} leaves no room for answers in max_length {max_length}",
        "lower max_prompt_len or raise max_length",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.min_new_tokens > c.max_new_tokens,
        "min_new_tokens {min_new_tokens} is more than max_new_tokens {max_new_tokens}",
        "lower min_new_tokens or raise max_new_tokens",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.overlong_buffer > c.max_new_tokens,
        "overlong_buffer {overlong_buffer} is more than the longest answer, max_new_tokens {max_new_tokens}",
        "lower overlong_buffer",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.prompts_per_update > c.prompts_per_step or c.prompts_per_update == 0,
        "prompts_per_update is {prompts_per_update}, and a rollout has prompts_per_step {prompts_per_step}",
        "choose from 1 to {prompts_per_step}, or -1 for all",
    ),
    Impossible(
        PolicyConfig,
        lambda c: (
            c.optimizer_in_backward and (c.gradient_accumulation_steps > 1 or bool(c.per_device_train_batch_size))
        ),
        "optimizer_in_backward updates weights in a single pass, and this splits updates",
        "remove per_device_train_batch_size and gradient_accumulation_steps",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.adapter_type == "loraga",
        "loraga begins from gradients on rows, and there are none before the first rollout",
        "use lora or pissa",
    ),
    Impossible(
        PolicyConfig,
        _no_prompts_to_evaluate,
        "an evaluation is asked for, but {dataset_name_or_path} is one file and no eval data is named",
        "give eval_dataset_path, or eval_split_ratio 0.05 to keep some prompts out of training",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.max_staleness > 0 and c.temperature != 1.0,
        "with max_staleness the sampler's log-probabilities are needed, which are those of temperature 1, not "
        "{temperature}",
        "set temperature to 1, or max_staleness to 0",
    ),
    Impossible(
        PolicyConfig,
        lambda c: c.max_staleness > 0 and c.ignore_data_skip,
        "the rollout that is made ahead is kept with the place in the data, which ignore_data_skip leaves",
        "set max_staleness to 0, or ignore_data_skip to false",
    ),
    Impossible(
        PpoConfig,
        lambda c: c.critic == "shared" and c.critic_model_name_or_path is not None,
        "a shared critic is a head on the policy's states; critic_model_name_or_path would have no effect",
        "remove one of them",
    ),
    Impossible(
        PpoConfig,
        lambda c: c.critic != "separate" and c.critic_recompute,
        "critic_recompute is for a critic of its own",
        "set critic to separate, or use recompute",
    ),
    Impossible(
        PpoConfig,
        lambda c: c.adapter_type in ("adalora", "lorapro"),
        "{adapter_type} does things around the optimizer, where the critic is updated",
        "use lora",
    ),
    Impossible(
        PpoConfig,
        lambda c: c.optimizer_in_backward,
        "the critic is updated after the backward pass, with its own optimizer",
        "set optimizer_in_backward to false",
    ),
    Impossible(
        PpoConfig,
        lambda c: c.dtype == "fp16",
        "the critic's gradients have no loss scale",
        "set dtype to bf16 or fp32",
    ),
    Impossible(
        PpoConfig,
        lambda c: c.kl_target is not None and c.kl_coeff == 0,
        "kl_target moves kl_coeff, and 0 cannot be moved",
        "give kl_coeff a value to begin with",
    ),
    Impossible(
        GrpoConfig,
        lambda c: c.max_staleness > 0 and c.old_logprobs == "trainer",
        "with max_staleness the weights that wrote an answer are gone before the trainer could score it",
        "set old_logprobs to sampler, or max_staleness to 0",
    ),
    Impossible(
        GrpoConfig,
        lambda c: c.temperature != 1.0 and (c.importance_sampling != "none" or c.old_logprobs == "sampler"),
        "the sampler's log-probabilities are those of temperature 1, and answers are drawn at {temperature}",
        "set temperature to 1, or importance_sampling to none and old_logprobs to trainer",
    ),
    Impossible(
        GrpoConfig,
        lambda c: (
            c.importance_sampling != "none"
            and (c.max_staleness > 0 or (c.old_logprobs == "sampler" and c.learns_twice))
        ),
        "importance_sampling corrects between sampler and trainer, and here ratios are taken to the sampler's "
        "log-probabilities already",
        "set importance_sampling to none, or old_logprobs to trainer without max_staleness",
    ),
    Impossible(
        GrpoConfig,
        lambda c: c.samples_per_prompt == 1 and c.algorithm not in _ALONE,
        "samples_per_prompt is 1, and {algorithm} compares answers to the same prompt",
        "raise samples_per_prompt, or choose reinforce++ or remax",
    ),
    Impossible(
        GrpoConfig,
        lambda c: (
            c.clip_range_ratio is not None
            and (c.clip_range_ratio_low or c.clip_range_ratio) != c.clip_range_ratio
            and (c.clip_range_ratio_high or c.clip_range_ratio) != c.clip_range_ratio
        ),
        "clip_range_ratio, clip_range_ratio_low and clip_range_ratio_high say three things",
        "give the first one, or the other two",
    ),
    Impossible(
        GrpoConfig,
        lambda c: c.kl_corrected and c.kl_loss_coeff == 0,
        "kl_corrected changes a KL term, and kl_loss_coeff is 0",
        "raise kl_loss_coeff, or remove kl_corrected",
    ),
)
