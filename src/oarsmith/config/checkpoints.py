"""Configurations of the commands that rewrite weights on disk: ``convert`` and ``merge-adapter``."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .base import Bool, Float, JobConfig


class ConvertConfig(JobConfig):
    """All keys of ``oarsmith convert``."""

    title: ClassVar[str] = "Conversion"
    command: ClassVar[str] = "convert"
    positional: ClassVar[tuple[str, ...]] = ("src", "dst")

    src: str = Field(
        description="What to read: a model directory (Hugging Face safetensors or pytorch_model.bin, PaddleNLP), a "
        "GGUF file, or a LoRA adapter (PEFT, PaddleNLP)."
    )
    dst: str = Field(description="What to write: a directory (for gguf: a file, or the directory for model.gguf).")
    to: Literal["hf", "bin", "gguf", "paddle"] = Field(
        "hf",
        description="Layout of dst. hf: safetensors. bin: pytorch_model.bin. gguf: llama.cpp. paddle: PaddleNLP.",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Number format of the written weights. auto: that of the source; quantized GGUF weights become "
        "bf16. For gguf see gguf_type.",
    )
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q4_k"] = Field(
        "bf16",
        description="What matrices are stored as in a GGUF file, rounded to nearest as llama.cpp does; 'oarsmith "
        "quantize --layout gguf' calibrates Q8_0 and Q4_0.",
    )
    with_tokenizer: Bool = Field(
        True, description="Put the tokenizer into a GGUF file; without it llama.cpp computes, but reads no text."
    )
    paddle_layout: Literal["safetensors", "pdparams"] = Field(
        "safetensors", description="PaddleNLP's unified safetensors layout, or its pickled model_state.pdparams."
    )
    max_shard_gb: Float = Field(5.0, gt=0, description="Larger models are cut into files of about this many gigabytes.")
    model_name_or_path: str | None = Field(
        None, description="For an adapter: its base model. Not given: the one the adapter names."
    )
    overwrite: Bool = Field(False, description="Replace dst if it exists.")


class MergeAdapterConfig(JobConfig):
    """All keys of ``oarsmith merge-adapter``."""

    title: ClassVar[str] = "Merging an adapter"
    command: ClassVar[str] = "merge-adapter"
    positional: ClassVar[tuple[str, ...]] = ("adapter", "output_dir")

    adapter: str = Field(description="The adapter (PEFT layout), or a run folder that holds one.")
    model_name_or_path: str | None = Field(None, description="The base model. Not given: the one the adapter names.")
    any_base: Bool = Field(
        False, description="Merge also into another base than the adapter was trained on, where its file tells."
    )
    output_dir: str | None = Field(
        None, description="Where the merged model goes. Not given: ADAPTER/merged, or ADAPTER/unmerged."
    )
    unmerge: str | None = Field(
        None,
        description="A model that the adapter was merged into: take it off again and write the base, as far as "
        "rounding left it. The base itself is not needed; where it is there, the two are compared. Not for methods "
        "that do more than to add to weights.",
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Number format of the weights that are written. auto: that of the model that is read."
    )
    kl_budget: Float = Field(
        1e-2,
        gt=0,
        description="The merge is refused if the merged model's next-token probabilities differ from base plus "
        "adapter by "
        "more than this (mean KL divergence, nats per token).",
    )
    requantize: Bool = Field(
        False,
        description="Write the merged model in the layout of its quantized base (GPTQ, AWQ, compressed-tensors, FP8), "
        "on the base's scales. Changes of less than half a step are lost: the proof shows how much that is.",
    )
    overwrite: Bool = Field(False, description="Replace output_dir if it exists.")
