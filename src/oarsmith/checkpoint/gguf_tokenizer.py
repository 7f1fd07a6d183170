"""tokenizer.json, tokenizer_config.json and special_tokens_map.json from GGUF metadata.

Byte-level BPE (``tokenizer.ggml.model`` = gpt2) keeps its merges in the file; what text is cut into before merging is
named by ``tokenizer.ggml.pre``. Sentencepiece BPE (``llama``) keeps scores, from which the merges follow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from oarsmith.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from oarsmith.checkpoint.gguf_reader import GgufFile
from oarsmith.errors import CheckpointError


class _Type(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_PRE_OF_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2"}  # files from before tokenizer.ggml.pre existed
_ROLE_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
}


@dataclass(frozen=True)
class GgufTokenizer:
    """A rebuilt tokenizer: name -> text of its files, ids by role (bos, eos, unk, pad, eot), decisions worth a look."""

    files: Mapping[str, str]
    num_tokens: int
    special_ids: Mapping[str, int]
    notes: tuple[str, ...]


class _Vocabulary:
    """The lists in the metadata, checked against one another."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self.notes: list[str] = []
        self.model = str(self.get("model", ""))
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int, [_Type.NORMAL] * len(self.tokens))
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
        return scores

    def _drop_padding(self) -> None:
        """Rows that only round the vocabulary up (type UNUSED, at the end) are not tokens of the original tokenizer."""
        end = len(self.types)
        while end and self.types[end - 1] == _Type.UNUSED:
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


def build_tokenizer(file: GgufFile, *, architecture: str, context: int) -> GgufTokenizer:
    """Rebuild the Hugging Face tokenizer of a GGUF file.

    Args:
        architecture: ``general.architecture``; decides the pre-tokenizer of old files that do not name one.
        context: longest input of the model in tokens, written as ``model_max_length``.

    Raises:
        CheckpointError: a tokenizer model or pre-tokenizer that is not known (the message names the known ones), or
            damaged lists.
    """
    vocabulary = _Vocabulary(file)
    if vocabulary.model == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(vocabulary, architecture)
    elif vocabulary.model == "llama":
        tokenizer, add_bos = _sentencepiece_bpe(vocabulary), True
    else:
        raise vocabulary.error(
            "model",
            f"unknown tokenizer model {vocabulary.model!r}; known are gpt2 (byte-level BPE), llama (sentencepiece BPE)",
            fix="convert from the model's Hugging Face directory instead",
        )
    _add_tokens(tokenizer, vocabulary)
    _set_post_processor(tokenizer, vocabulary, add_bos=add_bos)
    special = {
        f"{role}_token": vocabulary.tokens[index] for role, index in vocabulary.special_ids.items() if role != "eot"
    }
    config = _tokenizer_config(vocabulary, special, context)
    return GgufTokenizer(
        files={
            "tokenizer.json": tokenizer.to_str(pretty=True),
            "tokenizer_config.json": _json(config),
            "special_tokens_map.json": _json(special),
        },
        num_tokens=len(vocabulary.tokens),
        special_ids=vocabulary.special_ids,
        notes=tuple(vocabulary.notes),
    )


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _pre_tokenizer(vocabulary: _Vocabulary, architecture: str) -> PreTokenizer:
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


def _byte_level_bpe(vocabulary: _Vocabulary, architecture: str) -> tuple[Tokenizer, bool]:
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


def _merges_from_scores(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces is a merge, best piece first: sentencepiece merges what scores highest.

    Ties go as in transformers' converter: longer left part, then longer right part. Reserved pieces (control, unknown,
    byte) are never the result of a merge.
    """
    scores = vocabulary.scores()
    reserved = {_Type.UNKNOWN, _Type.CONTROL, _Type.BYTE}
    plain = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind not in reserved}
    found = []
    for index, token in enumerate(vocabulary.tokens):
        if token not in plain:
            continue
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [(left, right) for left, right in splits if left in plain and right in plain]
        splits.sort(key=lambda pair: (vocabulary.ids[pair[0]], vocabulary.ids[pair[1]]))
        found += [(scores[index], len(left), len(right), left, right) for left, right in splits]
    found.sort(key=lambda item: item[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> Tokenizer:
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


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    special = {vocabulary.special_ids[role] for role in ("bos", "eos", "eot", "pad") if role in vocabulary.special_ids}
    added = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_special = kind == _Type.CONTROL or index in special
        if is_special or kind in (_Type.USER_DEFINED, _Type.UNKNOWN):
            added.append(AddedToken(token, normalized=False, special=is_special or kind == _Type.UNKNOWN))
    tokenizer.add_tokens(added)


def _set_post_processor(tokenizer: Tokenizer, vocabulary: _Vocabulary, *, add_bos: bool) -> None:
    before: list[int] = []
    after: list[int] = []
    for place, role, default in ((before, "bos", add_bos), (after, "eos", False)):
        if not vocabulary.flag(f"add_{role}_token", default):
            continue
        if role not in vocabulary.special_ids:
            raise vocabulary.error(f"add_{role}_token", f"is set, but the file names no {role} token")
        place.append(vocabulary.special_ids[role])
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if vocabulary.model == "gpt2" else []
    if before or after:
        names = {index: vocabulary.tokens[index] for index in before + after}
        single = [*(names[index] for index in before), "$A", *(names[index] for index in after)]
        pair = [*single, *(f"{names[index]}:1" for index in before), "$B:1", *(f"{names[index]}:1" for index in after)]
        special_tokens = [(name, index) for index, name in names.items()]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=special_tokens))
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)


def _tokenizer_config(vocabulary: _Vocabulary, special: Mapping[str, str], context: int) -> dict[str, Any]:
    # PreTrainedTokenizerFast: under a model's own class transformers rebuilds the pre-tokenizer and drops, say, Digits.
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **special,
    }
    metadata = vocabulary.file.metadata
    default = metadata.get("tokenizer.chat_template")
    named = {
        name: metadata.get(f"tokenizer.chat_template.{name}") for name in metadata.get("tokenizer.chat_templates", [])
    }
    if named:
        templates = ({"default": default} if default is not None else {}) | named
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items() if text is not None
        ]
    elif default is not None:
        config["chat_template"] = default
    return config
