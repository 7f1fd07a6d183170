"""``oarsmith sft``: fine-tune all weights, or LoRA adapters, on conversations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from oarsmith.config.resolved import Resolved
from oarsmith.config.sft import SftConfig
from oarsmith.jobs import train as training
from oarsmith.jobs import tuning
from oarsmith.jobs.adapter_training import with_terms
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import make_tokenizer
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
    tuning.say_next(resolved.config, result, console)
    return 0


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
    start=tuning.start,
    tokenizer=make_tokenizer,
    inputs=tuning.inputs,
    build_data=lambda config, begin, tokenizer: sft.build_data(config, tokenizer),
    load_model=tuning.load_trainable,
    weights=tuning.weights_of,
    plan=lambda config: tuning.plan(config, alone="sample"),
    extra_scores=generation_scores,
    tokens_per_pass=tuning.tokens_per_pass,
)
