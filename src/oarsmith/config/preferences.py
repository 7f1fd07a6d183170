"""Keys of the commands that train on judged answers (dpo, kto, reward): where the rows are and how they are cut."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, Int, JobConfig, Words
from .groups import LeftOutKeys


class PromptKeys(JobConfig):
    title: ClassVar[str] = "Data"

    max_prompt_len: Int | None = Field(
        None,
        ge=1,
        description="Tokens a prompt keeps where it and its answers are together longer than max_length and dropping "
        "old turns is not enough; then the answers are cut in proportion. Not given: 2048, or half of max_length where "
        "that is less.",
    )


class PreferenceDataKeys(PromptKeys, LeftOutKeys):
    title: ClassVar[str] = "Data"

    dataset_name_or_path: str = Field(
        description="Training rows: a file (jsonl, json, csv, parquet), a directory with train.* and optionally dev.* "
        "files, or the name of a dataset on the Hugging Face hub. The format is recognised by the fields: PaddleNLP's "
        "src/tgt/response/sort, TRL's prompt/chosen/rejected and prompt/completion/label, ShareGPT's, HH's.",
    )
    eval_dataset_path: str | None = Field(
        None, description="Rows to evaluate on. Not given: the dev.* file beside the training rows, if there is one."
    )
    eval_split_ratio: Float = Field(
        0.0, ge=0, lt=1, description="Share of the training rows kept out of training to evaluate on (0.05 is 5 %)."
    )
    max_length: Int = Field(
        4096,
        ge=4,
        description="Tokens in one row of a batch, and of the longest prompt with all its answers (the prompt counts "
        "once). Longer ones are cut, and counted.",
    )
    zero_padding: Bool = Field(
        True,
        description="Pack several prompts with their answers into each row of max_length tokens (best fit), isolated "
        "from each other. false: one prompt a row. PaddleNLP always packs; its greedy_zero_padding is this.",
    )
    on_malformed: Literal["error", "skip"] = Field(
        "error",
        description="What to do with a row that cannot be read or is no judgement (equal scores, empty answers): "
        "stop and name it, or leave it out and count it.",
    )


class StepKeys(JobConfig):
    title: ClassVar[str] = "Judged steps"

    step_separator: str = Field(
        "\n",
        min_length=1,
        description="Text put behind each judged step; the step is judged at its last token. PaddleNLP's "
        "placeholder_token, such as 'ки', is another name of it.",
    )


class ProcessKeys(StepKeys):
    title: ClassVar[str] = "Judged steps"

    process_reward: Bool = Field(
        False,
        description="Rows are single answers whose steps are judged (process rewards), not pairs. The model stays one "
        "that writes: of two tokens the likelier one says how good a step is.",
    )
    reward_tokens: Words = Field(
        ("+", "-"), description="process_reward: the tokens for a good step and for a bad one, separated by a comma."
    )
