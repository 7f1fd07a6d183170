"""Small indexed corpora from which a tiny model learns something in a few steps, and directories without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import oarsmith
from oarsmith.data.corpus.indexed import IndexedBuilder
from tiny import CONFIGS, TOKENIZER


def write_corpus(prefix: Path, *, documents: int = 40, seed: int = 0, odd: int = 0, vocab_size: int = 1100) -> Path:
    """A pair of documents of 20 to 89 tokens in which each token follows from the one before; ``odd`` have none such.

    The odd ones are random ids: to a model that has learned the others they are a jump of the loss.
    """
    generator = np.random.default_rng(seed)
    with IndexedBuilder(prefix, np.dtype("<u2")) as builder:
        for number in range(documents):
            start, length = generator.integers(0, 50), generator.integers(20, 90)
            regular = (start + 7 * np.arange(length)) % 23
            strange = number < odd
            builder.add(generator.integers(100, vocab_size, length) if strange else regular)
            builder.end_document()
    return prefix


def write_blank_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A directory of config.json and tokenizer: what training from scratch begins with."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[family] | changes))
    oarsmith.load_tokenizer(TOKENIZER).save(folder)
    return folder


def pretrain_words(model: Path, corpus: Path | str, output_dir: Path, **keys: Any) -> list[str]:
    """Words after ``oarsmith``. Tiny matrices only wait for a second thread."""
    keys = {"num_threads": 1, "dtype": "fp32", "output_dir": output_dir, **keys}
    return ["pretrain", str(model), str(corpus), *(f"--{key}={value}" for key, value in keys.items())]
