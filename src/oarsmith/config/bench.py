"""Configuration of ``oarsmith bench``: how fast a model answers, beside other engines."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .base import Int, _to_words
from .groups import ModelKeys, RuntimeKeys
from .inference import AdapterKeys, ModeKeys, SpeculativeKeys, WeightKeys

Peers = Annotated[tuple[Literal["transformers", "llama.cpp", "openvino-genai"], ...], BeforeValidator(_to_words)]


class BenchConfig(ModelKeys, AdapterKeys, WeightKeys, ModeKeys, SpeculativeKeys, RuntimeKeys):
    """All keys of ``oarsmith bench``."""

    title: ClassVar[str] = "Measurement"
    command: ClassVar[str] = "bench"
    positional: ClassVar[tuple[str, ...]] = ("model_name_or_path",)

    requests: str | None = Field(
        None,
        description="Rows to answer, in the formats of generate's input_file; or rows of input_tokens. output_tokens "
        "of a row is the length of its answer. Not given: prompts of random tokens are made.",
    )
    num_requests: Int = Field(16, ge=1, description="Requests that are made; of a file at most as many are taken.")
    input_tokens: Int = Field(256, ge=1, description="Length of a made prompt.")
    output_tokens: Int = Field(64, ge=2, description="Length of every answer: nothing ends it before.")
    concurrency: Int = Field(8, ge=1, description="Requests answered at the same time where throughput is measured.")
    single_requests: Int = Field(
        4, ge=1, description="Requests answered one after another, alone, where latency is measured."
    )
    warmup: Int = Field(1, ge=0, description="Rounds before the measurement, with short answers.")
    repetitions: Int = Field(
        3, ge=1, description="Measurements of each engine, each in a process of its own; engines take turns."
    )
    compare: Peers = Field(
        (),
        description="Other engines that answer the same requests, separated by commas: transformers, llama.cpp "
        "(llama-cpp-python), openvino-genai. Each must be installed.",
    )
    gguf_file: str | None = Field(
        None,
        description="The model for llama.cpp and openvino-genai. Not given: it is converted, for llama.cpp to the "
        "format that the others compute in, for openvino-genai to fp16, which it reads.",
    )
    openvino_model: str | None = Field(
        None,
        description="The model for openvino-genai as a directory that was exported for it. Not given: a GGUF file.",
    )
    output_dir: str = Field("bench", description="Folder for bench.json and bench.png.")
