"""The vocabulary of a tokenizer directory in the terms of GGUF: pieces, scores, kinds, merges.

Three of llama.cpp's tokenizers are written: ``gpt2`` (byte-level BPE with merges), ``llama`` (sentencepiece BPE, which
merges what scores highest) and ``t5`` (unigram).
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer

from oarsmith.checkpoint.gguf.pretokenizers import name_of
from oarsmith.checkpoint.gguf.sentencepiece import parse_sentencepiece
from oarsmith.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
ADDED_SCORE = -1000.0


class Kind(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass
class Vocabulary:
    """Tokens by id. `extra` are further ``tokenizer.ggml`` keys; `notes` what llama.cpp does otherwise."""

    model: str
    pre: str
    tokens: dict[int, str]
    kinds: dict[int, int] = field(default_factory=dict)
    scores: dict[int, float] | None = None
    merges: list[str] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def from_json(content: bytes, *, where: str) -> Vocabulary:
    """From tokenizer.json.

    Raises:
        CheckpointError: a model, normalizer or pre-tokenizer llama.cpp does not have.
    """
    parsed = json.loads(content)
    kind = parsed["model"].get("type", "BPE")
    if kind == "Unigram":
        return _unigram_json(parsed, where=where)
    if kind != "BPE":
        raise CheckpointError(f"llama.cpp has no tokenizer for a {kind} model", where=where, fix=_WITHOUT)
    steps = _steps(parsed.get("pre_tokenizer"), "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        return _byte_level_json(content, parsed, where=where)
    return _spm_json(parsed, steps, where=where)


_WITHOUT = "write the file without its tokenizer: --with_tokenizer false"


def _steps(node: Any, inner: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as a flat list of its steps."""
    if node is None:
        return []
    if node["type"] == "Sequence":
        return [step for child in node[inner] for step in _steps(child, inner)]
    return [node]


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for merge in model["merges"]:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        found.append((left, right))
    return found


def _byte_level_json(content: bytes, parsed: Mapping[str, Any], *, where: str) -> Vocabulary:
    model = parsed["model"]
    normalizers = [step["type"] for step in _steps(parsed.get("normalizer"), "normalizers")]
    if set(normalizers) - {"NFC"}:
        raise CheckpointError(
            f"llama.cpp does not normalise text by {', '.join(normalizers)}", where=where, fix=_WITHOUT
        )
    pre = name_of(Tokenizer.from_str(content.decode()), ignore_merges=bool(model.get("ignore_merges")), where=where)
    merges = _merges(model)
    if any(" " in part for merge in merges for part in merge):
        raise CheckpointError("a merge holds a space, which GGUF cannot say", where=where, fix=_WITHOUT)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens={index: token for token, index in model["vocab"].items()},
        merges=[f"{left} {right}" for left, right in merges],
    )


def _spm_json(parsed: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], *, where: str) -> Vocabulary:
    """A sentencepiece BPE that was converted: the order of merges gives the scores back."""
    model = parsed["model"]
    normalizers = _steps(parsed.get("normalizer"), "normalizers")
    kinds = {step["type"] for step in normalizers}
    pre_kinds = {step["type"] for step in steps}
    if not model.get("byte_fallback") or kinds - {"Prepend", "Replace"} or pre_kinds - {"Metaspace", "Split"}:
        raise CheckpointError(
            f"a BPE with byte_fallback {model.get('byte_fallback')}, normalizers {sorted(kinds)} and pre-tokenizers "
            f"{sorted(pre_kinds)} is neither byte-level nor sentencepiece's",
            where=where,
            fix=_WITHOUT,
        )
    prepend = "Prepend" in kinds or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never" for step in steps
    )
    ids = model["vocab"]
    scores: dict[int, float] = {}
    for rank, (left, right) in enumerate(_merges(model)):
        scores.setdefault(ids[left + right], -float(rank))
    vocabulary = Vocabulary(
        model="llama",
        pre="default",
        tokens={index: token for token, index in ids.items()},
        scores={index: scores.get(index, -float(len(model["merges"]))) for index in ids.values()},
        extra={"add_space_prefix": prepend},
    )
    for token, index in ids.items():
        if _BYTE_TOKEN.fullmatch(token):
            vocabulary.kinds[index] = Kind.BYTE
        elif token == model.get("unk_token"):
            vocabulary.kinds[index] = Kind.UNKNOWN
    return vocabulary


