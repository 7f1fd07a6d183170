"""A corpus, a tokenizer and a model that need nothing but a seed, so that a benchmark runs without any download."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

# A word is followed by one of so many others, most of the time: something a model can learn in a few hundred steps.
NUM_FOLLOWERS = 4
SHARE_FOLLOWING = 0.8
EOS = "</s>"


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words w1, w2, ... with the ids 1, 2, ...; 0 ends a document."""
    words = {EOS: 0, **{f"w{number}": number for number in range(1, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "model_max_length": 10**6}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=1) + "\n")


def write_corpus(prefix: Path, num_tokens: int, vocab_size: int, *, document: int = 1000, seed: int = 0) -> None:
    """Frequent and rare words (Zipf) with likely followers, in documents of about `document` tokens."""
    random = np.random.default_rng(seed)
    followers = random.integers(1, vocab_size, (vocab_size, NUM_FOLLOWERS))
    zipf = 1 / np.arange(1, vocab_size)
    fresh = random.choice(np.arange(1, vocab_size), num_tokens, p=zipf / zipf.sum())
    follows = random.random(num_tokens) < SHARE_FOLLOWING
    which = random.integers(0, NUM_FOLLOWERS, num_tokens)
    tokens = np.empty(num_tokens, np.uint16 if vocab_size <= 2**16 else np.int32)
    last = 1
    for i in range(num_tokens):
        last = tokens[i] = followers[last, which[i]] if follows[i] else fresh[i]
    num_documents = max(1, num_tokens // document)
    cuts = np.sort(random.choice(np.arange(1, num_tokens), num_documents - 1, replace=False))
    ends = np.append(cuts, num_tokens)
    tokens[ends - 1] = 0
    write_pair(prefix, tokens, np.diff(ends, prepend=0))


def write_pair(prefix: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Megatron's .bin and .idx of documents that lie one after the other in `tokens` (uint16 or int32)."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tokens.tofile(f"{prefix}.bin")
    code = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}[tokens.dtype]
    offsets = np.cumsum(lengths, dtype=np.int64) - lengths
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes() + (offsets * tokens.itemsize).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def write_llama(folder: Path, *, hidden: int, layers: int, heads: int, vocab_size: int, positions: int) -> None:
    """A Llama with an untied head and an MLP 8/3 as wide."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    draw_weights(folder)


def draw_weights(folder: Path) -> None:
    """Random weights for the config.json of a folder, drawn by transformers and rounded to bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(torch.bfloat16).save_pretrained(folder)
