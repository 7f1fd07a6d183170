"""What ``oarsmith bench`` asks: rows of a file, or made prompts; as token ids, which all engines are given alike."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice

from oarsmith.config.bench import BenchConfig
from oarsmith.data.records import Record
from oarsmith.errors import DataError
from oarsmith.jobs.prompt_rows import InputRow, read_rows
from oarsmith.text import Tokenizer


@dataclass(frozen=True)
class BenchRequest:
    """Ids of a prompt, and how many tokens its answer has."""

    ids: list[int]
    output_tokens: int


def bench_requests(config: BenchConfig, tokenizer: Tokenizer, vocab_size: int, context: int) -> list[BenchRequest]:
    """The requests of a configuration.

    Args:
        vocab_size: of the model: made prompts have ids below, and no special ones.
        context: most tokens of prompt and answer together.

    Raises:
        DataError: a row that is none, or a request that the context does not hold; with its place.
    """
    maker = _Maker(config.seed, tokenizer, vocab_size)
    if config.requests is None:
        prompts = [maker.prompt(config.input_tokens) for _ in range(config.num_requests)]
        named = [("the made prompts", BenchRequest(ids, config.output_tokens)) for ids in prompts]
    else:
        rows = islice(read_rows(config.requests), config.num_requests)
        named = [(row.item.where or "", _of_row(row, config, tokenizer, maker)) for row in rows]
    if not named:
        raise DataError("the file has no rows", where=config.requests, fix='write one {"prompt": "..."} a line')
    for where, request in named:
        size = len(request.ids) + request.output_tokens
        if size > context:
            raise DataError(
                f"{len(request.ids):,} tokens of prompt and {request.output_tokens:,} of answer are more than the "
                f"model's context of {context:,}",
                where=where,
                fix="lower input_tokens or output_tokens",
            )
    return [request for _, request in named]


def _of_row(row: InputRow, config: BenchConfig, tokenizer: Tokenizer, maker: _Maker) -> BenchRequest:
    if isinstance(row.item, DataError):
        raise row.item
    record = row.item
    output_tokens = _count(record, "output_tokens", config.output_tokens, least=2)
    if "input_tokens" in record.value:
        return BenchRequest(maker.prompt(_count(record, "input_tokens", 0, least=1)), output_tokens)
    prompt = row.prompt()
    if tokenizer.chat_template is None or config.chat_template == "none":
        ids = tokenizer.encode(prompt.text)
    else:
        ids = tokenizer.encode_chat(prompt.messages(None), prompt.tools, True, **prompt.context)
    if not ids:
        raise DataError("the prompt is empty: not a single token", where=record.where, fix="write something to answer")
    return BenchRequest(list(ids), output_tokens)


def _count(record: Record, name: str, default: int, *, least: int) -> int:
    value = record.value.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{name} is {value!r}", where=record.where, fix=f"give a whole number, at least {least}")
    return value


class _Maker:
    """Prompts of random ordinary tokens; no two begin alike, so nothing that was computed of one helps another."""

    def __init__(self, seed: int, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._random = random.Random(seed)
        special = set(tokenizer.special_ids)
        self._ids = [index for index in range(min(vocab_size, tokenizer.vocab_size)) if index not in special]

    def prompt(self, length: int) -> list[int]:
        return self._random.choices(self._ids, k=length)
