"""``oarsmith eval``: the perplexity of a text, the loss on rows with answers, tasks of lm-evaluation-harness, or what a
reward model makes of answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.atomic import atomic_write_text
from oarsmith.config.eval import EvalConfig
from oarsmith.config.resolved import Resolved
from oarsmith.data.conversations import DatasetFormat, to_conversation
from oarsmith.data.dataset import build_samples
from oarsmith.data.loader import Loader
from oarsmith.data.records import ReadLog, read_records
from oarsmith.data.samples import SampleOptions
from oarsmith.data.sources import read_text_file
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import ConfigError, DataError, MissingExtraError
from oarsmith.jobs import eval_scores
from oarsmith.jobs.ask import open_engine
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import runtime
from oarsmith.methods.generation import generate_and_score, read_questions
from oarsmith.methods.generation_metrics import require_metrics
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.text import Tokenizer
from oarsmith.training.evaluate import TextScore, evaluate, score_pieces, windows

# A window of a whole long context costs much and changes little (see the key's description).
_MAX_WINDOW = 2048
_TOKENS_PER_BATCH = 4096
_TEXT_SUFFIXES = (".txt", ".text", ".md")


def run(resolved: Resolved[EvalConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    if config.eval_with_do_generation:
        require_metrics("eval_with_do_generation")
    with runtime(config):
        engine = open_engine(config, config.batch_size)
        assert engine.tokenizer is not None, "a path brings its tokenizer"
        if config.process_reward or engine.num_scores is not None:
            found = eval_scores.evaluate(config, engine, console)
        elif config.scores_file is not None:
            raise ConfigError(
                "the model writes text and gives no scores",
                where="scores_file",
                fix="use a reward model, or leave it out",
            )
        elif config.tasks:
            found = _tasks(config, engine, console)
        elif _holds_documents(config):
            found = _text(config, engine, engine.tokenizer, console)
        else:
            found = _rows(config, engine, engine.tokenizer, console)
    if config.output_file is not None:
        atomic_write_text(Path(config.output_file), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        console.print(f"written: {config.output_file}")
    return 0


def _source(config: EvalConfig) -> str:
    assert config.dataset_name_or_path is not None, "no file and no tasks: refused before"
    return config.dataset_name_or_path


def _format(config: EvalConfig) -> DatasetFormat | None:
    return None if config.dataset_format == "auto" else config.dataset_format


def _split(source: str) -> str | None:
    """Of a folder with splits, the one that is for tests."""
    return "test" if Path(source).is_dir() else None


def _length(config: EvalConfig, engine: Engine) -> int:
    limit = engine.context_length
    if config.max_length is not None and config.max_length > limit:
        raise ConfigError(
            f"max_length {config.max_length} is longer than the model's context of {limit} tokens",
            where="max_length",
            fix=f"set it to at most {limit}",
        )
    return config.max_length or min(limit, _MAX_WINDOW)


def _holds_documents(config: EvalConfig) -> bool:
    """Whether the file is text to be predicted from its first word on."""
    source = _source(config)
    if Path(source).suffix.lower() in _TEXT_SUFFIXES:
        return True
    for record in read_records(source, _split(source), on_malformed=config.on_malformed):
        return to_conversation(record, _format(config)).document is not None
    raise DataError("there is no row in it", where=source, fix="give a text, documents, or rows with answers")


def _documents(config: EvalConfig) -> tuple[list[str], int]:
    """Texts, and how many malformed rows were left out."""
    source, log = _source(config), ReadLog()
    if Path(source).suffix.lower() in _TEXT_SUFFIXES:
        return [read_text_file(source)], 0
    texts = []
    for record in read_records(source, _split(source), log=log, on_malformed=config.on_malformed):
        document = to_conversation(record, _format(config)).document
        if document is None:
            raise DataError(
                "the row is a conversation among documents",
                where=record.where,
                fix="evaluate documents and rows with answers apart",
            )
        texts.append(document)
    return texts, len(log.malformed)


def _text(config: EvalConfig, engine: Engine, tokenizer: Tokenizer, console: Console) -> dict[str, Any]:
    """Perplexity and bits per byte."""
    length = _length(config, engine)
    stride = config.stride or max(length // 2, 1)
    if stride > length:
        raise ConfigError(f"stride {stride} is longer than the window of {length}", where="stride", fix="lower it")
    texts, left_out = _documents(config)
    pieces, num_bytes = [], 0
    for text in texts:
        pieces += windows(tokenizer.encode(text), length, stride)
        num_bytes += len(text.encode("utf-8"))
    if not pieces:
        raise DataError("the text is shorter than two tokens", where=_source(config), fix="give a longer text")
    scores = list(score_pieces(engine.model, pieces, _TOKENS_PER_BATCH))
    score = TextScore(-sum(s.logprob for s in scores), sum(s.num_tokens for s in scores), num_bytes)
    left = f", {left_out:,} malformed left out" if left_out else ""
    console.print(
        f"{len(texts):,} {'text' if len(texts) == 1 else 'texts'} of {num_bytes:,} bytes{left}: {score.num_tokens:,} "
        f"tokens predicted, {length:,} at a time, {stride:,} further each time"
    )
    console.print(
        f"perplexity {score.perplexity:.4f}, loss {score.loss:.4f} nats per token, "
        f"{score.bits_per_byte:.4f} bits per byte"
    )
    return {
        "perplexity": score.perplexity,
        "loss": score.loss,
        "bits_per_byte": score.bits_per_byte,
        "num_tokens": score.num_tokens,
        "num_bytes": score.num_bytes,
        "num_texts": len(texts),
        "left_out": left_out,
        "max_length": length,
        "stride": stride,
    }


def _rows(config: EvalConfig, engine: Engine, tokenizer: Tokenizer, console: Console) -> dict[str, Any]:
    """Loss and accuracy on the answers; by generation too where asked for."""
    source = _source(config)
    options = SampleOptions(
        max_length=_length(config, engine),
        dataset_format=_format(config),
        split=_split(source),
        on_malformed=config.on_malformed,
    )
    samples = build_samples(source, tokenizer, options)
    for line in samples.report.lines():
        console.print(line)
    loader = Loader(
        samples.samples,
        rows_per_batch=max(1, _TOKENS_PER_BATCH // options.max_length),
        capacity=options.max_length,
        packing=True,
        shuffle=False,
    )
    batches = (loader.batch_at(0, index) for index in range(loader.batches_per_epoch(0)))
    result = evaluate(engine.model, OBJECTIVE, batches)
    console.print(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.4f}, accuracy {result.accuracy:.2%} on "
        f"{result.count:,.0f} tokens of answers"
    )
    found: dict[str, Any] = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "accuracy": result.accuracy,
        "num_tokens": result.count,
    }
    if config.eval_with_do_generation:
        questions = read_questions(
            source, split=options.split, dataset_format=options.dataset_format, on_malformed=config.on_malformed
        )
        sampling = Sampling(max_new_tokens=config.max_new_tokens)
        scores = generate_and_score(engine.model, tokenizer, questions, sampling, batch_size=config.batch_size).record()
        found |= {name.removeprefix("eval_"): value for name, value in scores.items()}
        shown = ", ".join(f"{name.removeprefix('eval_')} {value:.4f}" for name, value in scores.items())
        console.print(f"{len(questions):,} answers generated: {shown}")
    return found


def _tasks(config: EvalConfig, engine: Engine, console: Console) -> dict[str, Any]:
    """Tasks of the harness, as its own command line runs them."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table
    except ImportError as error:
        raise MissingExtraError("lm_eval", "lm-eval", "eval --tasks") from error
    from oarsmith.engine.lm_eval_model import OarsmithLM

    names = [name.strip() for word in config.tasks for name in word.split(",") if name.strip()]
    manager = TaskManager(include_path=config.include_path)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ConfigError(
            f"there is no task {unknown[0]!r}",
            where="tasks",
            fix="'lm_eval ls tasks' lists them; add include_path for yours",
        )
    limit = config.limit
    results = lm_eval.simple_evaluate(
        model=OarsmithLM(engine=engine, max_length=config.max_length),
        tasks=names,
        num_fewshot=config.num_fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        apply_chat_template=config.apply_chat_template,
        task_manager=manager,
        log_samples=False,
        random_seed=config.seed,
        numpy_random_seed=config.seed,
        torch_random_seed=config.seed,
        fewshot_random_seed=config.seed,
    )
    console.print(make_table(results))
    plain: Mapping[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return {
        name: plain[name]
        for name in ("results", "versions", "n-shot", "n-samples", "higher_is_better")
        if name in plain
    }
