"""tokenizer.json, tokenizer_config.json and special_tokens_map.json from GGUF metadata.

Byte-level BPE (``tokenizer.ggml.model`` = gpt2) keeps its merges in the file; what text is cut into before merging is
named by ``tokenizer.ggml.pre``. Sentencepiece BPE (``llama``) keeps scores, from which the merges follow. A unigram
(``t5``) is its scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from oarsmith.checkpoint.gguf.reader import GgufFile
from oarsmith.checkpoint.gguf.tokenizer_models import StoredVocabulary, byte_level_bpe, sentencepiece_bpe, unigram
from oarsmith.checkpoint.gguf.vocabulary import Kind


@dataclass(frozen=True)
class GgufTokenizer:
    """A rebuilt tokenizer: name -> text of its files, ids by role (bos, eos, unk, pad, eot), decisions worth a look."""

    files: Mapping[str, str]
    num_tokens: int
    special_ids: Mapping[str, int]
    notes: tuple[str, ...]


def build_tokenizer(file: GgufFile, *, architecture: str, context: int) -> GgufTokenizer:
    """Rebuild the Hugging Face tokenizer of a GGUF file; one without any gives no files and a note.

    Args:
        architecture: ``general.architecture``; decides the pre-tokenizer of old files that do not name one.
        context: longest input of the model in tokens, written as ``model_max_length``.

    Raises:
        CheckpointError: a tokenizer model or pre-tokenizer that is not known (the message names the known ones), or
            damaged lists.
    """
    if not any(key.startswith("tokenizer.") for key in file.metadata):
        note = "the file holds no tokenizer: put the model's own tokenizer files into the directory"
        return GgufTokenizer(files={}, num_tokens=0, special_ids={}, notes=(note,))
    vocabulary = StoredVocabulary(file)
    if vocabulary.model == "gpt2":
        tokenizer, add_bos = byte_level_bpe(vocabulary, architecture)
    elif vocabulary.model == "llama":
        tokenizer, add_bos = sentencepiece_bpe(vocabulary), True
    elif vocabulary.model == "t5":
        tokenizer, add_bos = unigram(vocabulary), False
    else:
        raise vocabulary.error(
            "model",
            f"unknown tokenizer model {vocabulary.model!r}; known are gpt2 (byte-level BPE), llama (sentencepiece BPE) "
            "and t5 (unigram)",
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


def _add_tokens(tokenizer: Tokenizer, vocabulary: StoredVocabulary) -> None:
    special = {vocabulary.special_ids[role] for role in ("bos", "eos", "eot", "pad") if role in vocabulary.special_ids}
    added = []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        is_special = kind == Kind.CONTROL or index in special
        if is_special or kind in (Kind.USER_DEFINED, Kind.UNKNOWN):
            added.append(AddedToken(token, normalized=False, special=is_special or kind == Kind.UNKNOWN))
    tokenizer.add_tokens(added)


def _set_post_processor(tokenizer: Tokenizer, vocabulary: StoredVocabulary, *, add_bos: bool) -> None:
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


def _tokenizer_config(vocabulary: StoredVocabulary, special: Mapping[str, str], context: int) -> dict[str, Any]:
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
