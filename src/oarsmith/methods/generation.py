"""Evaluation by generation: the model answers the questions of rows, and its answers are compared with the rows'."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oarsmith.atomic import atomic_write_text
from oarsmith.data.conversations import DatasetFormat, to_conversation
from oarsmith.data.records import OnMalformed, read_records
from oarsmith.data.spans import RefusedError, SpanEncoder
from oarsmith.engine import Engine, Sampling
from oarsmith.errors import DataError
from oarsmith.methods.generation_metrics import GenerationScores, require_metrics, score_answers
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer

OUTPUT_FILE = "generated_output.json"
Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """The last question of a row, and its answer.

    Attributes:
        messages: the conversation up to the question.
        tools, context: function schemas and further variables for the chat template.
    """

    messages: tuple[Message, ...]
    reference: str
    where: str
    tools: tuple[Mapping[str, Any], ...] | None = None
    context: Mapping[str, Any] = field(default_factory=dict)


def read_questions(
    source: str,
    *,
    split: str | None = None,
    dataset_format: DatasetFormat | None = None,
    on_malformed: OnMalformed = "error",
    only: Collection[str] | None = None,
) -> list[Question]:
    """The rows of a data source that end with an answer in text, in their order; documents and calls have none.

    Args:
        only: file:line of the rows that are wanted (those held out of training); None: all.

    Raises:
        DataError: a row that cannot be read, or none that ends with an answer.
    """
    found = []
    for record in read_records(source, split, on_malformed=on_malformed):
        if only is not None and record.where not in only:
            continue
        try:
            conversation = to_conversation(record, dataset_format)
        except DataError:
            if on_malformed == "error":
                raise
            continue
        ends = [n for n, m in enumerate(conversation.messages) if m["role"] == "assistant" and m["content"].strip()]
        if ends and ends[-1] > 0:
            answer = conversation.messages[ends[-1]]["content"]
            asked = conversation.messages[: ends[-1]]
            found.append(Question(asked, answer, record.where, conversation.tools, conversation.context))
    if not found:
        raise DataError(
            "no row has a question with an answer to compare with",
            where=source,
            fix="give rows of questions and answers, or set eval_with_do_generation to false",
        )
    return found


def generate_and_score(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    sampling: Sampling | None = None,
    *,
    batch_size: int = 8,
    output_file: Path | None = None,
) -> GenerationScores:
    """Let the model answer, and score the answers; the model's mode is restored.

    Prompts are tokenized as in training. Those that leave the context no room for an answer get an empty one.

    Args:
        sampling: not given: greedy, up to 256 tokens.
        output_file: gets a line of JSON for each question: ``output`` and ``tgt``, the reference.

    Raises:
        MissingExtraError: sacrebleu or rouge-score is missing.
        DataError: the chat template refuses a question.
    """
    require_metrics("evaluation by generation")
    training = model.training
    model.eval()
    try:
        # Without what prefixes are kept for later the cache stays as small as the questions of a batch.
        engine = Engine(model, tokenizer, batch_size=batch_size, prefix_caching=False)
        prompts = [_encode(question, tokenizer) for question in questions]
        fitting = [n for n, ids in enumerate(prompts) if len(ids) < engine.context_length]
        completions = engine.generate([prompts[n] for n in fitting], sampling)
    finally:
        model.train(training)
    answers = [""] * len(questions)
    for number, completion in zip(fitting, completions, strict=True):
        answers[number] = completion.text
    if output_file is not None:
        pairs = ({"output": a, "tgt": q.reference} for a, q in zip(answers, questions, strict=True))
        atomic_write_text(output_file, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    return score_answers(answers, [question.reference for question in questions])


def _encode(question: Question, tokenizer: Tokenizer) -> list[int]:
    encoder = SpanEncoder(tokenizer, question.context)
    try:
        return encoder.encode(encoder.render(question.messages, question.tools, prompt=True))
    except RefusedError as error:
        detail = f": {error.detail}" if error.detail else ""
        raise DataError(f"{error.reason}{detail}", where=question.where, fix="repair or remove the row") from error
