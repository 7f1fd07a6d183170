"""Combinations of values that cannot work, found before anything heavy is imported.

Each line says when a configuration is impossible, why, and what to do; ``{key}`` stands for the value of a key.
"""

from __future__ import annotations

import os
from typing import Any

from oarsmith.errors import ConfigError

from .base import JobConfig
from .bench import BenchConfig
from .checkpoints import ConvertConfig, MergeAdapterConfig
from .eval import EvalConfig
from .groups import DataKeys, SamplingKeys
from .impossible import Impossible
from .inference import GenerateConfig, ModeKeys, SpeculativeKeys, WeightKeys
from .merge_combinations import MERGE
from .policy_combinations import POLICY
from .preferences import PreferenceDataKeys
from .preprocess_combinations import PREPROCESS
from .quantize_combinations import QUANTIZE
from .training_combinations import TRAINING

IMPOSSIBLE: tuple[Impossible[Any], ...] = (
    *TRAINING,
    Impossible(
        MergeAdapterConfig,
        lambda c: c.requantize and c.dtype != "auto",
        "requantize writes the numbers that the base has; dtype {dtype} asks for others",
        "give only one of them",
    ),
    Impossible(
        MergeAdapterConfig,
        lambda c: c.unmerge is not None and (c.requantize or c.any_base),
        "unmerge takes an adapter off: nothing is quantized again, and no base is asked for",
        "leave requantize and any_base out",
    ),
    *QUANTIZE,
    *POLICY,
    *MERGE,
    Impossible(
        DataKeys,
        lambda c: c.src_length is not None and c.src_length >= c.max_length,
        "src_length {src_length} leaves no room for an answer in max_length {max_length}",
        "lower src_length or raise max_length",
    ),
    Impossible(
        PreferenceDataKeys,
        lambda c: c.max_prompt_len is not None and c.max_prompt_len >= c.max_length,
        "max_prompt_len {max_prompt_len} leaves no room for answers in max_length {max_length}",
        "lower max_prompt_len or raise max_length",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.decode_strategy == "greedy" and (bool(c.temperature) or c.asks_for_draws),
        "greedy always takes the likeliest token; temperature, filters and several answers would have no effect",
        "remove them, or set decode_strategy to sampling",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.decode_strategy == "sampling" and c.temperature == 0,
        "sampling at temperature 0 is not defined",
        "raise temperature, or set decode_strategy to greedy",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.min_new_tokens > c.max_new_tokens,
        "min_new_tokens {min_new_tokens} is more than max_new_tokens {max_new_tokens}",
        "lower min_new_tokens or raise max_new_tokens",
    ),
    Impossible(
        SamplingKeys,
        lambda c: len(c.constraints) > 1,
        "an answer can be held to one of json_schema, json_object, regex, grammar and choices",
        "keep one of them",
    ),
    Impossible(
        SamplingKeys,
        lambda c: bool(c.constraints) and c.ignore_eos,
        "with ignore_eos an answer that is held to something could not end",
        "remove ignore_eos",
    ),
    Impossible(
        SpeculativeKeys,
        lambda c: c.ngram_min > c.ngram_max,
        "ngram_min {ngram_min} is more than ngram_max {ngram_max}",
        "lower ngram_min or raise ngram_max",
    ),
    Impossible(
        GenerateConfig,
        lambda c: c.num_beams > 1 and c.decode_strategy == "sampling",
        "a beam search does not draw, so temperature, filters and best_of would have no effect",
        "remove them, or num_beams",
    ),
    Impossible(
        GenerateConfig,
        lambda c: 1 < c.num_beams < c.n,
        "n {n} is more than num_beams {num_beams}",
        "raise num_beams or lower n",
    ),
    Impossible(
        GenerateConfig,
        lambda c: c.best_of is not None and c.best_of < c.n,
        "best_of {best_of} is less than n {n}",
        "raise best_of or lower n",
    ),
    Impossible(
        GenerateConfig,
        lambda c: c.output_file is None and (c.logprobs is not None or c.prompt_logprobs is not None),
        "logprobs and prompt_logprobs go to output_file, and there is none",
        "give input_file and output_file",
    ),
    Impossible(
        GenerateConfig,
        lambda c: (c.prompt is None) == (c.input_file is None),
        "give a prompt or an input_file, and not both",
        "oarsmith generate MODEL 'your question', or --input_file rows.jsonl --output_file answers.jsonl",
    ),
    Impossible(
        GenerateConfig,
        lambda c: (c.input_file is None) != (c.output_file is None),
        "input_file and output_file belong together",
        "give both",
    ),
    Impossible(
        ModeKeys,
        lambda c: c.mode == "static" and (c.dtype, c.device, c.adapter, c.speculative) != ("auto", "auto", None, None),
        "a compiled package is what it is; dtype, device, adapter and speculative would have no effect",
        "export the model with them (an adapter merged first), or remove them",
    ),
    Impossible(
        WeightKeys,
        lambda c: c.weights != "none" and isinstance(c, ModeKeys) and c.mode == "static",
        "a compiled package has the weights it was made with",
        "remove weights",
    ),
    Impossible(
        GenerateConfig,
        lambda c: c.mode == "static" and c.prompt_logprobs is not None,
        "a compiled package gives no log-probabilities of prompts",
        "remove prompt_logprobs, or use the model itself",
    ),
    Impossible(
        BenchConfig,
        lambda c: c.mode == "static" and bool(c.compare),
        "other engines do not read a compiled package",
        "measure the package alone, and the model with compare",
    ),
    Impossible(
        SamplingKeys,
        lambda c: c.raw and c.system is not None,
        "raw text has no chat template, so the system message would have no effect",
        "remove raw or system",
    ),
    Impossible(
        EvalConfig,
        lambda c: (c.dataset_name_or_path is None) == (not c.tasks),
        "give a file or tasks, and not both",
        "oarsmith eval MODEL FILE, or oarsmith eval MODEL --tasks NAME",
    ),
    Impossible(
        EvalConfig,
        lambda c: not c.tasks and (c.include_path or c.num_fewshot or c.limit or c.apply_chat_template),
        "include_path, num_fewshot, limit and apply_chat_template are for tasks, and none is given",
        "remove them, or add --tasks NAME",
    ),
    Impossible(
        EvalConfig,
        lambda c: bool(c.tasks) and (c.eval_with_do_generation or c.stride is not None),
        "eval_with_do_generation and stride are for a file; tasks bring their own rules",
        "remove them, or tasks",
    ),
    Impossible(
        EvalConfig,
        lambda c: bool(c.tasks) and (c.process_reward or c.scores_file is not None),
        "process_reward and scores_file are for a file of judged answers; tasks bring their own rules",
        "remove them, or tasks",
    ),
    Impossible(
        EvalConfig,
        lambda c: c.stride is not None and c.max_length is not None and c.stride > c.max_length,
        "stride {stride} is longer than the window of max_length {max_length}: tokens between windows would be skipped",
        "lower stride, or raise max_length",
    ),
    Impossible(
        ConvertConfig,
        lambda c: os.path.abspath(c.src) == os.path.abspath(c.dst),
        "src and dst are the same place ({src})",
        "write to another directory",
    ),
    *PREPROCESS,
)


def check_combinations(config: JobConfig, where: str | None = None) -> None:
    """Refuse a configuration that cannot work.

    Raises:
        ConfigError: the first impossible combination, with its reason and what to do.
    """
    for line in IMPOSSIBLE:
        if isinstance(config, line.keys) and line.when(config):
            values = config.model_dump()
            raise ConfigError(line.reason.format(**values), where=where, fix=line.fix.format(**values))
