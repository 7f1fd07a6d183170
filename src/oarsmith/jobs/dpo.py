"""``oarsmith dpo``: train on pairs of answers of which one is preferred (DPO and its relatives)."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from oarsmith.config.dpo import DpoConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import ConfigError
from oarsmith.jobs import judged, tuning
from oarsmith.jobs import train as training
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import make_tokenizer
from oarsmith.jobs.start import Start
from oarsmith.losses.preference.objective import PreferenceLoss
from oarsmith.losses.preference.pairs import Options
from oarsmith.methods.data import TrainingData
from oarsmith.methods.following import FollowedBatches
from oarsmith.models.decoder import Decoder


def run(resolved: Resolved[DpoConfig]) -> int:
    """The command."""
    console, _ = make_console(), make_loss(resolved.config)  # what cannot be is said before anything is loaded
    result = training.run(resolved, RECIPE, console)
    tuning.say_next(resolved.config, result, console)
    return 0


def make_loss(config: DpoConfig) -> PreferenceLoss:
    """The loss that a configuration asks for.

    Raises:
        ConfigError: an unknown name, or what does not go together.
    """
    names, given = config.loss_type, config.loss_weights
    if not names:
        raise ConfigError("no loss is named", where="loss_type", fix="choose one, such as sigmoid")
    if given and len(given) != len(names):
        what = f"{len(names)} loss types and {len(given)} weights"
        raise ConfigError(what, where="loss_weights", fix="give a weight for each loss_type")
    loss = PreferenceLoss(
        terms=tuple(zip(names, given or (1.0,) * len(names), strict=True)),
        options=Options(
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            simpo_gamma=config.simpo_gamma,
            dpop_lambda=config.dpop_lambda,
            discopop_tau=config.discopop_tau,
            f_divergence=config.f_divergence_type,
            f_alpha=config.f_alpha_divergence_coef,
        ),
        pref_loss_ratio=config.pref_loss_ratio,
        sft_loss_ratio=config.sft_loss_ratio,
        reference_free=config.reference_free,
        weighted=config.use_weighting,
    )
    if config.ref_model_update_steps > 0 and not loss.needs_reference:
        what = f"{', '.join(names)} compares with no reference that could follow the model"
        raise ConfigError(what, where="ref_model_update_steps", fix="set it to -1, or choose another loss_type")
    return loss


def _completed(config: DpoConfig, begin: Start, model: Decoder, data: TrainingData, console: Console) -> TrainingData:
    if not make_loss(config).needs_reference:
        return data
    data = judged.with_reference(config, begin, model, data, console)
    if config.ref_model_update_steps <= 0:
        return data
    followed = FollowedBatches(
        data.train,
        model,
        every=config.ref_model_update_steps,
        accumulate=config.gradient_accumulation_steps,
        total=training.total_steps(config, data.train),
    )
    return replace(data, train=followed)


RECIPE: training.Recipe[DpoConfig] = training.Recipe(
    objective=lambda config: with_terms(config, make_loss(config)),
    start=tuning.start,
    tokenizer=make_tokenizer,
    inputs=tuning.inputs,
    build_data=lambda config, begin, tokenizer: judged.build_data(
        config, begin, tokenizer, kind="pair", mismatched=False
    ),
    load_model=tuning.load_trainable,
    complete=_completed,
    weights=tuning.weights_of,
    plan=lambda config: tuning.plan(config, alone="prompt"),
    tokens_per_pass=tuning.tokens_per_pass,
)
