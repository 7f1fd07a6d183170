"""``oarsmith eval`` of reward models: how often they find the better answer, and their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from oarsmith.atomic import atomic_write_text
from oarsmith.config.eval import EvalConfig
from oarsmith.data.answer_samples import AnswerOptions
from oarsmith.data.answer_sets import build_answers
from oarsmith.data.answers import Answered
from oarsmith.engine import Engine
from oarsmith.errors import ConfigError
from oarsmith.jobs.reward_tokens import reward_ids
from oarsmith.models.sharing import shares_beginnings

# Of the normal distribution: 95 % lie within.
_Z = 1.959963984540054


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927), which is sound for small counts and shares near 1."""
    share, z2 = right / count, _Z * _Z / count
    middle, half = share + z2 / 2, _Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def evaluate(config: EvalConfig, engine: Engine, console: Console) -> dict[str, Any]:
    """Scores of the rows of a file, written to ``scores_file``; accuracy where the rows say what is better.

    Raises:
        OarsmithError: rows that cannot be read, a model of another kind, or keys that it has no use for.
    """
    _require(config, engine)
    source, tokenizer = str(config.dataset_name_or_path), engine.tokenizer
    assert tokenizer is not None, "a path brings its tokenizer"
    options = AnswerOptions(
        kind="steps" if config.process_reward else None,
        unjudged=not config.process_reward,
        share=shares_beginnings(engine.model.spec),
        max_length=config.max_length or engine.context_length,
        step_separator=config.step_separator,
        split="test" if Path(source).is_dir() else None,
        on_malformed=config.on_malformed,
        max_dropped_fraction=1.0,
    )
    answers = build_answers(source, tokenizer, options)
    for line in answers.report.lines():
        console.print(line)
    records: Sequence[Mapping[str, object]]
    if config.process_reward:
        records, found = _steps(engine, answers.rows, reward_ids(config, tokenizer), console)
    else:
        records, found = _answers(engine, answers.rows, console)
    if config.scores_file is not None:
        lines = (json.dumps({"where": row.where, **record}) for row, record in zip(answers.rows, records, strict=True))
        atomic_write_text(Path(config.scores_file), "".join(f"{line}\n" for line in lines))
        console.print(f"scores: {config.scores_file}")
    return found


def _require(config: EvalConfig, engine: Engine) -> None:
    if config.process_reward and engine.num_scores is not None:
        what = "the model scores whole answers; process rewards are of a model that writes"
        raise ConfigError(what, where="process_reward", fix="set it to false")
    if config.tasks or config.eval_with_do_generation or config.stride is not None:
        what = "a reward model scores answers and writes none; tasks, generation and windows are not for it"
        raise ConfigError(what, where=config.model_name_or_path, fix="give a file of answers alone")
    if config.max_length is not None and config.max_length > engine.context_length:
        what = f"max_length {config.max_length} is longer than the model's context of {engine.context_length} tokens"
        raise ConfigError(what, where="max_length", fix=f"set it to at most {engine.context_length}")


def _answers(
    engine: Engine, rows: Sequence[Answered], console: Console
) -> tuple[list[Mapping[str, float]], dict[str, Any]]:
    scores = engine.score_rows(rows)
    pairs = [of for of in scores if len(of) == 2]
    found: dict[str, Any] = {"num_rows": len(rows)}
    if pairs:
        means = {"score_chosen": fmean(a for a, _ in pairs), "score_rejected": fmean(b for _, b in pairs)}
        found |= _share(sum(a > b for a, b in pairs), len(pairs), "pairs", console) | means
        found["margin"] = means["score_chosen"] - means["score_rejected"]
        console.print(", ".join(f"{name.replace('_', ' ')} {found[name]:.4f}" for name in (*means, "margin")))
    single = [(row.labels[0], of[0]) for row, of in zip(rows, scores, strict=True) if len(of) == 1]
    for name, wanted in (("good", 1.0), ("bad", 0.0), ("not judged", math.nan)):
        own = [score for label, score in single if label == wanted or (math.isnan(label) and math.isnan(wanted))]
        if own:
            found[f"score_{name.replace(' ', '_')}"] = fmean(own)
            console.print(f"{len(own):,} answers, {name}: mean score {fmean(own):.4f}")
    records = [{"chosen": of[0], "rejected": of[1]} if len(of) == 2 else {"score": of[0]} for of in scores]
    return list(records), found


def _steps(
    engine: Engine, rows: Sequence[Answered], tokens: tuple[int, int], console: Console
) -> tuple[list[Mapping[str, object]], dict[str, Any]]:
    scores = engine.score_steps(rows, tokens)
    pairs = [
        (p > 0.5, label > 0.5)
        for row, of in zip(rows, scores, strict=True)
        for p, label in zip(of, row.step_labels, strict=True)
    ]
    found = _share(sum(ours == theirs for ours, theirs in pairs), len(pairs), "steps", console)
    return [{"steps": list(of)} for of in scores], {"num_rows": len(rows)} | found


def _share(right: int, count: int, what: str, console: Console) -> dict[str, Any]:
    low, high = wilson(right, count)
    console.print(
        f"accuracy {right / count:.2%} on {count:,} {what} (95 % confidence interval {low:.2%} to {high:.2%})"
    )
    return {"accuracy": right / count, "accuracy_low": low, "accuracy_high": high, f"num_{what}": count}
