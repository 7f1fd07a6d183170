"""Configurations of ``oarsmith generate`` and ``oarsmith chat``."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .base import Bool, Float, Int, JobConfig
from .groups import ModelKeys, RuntimeKeys, SamplingKeys


class AdapterKeys(JobConfig):
    title: ClassVar[str] = "Adapter"

    adapter: str | None = Field(None, description="An adapter (PEFT layout) or a run folder that holds one.")
    any_base: Bool = Field(
        False, description="Take an adapter also on another base than it was trained on, where its file tells."
    )


class WeightKeys(JobConfig):
    title: ClassVar[str] = "Weights"

    weights: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Round the weights when the model is loaded, in groups of 32 with a scale each: int8 changes "
        "answers hardly ever and halves what is read for each token, int4 quarters it. none: as the files hold them.",
    )


def _nobody(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() in ("", "none") else value


# PaddleNLP's files say "None" where nobody guesses.
Guesser = Annotated[str | None, BeforeValidator(_nobody)]


class SpeculativeKeys(JobConfig):
    title: ClassVar[str] = "Speculative decoding"

    speculative: Guesser = Field(
        None,
        description="Who guesses tokens that the model then checks several at a time. ngram: what followed when the "
        "text last ended as it does now, which is right where answers repeat their prompt. Or the path of a smaller "
        "model with the same tokenizer. Answers are as likely as without.",
    )
    num_draft_tokens: Int = Field(4, ge=1, description="Most tokens that are guessed at a time.")
    ngram_min: Int = Field(1, ge=1, description="Tokens at the end of the text that must stand alike, for ngram.")
    ngram_max: Int = Field(3, ge=1, description="Tokens up to which a longer likeness is preferred, for ngram.")


class CacheKeys(JobConfig):
    title: ClassVar[str] = "Cache"

    cache_gib: Float | None = Field(
        None,
        gt=0,
        description="GiB for keys and values. Not given: as many as batch_size texts that fill the context need, but "
        "at most half of the memory that is free.",
    )

    cache_dtype: Literal["auto", "int8", "fp8"] = Field(
        "auto",
        description="int8: keep keys and values in 8 bits, in groups of 32 with a scale each: near half the memory, so "
        "twice as many texts at once. fp8: in E4M3. auto: as a quantized checkpoint says (kv_cache_scheme), else in "
        "the type they are computed in. A checkpoint's own scales are used where it has some of this kind.",
    )


class ModeKeys(JobConfig):
    title: ClassVar[str] = "Mode"

    mode: Literal["dynamic", "static"] = Field(
        "dynamic", description="static: model_name_or_path is a package that 'oarsmith export' compiled."
    )


class GenerateConfig(
    ModelKeys, AdapterKeys, WeightKeys, ModeKeys, SamplingKeys, SpeculativeKeys, CacheKeys, RuntimeKeys
):
    """All keys of ``oarsmith generate``: answer one prompt, or a file of prompts into a file."""

    title: ClassVar[str] = "Input and output"
    command: ClassVar[str] = "generate"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path", "prompt")

    prompt: str | None = Field(None, description="What to answer.")
    input_file: str | None = Field(
        None, description="Rows to answer (jsonl, json, csv, parquet; any format that training reads)."
    )
    output_file: str | None = Field(
        None,
        description="Where the answers to input_file go, one JSON object a line, in the order of the rows. It appears "
        "when all are there; until then they are kept beside it, and the same command goes on from them.",
    )
    overwrite_output_file: Bool = Field(
        False, description="Begin with the first row again although answers of an interrupted command are there."
    )
    on_malformed: Literal["error", "skip"] = Field(
        "error",
        description="A row of input_file that cannot be answered: stop and name it, or put what is wrong with it in "
        "the place of its answer.",
    )
    batch_size: Int = Field(8, ge=1, description="Rows of input_file answered at the same time.")
    stream: Bool = Field(True, description="Print a single answer while it is made.")
    n: Int = Field(1, ge=1, description="Answers to each prompt, each drawn anew; of a beam search the n best.")
    best_of: Int | None = Field(
        None, ge=1, description="Draw this many and keep the n that the model itself finds likeliest. Not given: n."
    )
    num_beams: Int = Field(
        1, ge=1, description="Beam search: keep this many beginnings, those that are likeliest as a whole. 1: none."
    )
    length_penalty: Float = Field(
        1.0,
        description="Beam search: an answer's log-probability is divided by its length to the power of it; above 0 "
        "longer answers are preferred.",
    )
    early_stopping: Literal["false", "true", "never"] = Field(
        "false",
        description="Beam search: true ends it with the first num_beams answers, false when a better one is unlikely, "
        "never when there can be none.",
    )
    logprobs: Int | None = Field(
        None,
        ge=0,
        description="output_file also gets the log-probability of every token, and this many of the likeliest tokens "
        "in its place; the model's own, before temperature and filters.",
    )
    prompt_logprobs: Int | None = Field(None, ge=0, description="The same for the tokens of the prompt.")

    @property
    def asks_for_draws(self) -> bool:
        return super().asks_for_draws or (self.n > 1 and self.num_beams == 1) or (self.best_of or 1) > 1


class ChatConfig(ModelKeys, AdapterKeys, WeightKeys, ModeKeys, SamplingKeys, SpeculativeKeys, CacheKeys, RuntimeKeys):
    """All keys of ``oarsmith chat``: a conversation in the terminal."""

    title: ClassVar[str] = "Conversation"
    command: ClassVar[str] = "chat"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    stream: Bool = Field(True, description="Print the answer while it is made.")
