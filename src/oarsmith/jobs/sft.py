"""``oarsmith sft``: fine-tune all weights, or LoRA adapters, on conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from oarsmith.config.adapter_virtual import UNMERGEABLE
from oarsmith.config.resolved import Resolved
from oarsmith.config.sft import SftConfig
from oarsmith.jobs import start as starting
from oarsmith.jobs import train as training
from oarsmith.jobs import weights
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import fit_max_length, make_tokenizer
from oarsmith.jobs.start import Start
from oarsmith.jobs.weights import Weights
from oarsmith.losses.token import TokenCrossEntropy
from oarsmith.methods import sft
from oarsmith.methods.data import TrainingData
from oarsmith.methods.generation import OUTPUT_FILE, generate_and_score
from oarsmith.methods.generation_metrics import require_metrics
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer


def run(resolved: Resolved[SftConfig]) -> int:
    """The command."""
    console = make_console()
    result = training.run(resolved, RECIPE, console)
    if resolved.config.do_train:
        console.print(f"next:   oarsmith chat {result.output_dir}")
        if resolved.config.has_adapter and resolved.config.adapter_type not in UNMERGEABLE:
            console.print(f"        oarsmith merge-adapter {result.output_dir} MERGED   (a plain model, with proof)")
    return 0


def start(resolved: Resolved[SftConfig], device: torch.device) -> tuple[Resolved[SftConfig], Start]:
    """A checkpoint; ``max_length`` fits its context."""
    begin = starting.from_checkpoint(resolved.config, starting.model_directory(resolved.config))
    return fit_max_length(
        starting.settle_dtype(resolved, device), resolved.config.max_length, begin.max_positions
    ), begin


def load_trainable(config: SftConfig, begin: Start, device: torch.device) -> Decoder:
    """All weights, or fresh adapters on frozen ones."""
    if config.has_adapter:
        return starting.load_with_adapter(config, config, begin, device)
    return starting.load_whole(config, begin, device)


def weights_of(config: SftConfig, begin: Start, tokenizer: Tokenizer) -> Weights:
    """An adapter's files, or a model's."""
    return weights.adapter(begin.base, tokenizer) if config.has_adapter else weights.whole_model(tokenizer)


def plan(config: SftConfig) -> str:
    """The rows of a step."""
    length = f"{config.max_length:,} tokens, packed" if config.zero_padding else "one sample each"
    count = (config.per_device_train_batch_size or 1) * config.gradient_accumulation_steps
    return f"{count} {'row' if count == 1 else 'rows'} ({length})"


def generation_scores(
    config: SftConfig, model: Decoder, tokenizer: Tokenizer, data: TrainingData
) -> training.Evaluate | None:
    """BLEU and ROUGE of the model's answers to the rows it is evaluated on."""
    if not config.eval_with_do_generation or data.evaluation is None:
        return None
    require_metrics("eval_with_do_generation")
    rows = {where for batch in data.evaluation() for where in batch.where}
    questions = sft.evaluation_questions(config, rows)
    output = Path(config.output_dir) / OUTPUT_FILE if config.save_generation_output else None

    def score() -> Mapping[str, float]:
        size = config.per_device_eval_batch_size
        return generate_and_score(model, tokenizer, questions, batch_size=size, output_file=output).record()

    return score


RECIPE: training.Recipe[SftConfig] = training.Recipe(
    objective=lambda config: with_terms(config, TokenCrossEntropy(z_loss=config.z_loss)),
    start=start,
    tokenizer=make_tokenizer,
    inputs=lambda config: [config.dataset_name_or_path, config.eval_dataset_path],
    build_data=lambda config, begin, tokenizer: sft.build_data(config, tokenizer),
    load_model=load_trainable,
    weights=weights_of,
    plan=plan,
    extra_scores=generation_scores,
    tokens_per_pass=lambda config: (config.per_device_train_batch_size or 1) * config.max_length,
)
