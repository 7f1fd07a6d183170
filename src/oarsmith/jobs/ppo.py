"""``oarsmith ppo``: learn from rewards with a critic (Schulman et al. 2017; Ouyang et al. 2022)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from oarsmith.atomic import atomic_directory
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.hf import DTYPES, load_decoder, write_decoder
from oarsmith.config.ppo import PpoConfig
from oarsmith.config.resolved import Resolved
from oarsmith.data.batch import Batch
from oarsmith.data.dataset import build_samples
from oarsmith.data.loader import Loader
from oarsmith.data.samples import SampleOptions
from oarsmith.jobs import grpo, tuning
from oarsmith.jobs import policy_parts as parts
from oarsmith.jobs import train as training
from oarsmith.jobs.console import make_console
from oarsmith.jobs.loop_parts import total_steps
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.jobs.start import Start, stretched
from oarsmith.losses.policy.objective import PolicyLoss
from oarsmith.losses.policy.ppo import PpoLoss
from oarsmith.losses.policy.surrogates import SurrogateOptions
from oarsmith.methods.data import TrainingData
from oarsmith.model_path import resolve
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import reset_scores
from oarsmith.models.recompute import Recompute
from oarsmith.rl.critic import Critic, CriticUpdates, SeparateCritic, SharedCritic
from oarsmith.rl.learning import Teacher
from oarsmith.rl.ppo import KLController, PpoStudent
from oarsmith.rl.rewards.watch import Watch
from oarsmith.rl.study import Student
from oarsmith.text import Tokenizer
from oarsmith.training.objective import Objective
from oarsmith.training.optimizer import AdamW, AdamWSettings
from oarsmith.training.schedule import Schedule
from oarsmith.training.update_hooks import UpdateHooks

CRITIC_FOLDER = "critic"


@dataclass(frozen=True, kw_only=True)
class CriticData(parts.PolicyData):
    """With the critic, once it is there."""

    critic: Critic | None = None


def run(resolved: Resolved[PpoConfig]) -> int:
    """The command."""
    console = make_console()
    kept: list[Critic] = []
    result = training.run(resolved, recipe(kept), console)
    if resolved.config.do_train and kept and isinstance(kept[0], SeparateCritic):
        folder = result.output_dir / CRITIC_FOLDER
        with atomic_directory(folder) as target:
            write_decoder(kept[0].decoder, target)
            make_tokenizer(resolved.config).save(target)
        console.print(f"critic: {folder}")
    tuning.say_next(resolved.config, result, console)
    return 0


def make_critic(config: PpoConfig, begin: Start, model: Decoder, padding_id: int | None) -> Critic:
    """What the configuration asks for."""
    if config.critic != "separate":
        return SharedCritic(model)
    base = begin.base
    if config.critic_model_name_or_path is not None:
        base = resolve(config.critic_model_name_or_path).base
    own = read_config(base)
    contents = stretched(config, own)
    if families.build_spec(own)[1].head.num_scores is None:
        contents = families.scoring_config(contents, padding_id=padding_id)
    decoder = load_decoder(base, dtype=DTYPES[config.dtype], device=model.device, config=contents)
    if families.has_new_head(own, contents):
        reset_scores(decoder, config.seed)
    if config.critic_recompute:
        decoder.recompute = Recompute(granularity=config.recompute_granularity, skip_layers=frozenset())
    return SeparateCritic(decoder.train())


def make_companion(config: PpoConfig, tokenizer: Tokenizer, console: Console) -> Callable[[int], Batch] | None:
    """Texts that are learned beside answers, by the number of their batch."""
    if config.ptx_datasets is None or config.ptx_coeff == 0:
        return None
    split = "train" if Path(config.ptx_datasets).is_dir() else None
    found = build_samples(
        config.ptx_datasets, tokenizer, SampleOptions(max_length=config.ptx_max_length, split=split), None
    )
    for line in found.report.lines():
        console.print(f"texts beside answers: {line}")
    loader = Loader(found.samples, rows_per_batch=1, capacity=config.ptx_max_length, packing=True, seed=config.seed)

    def batch(number: int) -> Batch:
        for epoch in itertools.count():
            size = loader.batches_per_epoch(epoch)
            if number < size:
                return loader.batch_at(epoch, number)
            number -= size
        raise AssertionError("there is always another epoch")

    return batch


def make_policy_loss(config: PpoConfig) -> PolicyLoss:
    """The policy's part of the loss."""
    clip = config.clip_range_ratio
    return PolicyLoss(
        options=SurrogateOptions(clip_low=clip, clip_high=clip, dual_clip=config.clip_ratio_dual),
        pg_coef=config.pg_loss_coeff,
        entropy_coef=config.entropy_coeff,
        temperature=config.temperature,
    )


