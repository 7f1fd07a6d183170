"""Configuration of ``oarsmith eval``: how well a model predicts a file, or does at tasks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, Strings
from .groups import ModelKeys, RuntimeKeys
from .inference import AdapterKeys, WeightKeys
from .preferences import ProcessKeys


class EvalConfig(ModelKeys, AdapterKeys, WeightKeys, ProcessKeys, RuntimeKeys):
    """All keys of ``oarsmith eval``."""

    title: ClassVar[str] = "Evaluation"
    command: ClassVar[str] = "eval"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset_name_or_path")

    dataset_name_or_path: str | None = Field(
        None,
        description="What to predict: a text file (.txt), documents, or rows with answers, in any format that training "
        "reads. Of documents the perplexity is measured, of rows the loss and accuracy on their answers; a reward "
        "model scores the answers.",
    )
    dataset_format: Literal["auto", "src_tgt", "alpaca", "sharegpt", "messages", "text"] = Field(
        "auto", description="What a row looks like. auto: recognised by the first row's fields."
    )
    on_malformed: Literal["error", "skip"] = Field(
        "error", description="A malformed row: stop with its file and line, or leave it out and count it."
    )
    max_length: Int | None = Field(
        None,
        ge=2,
        description="Tokens that are looked at together: the window over a text, the longest row. Not given: the "
        "model's context, but at most 2048.",
    )
    stride: Int | None = Field(
        None,
        ge=1,
        description="Tokens between two windows over a text; the overlap is context. Smaller is more exact and slower. "
        "Not given: half of max_length.",
    )
    eval_with_do_generation: Bool = Field(
        False, description="Rows with answers: also let the model answer, and compare: bleu4, rouge1, rouge2, rougel."
    )
    max_new_tokens: Int = Field(256, ge=1, description="eval_with_do_generation: longest answer, in tokens.")
    tasks: Strings = Field(
        (), description="Instead of a file: tasks of lm-evaluation-harness by name, separated by commas."
    )
    include_path: str | None = Field(None, description="tasks: a folder with task files (YAML) of your own.")
    num_fewshot: Int | None = Field(
        None, ge=0, description="tasks: solved examples before each question. Not given: what the task says."
    )
    limit: Float | None = Field(
        None, gt=0, description="tasks: only this many questions of each, or a share of them below 1. Not given: all."
    )
    apply_chat_template: Bool = Field(False, description="tasks: ask through the model's chat template.")
    batch_size: Int = Field(8, ge=1, description="Answers generated at the same time.")
    scores_file: str | None = Field(
        None, description="Reward models: where the scores go, a JSON object for each row in the order of the rows."
    )
    output_file: str | None = Field(None, description="Where the numbers go as JSON.")
