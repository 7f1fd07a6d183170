"""``oarsmith pretrain``: next-token training on an indexed corpus, from scratch or from weights."""

from __future__ import annotations

import torch

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.source import has_weights
from oarsmith.config.pretrain import PretrainConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import ConfigError
from oarsmith.jobs import start as starting
from oarsmith.jobs import train as training
from oarsmith.jobs import weights
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import fit_max_length, make_tokenizer
from oarsmith.jobs.start import Start
from oarsmith.losses.token import TokenCrossEntropy
from oarsmith.methods import pretrain
from oarsmith.models import families
from oarsmith.models.fresh import fresh_config
from oarsmith.models.spec import PrefixLM

# Without a learning_rate: what small models learn well with, and what disturbs trained weights little.
_FROM_SCRATCH, _FURTHER = 1e-3, 5e-5


def run(resolved: Resolved[PretrainConfig]) -> int:
    """The command."""
    console = make_console()
    result = training.run(resolved, RECIPE, console)
    if resolved.config.do_train:
        console.print(f"next:   oarsmith generate {result.output_dir} 'Once upon a time' --raw --temperature 0.8")
    return 0


def start(resolved: Resolved[PretrainConfig], device: torch.device) -> tuple[Resolved[PretrainConfig], Start]:
    """Weights to train further, or a config that tokenizer and rows have room in."""
    base = starting.model_directory(resolved.config)
    if resolved.config.continue_training is None:
        found = has_weights(base)
        resolved = resolved.settle("weights are there" if found else "no weights are there", continue_training=found)
    config = resolved.config
    if config.learning_rate is None:
        rate, why = (_FURTHER, "trained weights") if config.continue_training else (_FROM_SCRATCH, "from scratch")
        resolved = resolved.settle(why, learning_rate=rate)
        if config.min_learning_rate > rate:
            raise ConfigError(
                f"min_learning_rate {config.min_learning_rate:g} is above the learning rate of {rate:g}",
                where="min_learning_rate",
                fix="give learning_rate too",
            )
    resolved = starting.settle_dtype(resolved, device)
    if config.continue_training:
        if not has_weights(base):
            raise ConfigError(
                f"{base} has no weights to train further",
                where="continue_training",
                fix="set continue_training to false to start from fresh weights",
            )
        begin = starting.from_checkpoint(config, base)
        return fit_max_length(resolved, config.max_length, begin.max_positions), begin
    num_tokens = make_tokenizer(config).vocab_size
    contents = fresh_config(
        read_config(base),
        num_tokens=num_tokens,
        num_positions=config.max_length,
        num_layers=config.num_hidden_layers,
    )
    return resolved, Start(base=base, config=starting.stretched(config, contents), fresh=True)


def opening(begin: Start) -> tuple[int, ...]:
    """What stands before a text without a prompt: models with prefixes generate after [gMASK] and their start token.

    GLM's own pretraining fills spans of 50 to 100 % of a document (Du et al. 2022, section 2.2); this is its 100 %.
    """
    rule = families.build_spec(begin.config)[1].visibility
    return (rule.mask_ids[0], rule.start_id) if isinstance(rule, PrefixLM) else ()


def plan(config: PretrainConfig) -> str:
    """The rows of a step."""
    count = (config.per_device_train_batch_size or 1) * config.gradient_accumulation_steps
    apart = ", documents apart" if config.isolate_documents else ""
    return f"{count} {'row' if count == 1 else 'rows'} of {config.max_length:,} tokens{apart}"


RECIPE: training.Recipe[PretrainConfig] = training.Recipe(
    objective=lambda config: TokenCrossEntropy(z_loss=config.z_loss),
    start=start,
    tokenizer=make_tokenizer,
    inputs=lambda config: [],
    build_data=lambda config, begin, tokenizer: pretrain.build_data(config, begin.vocab_size, opening(begin)),
    load_model=starting.load_whole,
    weights=lambda config, begin, tokenizer: weights.whole_model(tokenizer),
    plan=plan,
    tokens_per_pass=lambda config: (config.per_device_train_batch_size or 1) * config.max_length,
)
