"""GPT-2's vocab.json + merges.txt: a byte-level BPE built with the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from oarsmith.errors import CheckpointError
from oarsmith.text.backends.tokenizers_json import TokenizersBackend, bos_eos_processor, finish
from oarsmith.text.special import ClassRule, SpecialTokens

SPLIT_PATTERNS: Mapping[str, str | None] = {
    "GPT2Tokenizer": None,
    "Qwen2Tokenizer": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How each class cuts text into words before BPE; None is GPT-2's own pattern, built into the library."""


def load_vocab_merges(
    vocab: bytes,
    merges: bytes,
    config: Mapping[str, Any],
    special: SpecialTokens,
    rule: ClassRule,
    class_name: str,
    *,
    where: str,
) -> TokenizersBackend:
    """A backend from the bytes of vocab.json and merges.txt. Raises CheckpointError for damaged ones."""
    tokenizer = tokenizers.Tokenizer(_model(vocab, merges, where=where))
    pattern = SPLIT_PATTERNS[class_name]
    prefix_space = bool(config.get("add_prefix_space", False))
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    finish(tokenizer, config, special, rule, where=where)
    if config.get("add_bos_token", rule.adds_bos):
        # GPT2Tokenizer has no add_eos_token; OPT relies on add_bos_token.
        only_bos = {"add_bos_token": True}
        tokenizer.post_processor = bos_eos_processor(tokenizer, only_bos, special, rule, where=where)
    return TokenizersBackend(tokenizer, built=True)


def _model(vocab: bytes, merges: bytes, *, where: str) -> models.BPE:
    try:
        ids = json.loads(vocab)
    except ValueError as error:
        raise CheckpointError(f"vocab.json is not valid JSON: {error}", where=where) from error
    if not isinstance(ids, dict) or not all(type(number) is int and 0 <= number < 2**32 for number in ids.values()):
        raise CheckpointError("vocab.json is not an object of tokens and their ids", where=where)
    pairs = []
    try:
        lines = merges.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8 text: {error}", where=f"{where}/merges.txt") from error
    for number, line in enumerate(lines.split("\n"), start=1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2:
            raise CheckpointError(f"'{line}' is not a pair of tokens", where=f"{where}/merges.txt:{number}")
        for token in (*pair, "".join(pair)):
            if token not in ids:
                raise CheckpointError(
                    f"'{token}' is not in vocab.json",
                    where=f"{where}/merges.txt:{number}",
                    fix="vocab.json and merges.txt must come from the same model",
                )
        pairs.append((pair[0], pair[1]))
    return models.BPE(vocab=ids, merges=pairs, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
