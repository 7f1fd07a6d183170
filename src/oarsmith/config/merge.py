"""Configuration of ``oarsmith merge``: mergekit's recipes and PaddleNLP's flags, and what is done with the result."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from .base import Bool, Float, Floats, Int, JobConfig, Strings, Words


def _to_json(value: object) -> object:
    """A list or object, or the JSON text of one."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"must be JSON ({error})") from None
    return value


def _to_model(value: object) -> object:
    """A model's path, also of mergekit's object for one."""
    return value if isinstance(value, (str, dict)) else str(value)


Entries = Annotated[list[Any], BeforeValidator(_to_json)]
Object = Annotated[dict[str, Any], BeforeValidator(_to_json)]
Model = Annotated[str | dict[str, Any], BeforeValidator(_to_model)]
DtypeName = Literal["auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]


class RecipeKeys(JobConfig):
    title: ClassVar[str] = "Recipe (mergekit's YAML)"

    merge_method: str | None = Field(
        None,
        description="linear, slerp, nuslerp, multislerp, karcher: of weights. task_arithmetic, ties, dare_linear, "
        "dare_ties, della, della_linear, della_ties, breadcrumbs, breadcrumbs_ties, sce, model_stock, nearswap, "
        "arcee_fusion, ram, ramplus_tl: of what models add to base_model. passthrough: layers as they are. "
        "docs/merging.md says what each does.",
    )
    models: Entries | None = Field(
        None,
        description="Models of all layers: a list of {model: PATH, parameters: {weight: ...}}. PATH is a directory, a "
        "GGUF file, or MODEL+ADAPTER.",
    )
    slices: Entries | None = Field(
        None,
        description="Or layer by layer: a list of {sources: [{model, layer_range: [first, one after], parameters}]}.",
    )
    modules: Object | None = Field(None, description="Or mergekit's form for models of several parts, with one part.")
    base_model: Model | None = Field(
        None, description="What the models were trained from. Config and tokenizer are its, where it is given."
    )
    parameters: Object | None = Field(
        None,
        description="Numbers of the method. Each is a value, a list (a gradient over layers), or a list of {filter: "
        "part of a tensor's name, value}.",
    )
    dtype: DtypeName | None = Field(
        None, description="Number format of the result. Not given: each tensor's own. Arithmetic is float32 always."
    )
    out_dtype: DtypeName | None = Field(None, description="The same; it wins over dtype, as in mergekit.")
    tokenizer_source: str | None = Field(
        None,
        description="Align vocabularies token by token. union: tokens of all models; base: those of base_model; or a "
        "model's path. Not given: vocabularies must be the same size and are taken as they are.",
    )
    tokenizer: Object | None = Field(
        None, description="The same with more to say: {source, tokens: {TOKEN: {source, force}}, pad_to_multiple_of}."
    )
    chat_template: str | None = Field(
        None, description="auto: the one most models have; a built-in's name, a file, or the template itself."
    )
    sparsify_type: str | None = Field(
        None,
        description="What is done to each model's delta before any method: none, trim (keep the largest), dare (drop "
        "at random), magprune (drop at random by rank), breadcrumbs (drop the largest and the smallest).",
    )


class MixtureKeys(JobConfig):
    title: ClassVar[str] = "Mixture of experts (mergekit-moe's YAML)"

    experts: Entries | None = Field(
        None,
        description="Make a Mixtral of dense models: a list of {source_model: PATH, positive_prompts: [...], "
        "negative_prompts: [...]}. Everything but the feed-forward parts is base_model's.",
    )
    gate_mode: Literal["hidden", "cheap_embed", "random"] = Field(
        "hidden",
        description="Where routers come from. hidden: the states that base_model has for each expert's prompts. "
        "cheap_embed: the embeddings of their tokens, the same in every layer. random: to be trained.",
    )
    experts_per_token: Int = Field(2, ge=1, description="Experts that compute each token.")


class PaddleKeys(JobConfig):
    title: ClassVar[str] = "Flags (PaddleNLP's names and definitions)"

    model_path_list: Words = Field(
        (), description="The models, instead of a recipe. merge_method is then PaddleNLP's: see docs/merging.md."
    )
    model_path_str: str | None = Field(None, description="The same, separated by commas.")
    base_model_path: str | None = Field(
        None, description="What they were trained from: deltas are merged and added to it, whatever the method."
    )
    lora_model_path: str | None = Field(None, description="Put this adapter into base_model_path (or the one model).")
    weight_list: Floats = Field((), description="A weight for each model. Not given: equal ones.")
    normalize: Bool = Field(True, description="Divide by the sum of weights that count.")
    merge_type: Literal["linear", "ties", "slerp"] | None = Field(
        None, description="How numbers are put together, where merge_method does not say it."
    )
    slerp_alpha: Float = Field(0.5, ge=0, le=1, description="slerp: how far from the first model to the second.")
    slerp_normalize_eps: Float = Field(1e-8, ge=0, description="slerp: shorter vectors are not normalized.")
    slerp_dot_threshold: Float = Field(0.9995, ge=0, le=1, description="slerp: beyond this cosine along the line.")
    ties_elect_type: Literal["sum", "count"] = Field("sum", description="ties: signs are elected by sum or by count.")
    reserve_p: Float = Field(0.7, gt=0, le=1, description="Share of a delta that is kept.")
    rescale: Bool = Field(True, description="Make up for what was dropped.")
    epsilon: Float = Field(
        0.14,
        ge=0,
        lt=1,
        description="magprune: probabilities differ by this much between ranks.",
    )
    copy_file_list: Words = Field((), description="Further files to copy from the base, or else the first model.")


class SearchKeys(JobConfig):
    title: ClassVar[str] = "Judging and searching"

    evaluate: Strings = Field(
        (),
        description="Files to judge the models and the result by: text (perplexity), rows with answers (loss), or "
        "pairs of answers (how often the better one is likelier). Repeat the key for several.",
    )
    search: Literal["none", "grid", "evolution"] = Field(
        "none",
        description="Choose numbers of the recipe by the files of evaluate. grid: all combinations. evolution: CMA-ES. "
        "The recipe that was found is written beside the model.",
    )
    search_over: Words = Field(
        ("weight",), description="Parameters to choose, e.g. weight,density or t. Those of models: for each model."
    )
    search_range: Floats = Field((0.0, 1.0), description="Lowest and highest value.")
    search_steps: Int = Field(5, ge=2, description="grid: values of each parameter.")
    search_groups: Int = Field(
        1, ge=1, description="Groups of layers with values of their own (anchors of a gradient)."
    )
    search_trials: Int = Field(40, ge=1, description="Merges that are tried at most.")
    evaluate_rows: Int = Field(64, ge=1, description="Rows of each file, or windows of its text, that are used.")
    evaluate_length: Int = Field(512, ge=16, description="Tokens of a row or window at most.")


class MergeConfig(RecipeKeys, MixtureKeys, PaddleKeys, SearchKeys):
    """All keys of ``oarsmith merge``."""

    title: ClassVar[str] = "Merging"
    command: ClassVar[str] = "merge"
    positional: ClassVar[tuple[str, ...]] = ("output_path",)
    several: ClassVar[tuple[str, ...]] = ("model_path_list", "weight_list", "copy_file_list", "evaluate")

    output_path: str = Field(description="Where the result goes: a Hugging Face directory.")
    adapter_rank: Int | None = Field(
        None,
        ge=1,
        description="Write a LoRA adapter of this rank on base_model instead of a model: the best one of that rank "
        "(SVD) for each weight. So adapters are merged into an adapter, or one is extracted from a fine-tuned model.",
    )
    adapter_tolerance: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Lower ranks where the singular values left out are below this share of the largest.",
    )
    seed: Int = Field(0, ge=0, description="Random methods follow from it, the tensor's name and the model's place.")
    n_process: Int | None = Field(
        None,
        ge=1,
        description="Tensors at a time. Not given: one for each core, at most 8. Results do not depend on it.",
    )
    device: Literal["cpu"] = Field("cpu", description="Merges are bound by reading and writing, and run on the CPU.")
    max_shard_gb: Float = Field(5.0, gt=0, description="Larger models are cut into files of about this many gigabytes.")
    probe: Bool = Field(
        True, description="Compare the answers of the result with those of the models before it appears."
    )
    overwrite: Bool = Field(False, description="Replace output_path if it exists.")
