"""``oarsmith reward``: train a model that scores answers on pairs of them, or one that judges their steps."""

from __future__ import annotations

import shlex
from dataclasses import replace

import torch
from rich.console import Console

from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.adapter_virtual import UNMERGEABLE
from oarsmith.config.resolved import Resolved
from oarsmith.config.reward import RewardConfig
from oarsmith.jobs import judged, tuning
from oarsmith.jobs import train as training
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.reward_tokens import reward_ids
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.jobs.start import Start
from oarsmith.losses.reward import ProcessLoss, RewardLoss, RewardOptions
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import reset_scores
from oarsmith.training.objective import Objective


def run(resolved: Resolved[RewardConfig]) -> int:
    """The command."""
    console = make_console()
    make_loss(resolved.config)  # what cannot be is said before anything is loaded
    result = training.run(resolved, RECIPE, console)
    _say_next(resolved.config, result, console)
    return 0


def make_loss(config: RewardConfig) -> Objective:
    """The loss that a configuration asks for.

    Raises:
        ConfigError: reward tokens that are none.
    """
    if config.process_reward:
        return ProcessLoss(reward_tokens=reward_ids(config, make_tokenizer(config)))
    return RewardLoss(
        options=RewardOptions(
            kind=config.loss_type,
            label_smoothing=config.label_smoothing,
            center=config.center_rewards_coefficient or 0.0,
            square=config.regularization,
        )
    )


def _start(resolved: Resolved[RewardConfig], device: torch.device) -> tuple[Resolved[RewardConfig], Start]:
    """A checkpoint that writes becomes one that scores, unless steps are judged; one that scores goes on."""
    scoring = not resolved.config.process_reward
    resolved, begin = tuning.start(resolved, device, scoring=scoring)
    if scoring and begin.num_scores is None:
        padding = make_tokenizer(resolved.config).plain_pad_id
        begin = replace(begin, config=families.scoring_config(begin.config, padding_id=padding))
    return resolved, begin


def _load_model(config: RewardConfig, begin: Start, device: torch.device) -> Decoder:
    model = tuning.load_trainable(config, begin, device)
    if not config.has_adapter and families.has_new_head(read_config(begin.base), begin.config):
        reset_scores(model, config.seed)
    return model


def _say_next(config: RewardConfig, result: training.TrainResult, console: Console) -> None:
    if not config.do_train:
        return
    where, steps = result.output_dir, ""
    if config.process_reward:
        steps = " --process_reward"
        for key, value in (("step_separator", config.step_separator), ("reward_tokens", config.reward_tokens)):
            if value != RewardConfig.model_fields[key].default:
                steps += f" --{key} {shlex.quote(value if isinstance(value, str) else ','.join(value))}"
    console.print(f"next:   oarsmith eval {where} HELD_OUT{steps}")
    console.print(f"        oarsmith serve {where}{steps}")
    if config.has_adapter and config.adapter_type not in UNMERGEABLE:
        console.print(f"        oarsmith merge-adapter {where} MERGED   (a plain model, with proof)")


RECIPE: training.Recipe[RewardConfig] = training.Recipe(
    objective=lambda config: with_terms(config, make_loss(config)),
    start=_start,
    tokenizer=make_tokenizer,
    inputs=tuning.inputs,
    build_data=lambda config, begin, tokenizer: judged.build_data(
        config,
        begin,
        tokenizer,
        kind="steps" if config.process_reward else "pair",
        mismatched=False,
        step_separator=config.step_separator,
    ),
    load_model=_load_model,
    weights=tuning.weights_of,
    plan=lambda config: tuning.plan(config, alone="prompt"),
    tokens_per_pass=tuning.tokens_per_pass,
)
