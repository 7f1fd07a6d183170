"""Keys of ``oarsmith merge`` beside values with which they cannot work; and those that mean nothing there."""

from __future__ import annotations

from typing import Any

from .impossible import Impossible
from .merge import MergeConfig, PaddleKeys

_ANYWHERE = ("model_path_list", "model_path_str", "lora_model_path", "copy_file_list", "base_model_path")
FLAGS = tuple(name for name in PaddleKeys.model_fields if name not in _ANYWHERE)
SEARCH = ("search_over", "search_range", "search_steps", "search_groups", "search_trials")


def by_flags(config: MergeConfig) -> bool:
    """Whether the models are named by PaddleNLP's flags."""
    return bool(config.model_path_list or config.model_path_str or config.lora_model_path)


MERGE: tuple[Impossible[Any], ...] = (
    Impossible(
        MergeConfig,
        lambda c: c.search != "none" and not c.evaluate,
        "search {search} has nothing to judge merges by",
        "name files: --evaluate FILE",
    ),
    Impossible(
        MergeConfig,
        lambda c: c.search != "none" and (len(c.search_range) != 2 or not c.search_range[0] < c.search_range[1]),
        "{search_range} is no range",
        "write two numbers: --search_range 0,1",
    ),
    Impossible(
        MergeConfig,
        lambda c: bool(c.experts) and (c.search != "none" or bool(c.evaluate) or c.adapter_rank is not None),
        "a mixture of experts is neither searched nor judged, and is no adapter",
        "leave search, evaluate and adapter_rank out; oarsmith eval judges it",
    ),
    Impossible(
        MergeConfig,
        lambda c: bool(c.experts) and c.sparsify_type is not None,
        "experts are taken as they are; nothing is sparsified",
        "leave sparsify_type out, or make the experts by merges of their own",
    ),
    Impossible(
        MergeConfig,
        lambda c: bool(c.experts) and (c.merge_method is not None or c.parameters is not None),
        "experts are not merged, so merge_method and parameters say nothing",
        "leave them out",
    ),
    Impossible(
        MergeConfig,
        lambda c: bool(c.experts) and (c.tokenizer is not None or c.tokenizer_source is not None),
        "a mixture has its base's vocabulary",
        "leave tokenizer and tokenizer_source out",
    ),
    Impossible(
        MergeConfig,
        lambda c: by_flags(c) and c.parameters is not None,
        "flags have their own names for the parameters of a recipe",
        "use weight_list, reserve_p, epsilon, slerp_alpha and so on, or write a recipe",
    ),
    Impossible(
        MergeConfig,
        lambda c: not by_flags(c) and c.base_model_path is not None,
        "base_model_path belongs to flags, and no models are given by flags",
        "write base_model in the recipe, or name models: --model_path_list A B",
    ),
    Impossible(
        MergeConfig,
        lambda c: c.adapter_rank is not None and (c.tokenizer is not None or c.tokenizer_source is not None),
        "an adapter has its base's vocabulary",
        "leave tokenizer and tokenizer_source out, or write a model",
    ),
)
