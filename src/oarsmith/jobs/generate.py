"""``oarsmith generate``: answer one prompt in the terminal, or a file of prompts into a file."""

from __future__ import annotations

import sys
import time
from functools import partial

from rich.console import Console

from oarsmith.config.inference import GenerateConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.errors import ConfigError
from oarsmith.jobs.answer_file import Encode, answer_file
from oarsmith.jobs.ask import answering, is_raw, open_engine, sampling_of, speed_line
from oarsmith.jobs.prompt_rows import PromptRow


def run(resolved: Resolved[GenerateConfig]) -> int:
    """The command."""
    config = resolved.config
    console = Console(stderr=True, highlight=False)
    # First: what is wrong in it needs no model.
    sampling = sampling_of(config, config.seed)
    with answering(config):
        if config.prompt is None:
            answer_file(resolved, console, partial(_open, config, console))
        else:
            _answer_one(*_open(config, console), config, sampling, console)
    return 0


def _open(config: GenerateConfig, console: Console) -> tuple[Engine, Encode]:
    """The engine, and how a row becomes its prompt."""
    engine = open_engine(config, max(config.batch_size, config.num_beams))
    console.print(f"steps: {engine.how}", style="dim", markup=False)
    if not is_raw(config) and engine.tokenizer is not None and engine.tokenizer.chat_template is None:
        raise ConfigError(
            "the model has no chat template",
            where=config.model_name_or_path,
            fix="--raw continues the text as it is; --chat_template chatml (or another) makes a conversation of it",
        )

    def encode(row: PromptRow) -> list[int]:
        if not is_raw(config):
            return engine.encode(row.messages(config.system), tools=row.tools, where=row.where, **row.context)
        return engine.encode(row.text, where=row.where)

    return engine, encode


def _answer_one(engine: Engine, encode: Encode, config: GenerateConfig, sampling: Sampling, console: Console) -> None:
    ids = encode(PromptRow(config.prompt or "", "prompt"))
    start = time.perf_counter()
    if sampling.num_samples > 1:
        _print_several(engine.generate(ids, sampling)[0], time.perf_counter() - start, console)
        return
    stream = engine.stream(ids, sampling)
    if config.stream:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    else:
        sys.stdout.write("".join(stream))
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert stream.completion is not None
    console.print(speed_line(stream.completion, time.perf_counter() - start, engine.guesses), style="dim")


def _print_several(completion: Completion, seconds: float, console: Console) -> None:
    """Answers on stdout, one after another, each headed on stderr."""
    answers = [completion, *completion.others]
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            console.print(f"answer {number} of {len(answers)}:", style="dim")
        print(answer.text, flush=True)
    num_tokens = sum(answer.num_tokens for answer in answers)
    console.print(f"{num_tokens} new tokens in {seconds:.1f} s", style="dim")
