"""The tokenizers a GGUF file can hold, rebuilt from its vocabulary: byte-level BPE, sentencepiece BPE, unigram."""

from __future__ import annotations

import math
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from oarsmith.checkpoint.gguf.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.vocabulary import Kind
from oarsmith.errors import CheckpointError

_MAX_PIECE = 1000
_PRE_OF_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2"}  # files from before tokenizer.ggml.pre existed
_ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
}


class StoredVocabulary:
    """The vocabulary of a GGUF file: the lists in its metadata, checked against one another."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.notes: list[str] = []
        self.model = str(self.get("model", ""))
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int, [Kind.NORMAL] * len(self.tokens))
        if len(self.types) != len(self.tokens):
            raise self.error("token_type", f"{len(self.types)} types for {len(self.tokens)} tokens")
        self._drop_padding()
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.ids[token] != index)
            raise self.error("tokens", f"the token {twice!r} occurs twice")
        self.special_ids = self._special_ids()

    def error(self, key: str, what: str, fix: str | None = None) -> CheckpointError:
        return CheckpointError(what, where=f"{self.file.path}: tokenizer.ggml.{key}", fix=fix)

    def get(self, key: str, default: Any) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, default))

    def _list(self, key: str, kind: type, default: list[Any] | None = None) -> list[Any]:
        value = self.get(key, default)
        if not isinstance(value, list) or not value or not isinstance(value[0], kind):
            raise self.error(key, "the list is missing, empty or of the wrong type")
        return value

    def strings(self, key: str) -> list[str]:
        return self._list(key, str)

    def scores(self) -> list[float]:
        scores = self._list("scores", float)
        if len(scores) < len(self.tokens):
            raise self.error("scores", f"{len(scores)} scores for {len(self.tokens)} tokens")
        if not all(math.isfinite(score) for score in scores):
            raise self.error("scores", "a score is not a finite number")
        return scores

    def _drop_padding(self) -> None:
        """Rows that only round the vocabulary up (type UNUSED, at the end) are not tokens of the original tokenizer."""
        end = len(self.types)
        while end and self.types[end - 1] == Kind.UNUSED:
            end -= 1
        self.tokens, self.types = self.tokens[:end], self.types[:end]

    def _special_ids(self) -> dict[str, int]:
        defaults = {"bos": 1, "eos": 2, "unk": 0} if self.model == "llama" else {}
        ids = {}
        for role, key in _ROLE_KEYS.items():
            value = self.get(key, defaults.get(role))
            if value is None:
                continue
            if type(value) is int and 0 <= value < len(self.tokens):
                ids[role] = value
            else:
                self.notes.append(f"tokenizer.ggml.{key} = {value} names no token: left out")
        return ids


def _pre_tokenizer(vocabulary: StoredVocabulary, architecture: str) -> PreTokenizer:
    name = vocabulary.get("pre", None)
    if name is None:
        name = _PRE_OF_ARCHITECTURE.get(architecture, "default")
        vocabulary.notes.append(f"the file names no pre-tokenizer: {name!r} was taken; compare ids if the file is old")
    if name not in PRE_TOKENIZERS:
        raise vocabulary.error(
            "pre",
            f"unknown pre-tokenizer {name!r}; known are {', '.join(PRE_TOKENIZERS)}",
            fix="take tokenizer.json from the model's Hugging Face directory and convert from there",
        )
    return PRE_TOKENIZERS[name]


def byte_level_bpe(vocabulary: StoredVocabulary, architecture: str) -> tuple[Tokenizer, bool]:
    pre = _pre_tokenizer(vocabulary, architecture)
    merges = []
    for index, merge in enumerate(vocabulary.strings("merges")):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.ids.keys():
            raise vocabulary.error("merges", f"merge {index} {merge!r} is not two tokens that make a third")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _merges_from_scores(vocabulary: StoredVocabulary) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces is a merge, best piece first: sentencepiece merges what scores highest.

    Ties go as in transformers' converter: longer left part, then longer right part. Reserved pieces (control, unknown,
    byte) are never the result of a merge.
    """
    scores = vocabulary.scores()
    reserved = {Kind.UNKNOWN, Kind.CONTROL, Kind.BYTE}
    plain = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind not in reserved}
    found = []
    for index, token in enumerate(vocabulary.tokens):
        if token not in plain:
            continue
        if len(token) > _MAX_PIECE:  # the work grows with the square of it
            raise vocabulary.error(
                "tokens", f"token {index} has {len(token):,} characters, at most {_MAX_PIECE:,} can be"
            )
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [(left, right) for left, right in splits if left in plain and right in plain]
        splits.sort(key=lambda pair: (vocabulary.ids[pair[0]], vocabulary.ids[pair[1]]))
        found += [(scores[index], len(left), len(right), left, right) for left, right in splits]
    found.sort(key=lambda item: item[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def sentencepiece_bpe(vocabulary: StoredVocabulary) -> Tokenizer:
    """Source: LlamaConverter and GemmaConverter in transformers' convert_slow_tokenizer.py."""
    unknown = vocabulary.special_ids.get("unk")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=_merges_from_scores(vocabulary),
            unk_token=vocabulary.tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", "▁")
    decoding: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        tokenizer.normalizer = space
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def unigram(vocabulary: StoredVocabulary) -> Tokenizer:
    """Source: SpmConverter in transformers' convert_slow_tokenizer.py."""
    unknown = vocabulary.special_ids.get("unk")
    if unknown is None:  # other files mark it by its kind alone
        unknown = next((index for index, kind in enumerate(vocabulary.types) if kind == Kind.UNKNOWN), None)
    pieces = list(zip(vocabulary.tokens, vocabulary.scores(), strict=False))
    tokenizer = Tokenizer(models.Unigram(pieces, unknown, byte_fallback=False))
    steps: list[Any] = []
    if vocabulary.get("precompiled_charsmap", None):
        # The tokenizers library follows its offsets unchecked: a damaged one ends the process.
        raise vocabulary.error(
            "precompiled_charsmap",
            "a unigram tokenizer with a character map is not read from GGUF",
            fix="take tokenizer.json from the model's Hugging Face directory",
        )
    if vocabulary.flag("remove_extra_whitespaces", False):
        steps += [normalizers.Strip(left=True, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if vocabulary.flag("add_space_prefix", True) else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    return tokenizer
