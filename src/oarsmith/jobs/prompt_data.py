"""The prompts of a run that learns from rewards: rows to token ids, with an account of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oarsmith.config.policy import PolicyConfig
from oarsmith.data.rows import fingerprint_of
from oarsmith.data.spans import RefusedError, SpanEncoder
from oarsmith.errors import DataError
from oarsmith.jobs.prompt_rows import Message, PromptRow, read_prompts
from oarsmith.methods.data import hold_out
from oarsmith.rl.conversations import Episodes
from oarsmith.rl.prompts import Asked
from oarsmith.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts to train on and to evaluate on, and the account of them (``TrainingData``)."""

    train: tuple[Asked, ...]
    evaluation: tuple[Asked, ...]
    reports: dict[str, object]
    lines: list[str]
    fingerprint: str
    highest_id: tuple[int, str]


def read_all(config: PolicyConfig, tokenizer: Tokenizer, episodes: Episodes | None) -> Prompts:
    """Read and encode; with ``episodes`` an environment begins each conversation.

    Raises:
        DataError: a row that cannot be read, nothing to ask, or too many rows left out.
    """
    source = config.dataset_name_or_path
    folder = Path(source).is_dir()
    train, report, lines = _read(config, tokenizer, source, "train" if folder else None, episodes)
    reports: dict[str, object] = {"train": report}
    evaluation: tuple[Asked, ...] = ()
    if config.eval_dataset_path is not None or (
        folder and config.evaluation_strategy != "no" and config.eval_split_ratio == 0
    ):
        other = config.eval_dataset_path or source
        evaluation, reports["eval"], more = _read(
            config, tokenizer, other, None if config.eval_dataset_path else "dev", episodes
        )
        lines += [f"evaluation: {line}" for line in more]
    elif config.eval_split_ratio > 0:
        train, evaluation = hold_out(train, config.eval_split_ratio, config.seed)
        lines.append(f"evaluation: {len(evaluation):,} of these prompts are held out")
    highest = max((max(asked.ids), asked.where) for asked in (*train, *evaluation))
    return Prompts(
        train=train,
        evaluation=evaluation,
        reports=reports,
        lines=lines,
        fingerprint=fingerprint_of(train),
        highest_id=highest,
    )


def _read(
    config: PolicyConfig, tokenizer: Tokenizer, source: str, split: str | None, episodes: Episodes | None
) -> tuple[tuple[Asked, ...], dict[str, object], list[str]]:
    found: list[Asked] = []
    left: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    rows = malformed = 0
    for item in read_prompts(source, split):
        rows += 1
        try:
            row, prompt = item.fields(), item.prompt()
            ids = _encode(prompt, tokenizer, config.raw) if episodes is None else _begun(prompt, row, episodes)
        except DataError as error:
            if config.on_malformed == "error":
                raise
            malformed += 1
            examples.setdefault("malformed", []).append(str(error))
            continue
        if len(ids) > config.max_prompt_len:
            left["prompt longer than max_prompt_len"] += 1
            examples.setdefault("prompt longer than max_prompt_len", []).append(f"{prompt.where}: {len(ids)} tokens")
            continue
        text = tokenizer.decode(ids, skip_special_tokens=False)
        found.append(Asked(ids=tuple(ids), text=text, row=row, where=prompt.where, messages=_messages(prompt)))
    dropped = malformed + left.total()
    if not found or dropped > config.max_dropped_fraction * rows:
        why = ", ".join(f"{count} x {reason}" for reason, count in left.items()) or f"{malformed} x malformed"
        what = f"{dropped:,} of {rows:,} rows had to be left out: {why}" if rows else "there are no rows"
        raise DataError(what, where=source, fix="repair them, or raise max_prompt_len or max_dropped_fraction")
    lengths = np.array([len(asked) for asked in found])
    percentiles = {str(at): int(np.percentile(lengths, at, method="higher")) for at in (50, 90, 100)}
    report: dict[str, object] = {
        "source": source,
        "rows": rows,
        "kept": len(found),
        "malformed": {"count": malformed, "examples": examples.pop("malformed", [])[:3]},
        "dropped": {reason: {"count": n, "examples": examples[reason][:3]} for reason, n in left.items()},
        "samples": len(found),
        "tokens": int(lengths.sum()),
        "trained_tokens": 0,
        "max_length": config.max_prompt_len,
        "length_percentiles": percentiles,
    }
    lines = [
        f"{source}: {rows:,} rows read, {len(found):,} prompts kept, {dropped:,} left out",
        f"tokens a prompt: median {percentiles['50']}, 90 % within {percentiles['90']}, longest {percentiles['100']}",
    ]
    return tuple(found), report, lines


def _messages(prompt: PromptRow) -> tuple[Message, ...]:
    return tuple(prompt.messages(None))


def _begun(prompt: PromptRow, row: Mapping[str, Any], episodes: Episodes) -> list[int]:
    return episodes.first(dict(row), _messages(prompt))


def _encode(prompt: PromptRow, tokenizer: Tokenizer, raw: bool) -> list[int]:
    if raw:
        text = prompt.text if isinstance(prompt.prompt, str) else _only_text(prompt)
        return tokenizer.encode(text)
    encoder = SpanEncoder(tokenizer, prompt.context)
    try:
        return encoder.encode(encoder.render(prompt.messages(None), prompt.tools, prompt=True))
    except RefusedError as error:
        detail = f": {error.detail}" if error.detail else ""
        raise DataError(f"{error.reason}{detail}", where=prompt.where, fix="repair or remove the row") from error


def _only_text(prompt: PromptRow) -> str:
    """A single message, such as PaddleNLP's src that is rendered already.

    Raises:
        DataError: it is a conversation.
    """
    assert not isinstance(prompt.prompt, str)
    if len(prompt.prompt) == 1 and isinstance(prompt.prompt[0].get("content"), str):
        text: str = prompt.prompt[0]["content"]
        return text
    raise DataError("a conversation cannot be continued raw", where=prompt.where, fix="set raw to false")
