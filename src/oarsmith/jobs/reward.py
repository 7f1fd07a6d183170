"""``oarsmith reward``: train a model that scores answers on pairs of them, or one that judges their steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console

from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.adapter_virtual import UNMERGEABLE
from oarsmith.config.resolved import Resolved
from oarsmith.config.reward import ProcessKeys, RewardConfig
from oarsmith.errors import ConfigError
from oarsmith.jobs import judged, tuning
from oarsmith.jobs import train as training
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.jobs.start import Start
from oarsmith.losses.reward import ProcessLoss, RewardLoss, RewardOptions
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.init import reset_scores
from oarsmith.text import Tokenizer
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


def reward_ids(keys: ProcessKeys, tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of the tokens for good and bad.

    Raises:
        ConfigError: there are not two of them, or one is no single token.
    """
    names, ids = keys.reward_tokens, list[int]()
    for name in names:
        found = tokenizer.encode(name, add_special_tokens=False)
        index = found[0] if len(found) == 1 else tokenizer.token_to_id(name)
        if index is None:
            what = f"{name!r} is {len(found)} tokens, not one"
            raise ConfigError(what, where="reward_tokens", fix="choose words that are single tokens of this model")
        ids.append(index)
    if len(set(ids)) != 2 or len(ids) != 2:
        what = f"{', '.join(names) or 'nothing'} is not two different tokens"
        raise ConfigError(what, where="reward_tokens", fix="give the one for good and the one for bad: +,-")
    return ids[0], ids[1]


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
    where, steps = result.output_dir, " --process_reward" if config.process_reward else ""
    console.print(f"next:   oarsmith eval {where} HELD_OUT{steps}")
    if not config.process_reward:
        console.print(f"        oarsmith serve {where}")
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
