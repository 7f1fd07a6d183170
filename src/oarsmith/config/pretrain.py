"""Configuration of ``oarsmith pretrain``: next-token training on an indexed corpus, from scratch or from weights."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from .base import Bool, Float, Int, JobConfig
from .groups import ModelKeys
from .train import TrainConfig


def split_shares(split: str) -> tuple[float, float, float]:
    """``949,50,1`` (or with slashes) as shares of the whole; missing ones are 0.

    Raises:
        ValueError: not one to three numbers of at least 0 with a positive sum.
    """
    parts = [part.strip() for part in split.replace("/", ",").split(",") if part.strip()]
    numbers = [float(part) for part in parts] + [0.0] * (3 - len(parts))
    if len(numbers) != 3 or not all(0 <= number < float("inf") for number in numbers) or not sum(numbers) > 0:
        raise ValueError("must be one to three numbers of at least 0, as 949,50,1")
    train, evaluation, test = (number / sum(numbers) for number in numbers)
    return train, evaluation, test


def _checked_split(split: str) -> str:
    split_shares(split)
    return split


Split = Annotated[str, AfterValidator(_checked_split)]


class CorpusKeys(JobConfig):
    title: ClassVar[str] = "Corpus"

    input_dir: str = Field(
        description="The corpus, as 'oarsmith preprocess' or Megatron write it (.bin and .idx): the path of a pair "
        "without its ending, a directory (every pair in it, equal weights), or a blend '0.7 path/a 0.3 path/b'."
    )
    split: Split = Field(
        "949,50,1", description="Shares of the documents for training, evaluation and the final test, in this order."
    )
    max_length: Int = Field(1024, ge=2, description="Tokens in one row of a batch.")
    isolate_documents: Bool = Field(
        False,
        description="Documents in a row cannot see each other and count positions from 0. false: a row is one stream, "
        "as in GPT-2 and Megatron.",
    )
    data_cache: str | None = Field(
        None,
        description="Folder for the index of the samples where the corpus's own folder cannot be written to. Not "
        "given: index-cache beside the corpus.",
    )
    share_folder: Bool = Field(
        False, description="All machines see the same folders: the index is built once, not once on each machine."
    )


class PretrainConfig(ModelKeys, CorpusKeys, TrainConfig):
    """All keys of a pretraining run."""

    title: ClassVar[str] = "Pretraining"
    command: ClassVar[str] = "pretrain"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "input_dir")

    output_dir: str = Field(
        "runs/pretrain", description="The run folder: checkpoints, reports, resolved configuration."
    )
    num_train_epochs: Float = Field(1.0, gt=0, description="Passes over the corpus. max_steps wins where it is given.")
    continue_training: Bool | None = Field(
        None,
        description="Start from the weights in model_name_or_path; false: from fresh ones, of which only config.json "
        "and the tokenizer are read. Not given: true where there are weights.",
    )
    num_hidden_layers: Int | None = Field(
        None, ge=1, description="From scratch: this many blocks instead of those of config.json."
    )
