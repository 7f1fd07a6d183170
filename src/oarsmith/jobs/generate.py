"""``oarsmith generate``: answer one prompt in the terminal, or a file of prompts into a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from oarsmith.atomic import atomic_file
from oarsmith.config.inference import GenerateConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine import Completion, Engine, Sampling
from oarsmith.engine.sampler import Choice
from oarsmith.errors import ConfigError
from oarsmith.jobs.ask import open_engine, sampling_of, speed_line
from oarsmith.jobs.prompt_rows import PromptRow, read_prompts
from oarsmith.jobs.runtime import runtime


def run(resolved: Resolved[GenerateConfig]) -> int:
    """The command."""
    config = resolved.config
    console = Console(stderr=True, highlight=False)
    rows = [] if config.input_file is None else read_prompts(config.input_file)
    # First: what is wrong in it needs no model.
    sampling = sampling_of(config, config.seed)
    with runtime(config):
        engine = open_engine(config, config.batch_size)
        if not _raw(config):
            _need_template(engine, config)
        if config.prompt is not None:
            _answer_one(engine, config, sampling, console)
        else:
            _answer_file(engine, config, rows, sampling, console)
    return 0


def _raw(config: GenerateConfig) -> bool:
    return config.raw or config.chat_template == "none"


def _need_template(engine: Engine, config: GenerateConfig) -> None:
    if engine.tokenizer is not None and engine.tokenizer.chat_template is None:
        raise ConfigError(
            "the model has no chat template",
            where=config.model_name_or_path,
            fix="--raw continues the text as it is; --chat_template chatml (or another) makes a conversation of it",
        )


def _encode(engine: Engine, config: GenerateConfig, row: PromptRow) -> list[int]:
    if not _raw(config):
        return engine.encode(row.messages(config.system), tools=row.tools, where=row.where, **row.context)
    if not isinstance(row.prompt, str):
        raise ConfigError("a conversation cannot be continued raw", where=row.where, fix='give "prompt", or drop --raw')
    return engine.encode(row.prompt, where=row.where)


def _answer_one(engine: Engine, config: GenerateConfig, sampling: Sampling, console: Console) -> None:
    ids = _encode(engine, config, PromptRow(config.prompt or "", "prompt"))
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
    console.print(speed_line(stream.completion, time.perf_counter() - start), style="dim")


def _print_several(completion: Completion, seconds: float, console: Console) -> None:
    """Answers on stdout, one after another, each headed on stderr."""
    answers = [completion, *completion.others]
    for number, answer in enumerate(answers, start=1):
        console.print(f"answer {number} of {len(answers)}:", style="dim")
        print(answer.text, flush=True)
    num_tokens = sum(answer.num_tokens for answer in answers)
    console.print(f"{num_tokens} new tokens in {seconds:.1f} s", style="dim")


def _answer_file(
    engine: Engine, config: GenerateConfig, rows: list[PromptRow], sampling: Sampling, console: Console
) -> None:
    """Every answer on a line of output_file, in the order of the rows; the file appears when all are there."""
    output = Path(config.output_file or "")
    if output.is_dir():
        raise ConfigError(f"{output} is a directory", where="output_file", fix="name a file, such as answers.jsonl")
    prompts = [_encode(engine, config, row) for row in rows]
    start, done = time.perf_counter(), dict[int, Completion]()
    written = num_tokens = 0
    with atomic_file(output) as file, _progress(console) as progress:
        bar = progress.add_task("answering", total=len(rows))
        for index, completion in engine.as_completed(prompts, sampling):
            done[index] = completion
            num_tokens += completion.num_tokens + sum(other.num_tokens for other in completion.others)
            while written in done:
                line = json.dumps(_answer(rows[written], done.pop(written)), ensure_ascii=False)
                file.write(line.encode() + b"\n")
                written += 1
            progress.update(bar, advance=1)
    seconds = time.perf_counter() - start
    speed = f"{num_tokens} tokens in {seconds:.1f} s ({num_tokens / max(seconds, 1e-9):.1f} tokens/s)"
    console.print(f"{written} answers in {output}; {speed}", style="dim", soft_wrap=True)


def _answer(row: PromptRow, completion: Completion) -> dict[str, Any]:
    given: dict[str, Any] = {"prompt": row.prompt}
    if row.reference is not None:
        given["reference"] = row.reference
    answer = {**given, **_output(completion), "num_prompt_tokens": completion.num_prompt_tokens}
    if completion.others:
        answer["others"] = [_output(other) for other in completion.others]
    if completion.prompt_logprobs is not None:
        answer["prompt_logprobs"] = _logprobs(completion.prompt_logprobs)
    return answer


def _output(completion: Completion) -> dict[str, Any]:
    found: dict[str, Any] = {
        "output": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": completion.num_tokens,
    }
    if completion.logprobs is not None:
        found["logprobs"] = _logprobs(completion.logprobs)
    return found


def _logprobs(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    return [{"token": choice.token, "logprob": choice.logprob, "top": choice.top} for choice in choices]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
