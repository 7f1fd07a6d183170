"""``oarsmith grpo``: learn from rewards of groups of answers, without a critic (GRPO and its relatives)."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch
from rich.console import Console

from oarsmith.config.policy import GrpoConfig, PolicyConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import ConfigError
from oarsmith.jobs import policy_parts as parts
from oarsmith.jobs import start as starting
from oarsmith.jobs import train as training
from oarsmith.jobs import tuning
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.jobs.start import Start
from oarsmith.losses.policy.objective import PolicyLoss
from oarsmith.losses.policy.surrogates import SurrogateOptions
from oarsmith.methods.data import TrainingData
from oarsmith.models.decoder import Decoder
from oarsmith.rl.learning import Teacher
from oarsmith.rl.rewards.watch import Watch
from oarsmith.rl.study import Student
from oarsmith.text import Tokenizer

P = TypeVar("P", bound=PolicyConfig)


def run(resolved: Resolved[GrpoConfig]) -> int:
    """The command."""
    console = make_console()
    result = training.run(resolved, RECIPE, console)
    tuning.say_next(resolved.config, result, console)
    return 0


def start(resolved: Resolved[P], device: torch.device) -> tuple[Resolved[P], Start]:
    """A checkpoint; lengths fit its context, and passes follow from their size."""
    config = resolved.config
    begin = starting.from_checkpoint(config, starting.model_directory(config))
    resolved = starting.settle_dtype(resolved, device)
    context, wanted = begin.max_positions, config.max_prompt_len + config.max_new_tokens
    if config.max_length is None:
        length = min(wanted, context)
        prompt = min(config.max_prompt_len, length - 1)
        resolved = resolved.settle("within the model's context", max_length=length, max_prompt_len=prompt)
    elif config.max_length > context:
        what = f"max_length {config.max_length} is longer than the model's context of {context} tokens"
        raise ConfigError(what, where="max_length", fix=f"set max_length to at most {context}")
    if config.per_device_train_batch_size is not None:
        answers = config.per_update * config.samples_per_prompt
        passes = -(-answers // config.per_device_train_batch_size)
        resolved = resolved.settle(
            "answers of an update / per_device_train_batch_size", gradient_accumulation_steps=passes
        )
    return resolved, begin


def make_loss(config: GrpoConfig) -> PolicyLoss:
    """The objective that a configuration asks for."""
    low, high = config.clip_range_ratio_low, config.clip_range_ratio_high
    assert low is not None and high is not None, "derived where not given"
    return PolicyLoss(
        surrogate=config.preset.surrogate,
        level=config.preset.level,
        options=SurrogateOptions(
            clip_low=low,
            clip_high=high,
            two_sided=config.clip_two_sided,
            dual_clip=config.clip_ratio_dual,
            ceiling=1 + high,
        ),
        pg_coef=config.pg_loss_coeff,
        kl_coef=config.kl_loss_coeff,
        kl_estimator=config.kl_estimator,
        corrected=config.kl_corrected,
        entropy_coef=config.entropy_coeff,
        correction=config.importance_sampling,
        correction_cap=config.importance_sampling_cap,
        temperature=config.temperature,
    )


def whose_old(config: GrpoConfig) -> str:
    """Whose log-probabilities ratios are taken to."""
    agree = config.dtype == "fp32" and config.temperature == 1.0
    if config.max_staleness > 0:
        return "sampler"
    if not config.learns_twice and (config.kl_coeff == 0 or agree):
        return "none"
    if config.old_logprobs != "auto":
        return config.old_logprobs
    # A correction weighs the trainer's against the sampler's; taken to the sampler's it would be 1 everywhere.
    return "sampler" if agree and config.importance_sampling == "none" else "trainer"


def _completed(config: GrpoConfig, begin: Start, model: Decoder, data: TrainingData, console: Console) -> TrainingData:
    assert isinstance(data, parts.PolicyData), data
    watch = Watch()
    assert config.loss_aggregation is not None and config.scale_rewards is not None, "derived where not given"
    plan = parts.make_plan(config, config.loss_aggregation, share=data.share)
    judged = config.kl_loss_coeff > 0 or config.kl_coeff > 0
    sampler = parts.make_sampler(config, model, data)
    rewards = parts.make_rewards(config, data.tokenizer, watch)
    teacher = Teacher(
        estimator=config.preset.estimator,
        scale=config.scale_rewards,
        gamma=config.gamma,
        clip=config.clip_range_score,
        normalize=config.normalize_reward,
        whiten=config.normalize_advantage,
    )
    student = Student(
        teacher=teacher,
        referee=parts.make_referee(config, begin, model, share=data.share, judged=judged),
        old=whose_old(config),
        judged=judged,
        kl_coef=config.kl_coeff,
        aggregation=plan.aggregation,
        longest=plan.longest,
        filter_truncated=bool(config.filter_truncated),
        passing=config.pass_reward,
    )
    batches = parts.make_batches(
        config,
        data,
        plan,
        sampler,
        rewards,
        student,
        watch,
        console,
        dynamic=bool(config.dynamic_sampling),
        most_batches=config.max_gen_batches if config.dynamic_sampling else 1,
        greedy=teacher.needs_greedy,
    )
    return replace(data, train=batches, sampler=sampler, rewards=rewards)


def evaluation(
    config: PolicyConfig, model: Decoder, tokenizer: Tokenizer, data: TrainingData
) -> training.Evaluate | None:
    """What an evaluation measures, if there are prompts for it."""
    assert isinstance(data, parts.PolicyData), data
    return parts.evaluation_of(config, data)


def plan_in_words(config: PolicyConfig) -> str:
    """The rows of a step."""
    whole = config.prompts_per_step * config.samples_per_prompt
    own = config.per_update * config.samples_per_prompt
    rest = "" if own == whole and config.update_iters == 1 else f" of {whole} of a rollout, {config.update_iters} x"
    return f"{own} answers{rest}"


def tokens_per_pass(config: PolicyConfig) -> int:
    """At most: answers as long as they may be."""
    assert config.max_length is not None, "settled where not given"
    return config.max_length * config.per_update * config.samples_per_prompt // config.gradient_accumulation_steps


RECIPE: training.Recipe[GrpoConfig] = training.Recipe(
    objective=lambda config: with_terms(config, make_loss(config)),
    start=start,
    tokenizer=make_tokenizer,
    inputs=tuning.inputs,
    build_data=parts.build_data,
    load_model=tuning.load_trainable,
    complete=_completed,
    weights=tuning.weights_of,
    plan=plan_in_words,
    tokens_per_pass=tokens_per_pass,
    extra_scores=evaluation,
)
