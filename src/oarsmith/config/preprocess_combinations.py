"""Combinations of values that ``preprocess`` cannot run with (see ``combinations.py``)."""

from __future__ import annotations

from typing import Any

from .impossible import Impossible
from .preprocess import PreprocessConfig


def _differs(c: PreprocessConfig, *keys: str) -> bool:
    """Whether any of these keys has another value than its default."""
    return any(value != PreprocessConfig.model_fields[key].default for key, value in c if key in keys)


PREPROCESS: tuple[Impossible[Any], ...] = (
    Impossible(
        PreprocessConfig,
        lambda c: c.output_prefix is None and (c.merge or c.train_tokenizer is None),
        "no output_prefix: there is nowhere to write to",
        "oarsmith preprocess INPUT_PATH OUTPUT_PREFIX",
    ),
    Impossible(
        PreprocessConfig,
        lambda c: not (c.merge or c.train_tokenizer or c.tokenizer_name_or_path or c.model_name_or_path),
        "no tokenizer is named",
        "give --tokenizer_name_or_path DIRECTORY, or --train_tokenizer DIRECTORY to train one from the corpus",
    ),
    Impossible(
        PreprocessConfig,
        lambda c: c.train_tokenizer is not None and (c.tokenizer_name_or_path or c.model_name_or_path) is not None,
        "a tokenizer is named, and another one is to be trained",
        "remove tokenizer_name_or_path and model_name_or_path, or train_tokenizer",
    ),
    Impossible(
        PreprocessConfig,
        lambda c: c.merge and (c.dedup != "none" or c.train_tokenizer is not None or c.max_doc_num is not None),
        "merge copies documents as they are: dedup, train_tokenizer and max_doc_num would have no effect",
        "remove these keys, or merge",
    ),
    Impossible(
        PreprocessConfig,
        lambda c: c.dedup != "minhash" and _differs(c, "minhash_threshold", "minhash_num_perm"),
        "minhash keys are given but dedup is {dedup}: they would have no effect",
        "add --dedup minhash, or remove them",
    ),
    Impossible(
        PreprocessConfig,
        lambda c: (
            c.train_tokenizer is None
            and _differs(c, "vocab_size", "train_tokenizer_mb", "bos_token", "eos_token", "pad_token")
        ),
        "keys of a tokenizer to train are given, but none is trained: they would have no effect",
        "add --train_tokenizer DIRECTORY, or remove vocab_size, train_tokenizer_mb and the tokens",
    ),
    Impossible(
        PreprocessConfig,
        lambda c: c.engine == "local" and c.ray_address is not None,
        "a Ray cluster is named, but engine is local",
        "add --engine ray, or remove ray_address",
    ),
)
