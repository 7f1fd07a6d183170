"""``oarsmith kto``: train on single answers that are good or bad (Ethayarajh et al. 2024)."""

from __future__ import annotations

from oarsmith.config.dpo import KtoConfig
from oarsmith.config.resolved import Resolved
from oarsmith.jobs import judged, tuning
from oarsmith.jobs import train as training
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.losses.kto import KtoLoss


def run(resolved: Resolved[KtoConfig]) -> int:
    """The command."""
    console = make_console()
    result = training.run(resolved, RECIPE, console)
    tuning.say_next(resolved.config, result, console)
    return 0


def make_loss(config: KtoConfig) -> KtoLoss:
    """The loss that a configuration asks for."""
    return KtoLoss(
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        loss_type=config.loss_type,
    )


RECIPE: training.Recipe[KtoConfig] = training.Recipe(
    objective=lambda config: with_terms(config, make_loss(config)),
    start=tuning.start,
    tokenizer=make_tokenizer,
    inputs=tuning.inputs,
    build_data=lambda config, begin, tokenizer: judged.build_data(
        config, begin, tokenizer, kind="point", mismatched=make_loss(config).needs_mismatched
    ),
    load_model=tuning.load_trainable,
    complete=judged.with_reference,
    weights=tuning.weights_of,
    plan=lambda config: tuning.plan(config, alone="prompt"),
    tokens_per_pass=tuning.tokens_per_pass,
)
