"""A new tokenizer from a corpus: byte-level BPE, trained by the `tokenizers` library.

No text is changed, every text can be encoded, and decoding gives it back: 256 bytes are tokens, there is no normaliser.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from oarsmith.atomic import atomic_directory
from oarsmith.errors import DataError
from oarsmith.text.backends.vocab_merges import SPLIT_PATTERNS

_NUM_BYTES = 256
TRAINING_FILE = "tokenizer_training.json"


def train_tokenizer(
    texts: Iterable[str],
    directory: Path,
    *,
    vocab_size: int,
    special_tokens: Mapping[str, str],
    facts: Mapping[str, Any],
) -> int:
    """Train a tokenizer and write it as a directory that `load_tokenizer` and transformers read.

    Args:
        texts: the corpus.
        directory: where it goes.
        vocab_size: number of ids, special tokens and the 256 bytes included.
        special_tokens: "bos_token", "eos_token", "pad_token" -> text. They get the first ids. With a bos_token,
            encoding puts it in front of every text.
        facts: about the training; kept beside the tokenizer, for `is_trained_with`.

    Returns:
        The number of ids it has.

    Raises:
        DataError: a vocabulary without room for the bytes, or a corpus too small for it.
    """
    specials = list(dict.fromkeys(special_tokens.values()))
    if vocab_size < _NUM_BYTES + len(specials):
        raise DataError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(specials)} special tokens",
            where="vocab_size",
            fix=f"give at least {_NUM_BYTES + len(specials)}; 32000 is usual",
        )
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, normalized=False, special=True) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        raise DataError(
            f"the corpus gives only {size:,} of {vocab_size:,} tokens: it is too small, or always the same",
            where="vocab_size",
            fix=f"lower vocab_size to {size} or less, or give more text",
        )
    bos = special_tokens.get("bos_token")
    if bos is not None:
        index = tokenizer.token_to_id(bos)
        assert index is not None, bos
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, index)]
        )
    _write(tokenizer, directory, special_tokens, facts)
    return size


def _untrained() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pattern = SPLIT_PATTERNS["Qwen2Tokenizer"]
    assert pattern is not None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write(
    tokenizer: tokenizers.Tokenizer, directory: Path, special_tokens: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
        **special_tokens,
    }
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps(dict(special_tokens), indent=2, ensure_ascii=False) + "\n",
        TRAINING_FILE: json.dumps(facts, indent=1, ensure_ascii=False) + "\n",
    }
    with atomic_directory(directory) as folder:
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")


def is_trained_with(directory: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a directory holds the tokenizer that training with these facts has given."""
    try:
        found = json.loads((directory / TRAINING_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return found == json.loads(json.dumps(facts))