def _completed(config: PpoConfig, begin: Start, model: Decoder, data: TrainingData, console: Console) -> TrainingData:
    assert isinstance(data, parts.PolicyData), data
    watch, judged = Watch(), config.kl_coeff > 0
    plan = parts.make_plan(config, config.loss_aggregation, share=data.share)
    sampler = parts.make_sampler(config, model, data)
    rewards = parts.make_rewards(config, data.tokenizer, watch)
    critic = make_critic(config, begin, model, data.tokenizer.plain_pad_id)
    agree = config.dtype == "fp32" and config.temperature == 1.0
    base = Student(
        teacher=Teacher(),
        referee=parts.make_referee(config, begin, model, share=data.share, judged=judged),
        old="sampler" if agree or config.max_staleness > 0 else "trainer",
        judged=judged,
        kl_coef=0.0,
        aggregation=plan.aggregation,
        longest=plan.longest,
        filter_truncated=False,
        passing=config.pass_reward,
    )
    student = PpoStudent(
        base=base,
        critic=critic,
        model=model,
        kl=KLController(coef=config.kl_coeff, target=config.kl_target, horizon=config.kl_horizon),
        gamma=config.gamma,
        lam=config.gae_lambda,
        clip_score=config.clip_range_score,
        normalize=config.normalize_reward,
        whiten=config.normalize_advantage,
        no_end_penalty=config.no_end_penalty,
    )
    companion = make_companion(config, data.tokenizer, console)
    batches = parts.make_batches(config, data, plan, sampler, rewards, student, watch, console, companion=companion)
    kind = "a head on the policy's states" if isinstance(critic, SharedCritic) else "a model of its own"
    console.print(f"critic: {kind}, {sum(p.numel() for p in critic.module.parameters()):,} parameters")
    known = {**vars(data), "train": batches, "sampler": sampler, "rewards": rewards}
    return CriticData(**known, critic=critic)


def _hooks(config: PpoConfig, data: TrainingData) -> UpdateHooks | None:
    assert isinstance(data, CriticData) and data.critic is not None, data
    total = total_steps(config, data.train)
    assert config.critic_learning_rate is not None, "derived where not given"
    schedule = Schedule(
        kind=config.critic_lr_scheduler_type,
        peak=config.critic_learning_rate,
        total_steps=total,
        warmup_steps=math.ceil(config.critic_warmup_ratio * total),
        floor=config.critic_min_learning_rate,
    )
    settings = AdamWSettings(
        beta1=config.adam_beta1,
        beta2=config.adam_beta2,
        eps=config.adam_epsilon,
        weight_decay=config.critic_weight_decay,
    )
    optimizer = AdamW(data.critic.module.named_parameters(), settings)
    return CriticUpdates(critic=data.critic, optimizer=optimizer, schedule=schedule, max_grad_norm=config.max_grad_norm)


def recipe(kept: list[Critic]) -> training.Recipe[PpoConfig]:
    """The procedure; the critic is put into ``kept`` once it is made."""

    def attach(objective: Objective, data: TrainingData) -> Objective:
        assert isinstance(data, CriticData) and data.critic is not None, data
        assert isinstance(objective, PpoLoss), objective
        kept.append(data.critic)
        return replace(objective, critic=data.critic)

    return training.Recipe(
        objective=lambda config: PpoLoss(
            policy=make_policy_loss(config),
            critic=NoCritic(),
            value_coef=config.value_coeff,
            value_clip=config.clip_range_value,
            ptx_coef=config.ptx_coeff,
        ),
        start=grpo.start,
        tokenizer=make_tokenizer,
        inputs=lambda config: [*tuning.inputs(config), config.critic_model_name_or_path, config.ptx_datasets],
        build_data=parts.build_data,
        load_model=tuning.load_trainable,
        complete=_completed,
        weights=tuning.weights_of,
        plan=grpo.plan_in_words,
        tokens_per_pass=grpo.tokens_per_pass,
        extra_scores=grpo.evaluation,
        attach=attach,
        hooks=_hooks,
    )


class NoCritic:
    """In the place of one until the model is there."""

    def values(self, model: Decoder, hidden_TD: torch.Tensor | None, batch: object) -> torch.Tensor:
        raise AssertionError("the critic is made with the model")