def _unigram_json(parsed: Mapping[str, Any], *, where: str) -> Vocabulary:
    pieces = parsed["model"]["vocab"]
    extra: dict[str, Any] = {"add_space_prefix": True, "remove_extra_whitespaces": False}
    for step in _steps(parsed.get("normalizer"), "normalizers"):
        pattern = step.get("pattern", {})
        if step["type"] == "Precompiled":
            extra["precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and (pattern.get("Regex") or "").strip("() ") in ("{2,}", "+"):
            extra["remove_extra_whitespaces"] = True
        elif step["type"] not in ("Strip", "Replace", "Prepend"):
            raise CheckpointError(f"llama.cpp does not normalise text by {step['type']}", where=where, fix=_WITHOUT)
    for step in _steps(parsed.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            extra["add_space_prefix"] = step.get("prepend_scheme", "always") != "never"
        elif step["type"] not in ("WhitespaceSplit", "Whitespace"):
            raise CheckpointError(
                f"llama.cpp does not cut text by {step['type']} for a unigram", where=where, fix=_WITHOUT
            )
    return _unigram([(text, score) for text, score in pieces], parsed["model"].get("unk_id"), extra)


def _unigram(pieces: Sequence[tuple[str, float]], unknown: int | None, extra: dict[str, Any]) -> Vocabulary:
    return Vocabulary(
        model="t5",
        pre="default",
        tokens={index: text for index, (text, _) in enumerate(pieces)},
        kinds={} if unknown is None else {unknown: Kind.UNKNOWN},
        scores={
            index: float(score) if math.isfinite(score) else ADDED_SCORE for index, (_, score) in enumerate(pieces)
        },
        extra=extra,
    )


def from_sentencepiece(content: bytes, *, add_space_prefix: bool | None, where: str) -> Vocabulary:
    """From tokenizer.model.

    Args:
        add_space_prefix: what the tokenizer's class does; None: what the model says.
    """
    model = parse_sentencepiece(content, where=where)
    prefix = model.add_dummy_prefix if add_space_prefix is None else add_space_prefix
    extra: dict[str, Any] = {"add_space_prefix": prefix}
    if model.is_unigram:
        extra["remove_extra_whitespaces"] = model.remove_extra_whitespaces
        if model.charsmap:
            extra["precompiled_charsmap"] = model.charsmap
    vocabulary = Vocabulary(
        model="t5" if model.is_unigram else "llama",
        pre="default",
        tokens={index: text for index, (text, _, _) in enumerate(model.pieces)},
        kinds={index: kind for index, (_, _, kind) in enumerate(model.pieces)},
        scores={index: score for index, (_, score, _) in enumerate(model.pieces)},
        extra=extra,
    )
    if not model.is_unigram and (model.charsmap or model.remove_extra_whitespaces):
        vocabulary.notes.append("sentencepiece normalises text before it is cut, llama.cpp does not for this tokenizer")
    return vocabulary


def from_ranks(ranks: Mapping[bytes, int], pre: str) -> Vocabulary:
    """From a tiktoken file: each token of several bytes is the merge of the two parts the ranks below it make."""
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = _parts(token, ranks, rank)
        if len(parts) == 2:
            merges.append(f"{spelled[parts[0]]} {spelled[parts[1]]}")
    tokens = {rank: spelled[token] for token, rank in ranks.items()}
    return Vocabulary(model="gpt2", pre=pre, tokens=tokens, merges=merges)


def _parts(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """What BPE makes of a token with the merges that rank before it."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, below) for left, right in pairwise(parts)]
        best = min(found)
        if best >= below:
            break
        at = found.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
