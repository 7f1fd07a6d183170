"""``tokenizer.ggml`` metadata from the tokenizer files of a model directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.checkpoint.gguf.vocabulary import (
    ADDED_SCORE,
    Kind,
    Vocabulary,
    from_json,
    from_ranks,
    from_sentencepiece,
)
from oarsmith.errors import CheckpointError
from oarsmith.text import load_tokenizer
from oarsmith.text.backends.tiktoken_ranks import TiktokenBackend, read_ranks
from oarsmith.text.backends.tokenizers_json import TokenizersBackend
from oarsmith.text.chat import JinjaBody
from oarsmith.text.tokenizer import Tokenizer

_ROLES: Mapping[str, str] = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "padding": "pad_token",
    "mask": "mask_token",
}
_JSON, _SPM, _QWEN = "tokenizer.json", "tokenizer.model", "qwen.tiktoken"


def tokenizer_metadata(directory: Path, num_rows: int, notes: list[str]) -> dict[str, Any]:
    """Everything llama.cpp needs to read and write text as the directory's tokenizer does.

    Args:
        num_rows: rows of the embedding; ids without a token become unused ones.
        notes: takes what llama.cpp will do otherwise.

    Raises:
        CheckpointError: no tokenizer, one llama.cpp cannot express, or more tokens than rows.
    """
    tokenizer = load_tokenizer(directory)
    vocabulary = _vocabulary(directory, tokenizer)
    notes += vocabulary.notes
    _place_added(vocabulary, tokenizer)
    last = max(vocabulary.tokens)
    if last >= num_rows:
        raise CheckpointError(f"token id {last}, but the embedding has {num_rows} rows", where=str(directory))
    for index in range(num_rows):
        if index not in vocabulary.tokens:
            vocabulary.tokens[index], vocabulary.kinds[index] = f"[PAD{index}]", Kind.UNUSED
    values: dict[str, Any] = {
        "model": vocabulary.model,
        "pre": vocabulary.pre,
        "tokens": [vocabulary.tokens[index] for index in range(num_rows)],
        "token_type": [int(vocabulary.kinds.get(index, Kind.NORMAL)) for index in range(num_rows)],
        **vocabulary.extra,
        **_special(tokenizer, notes),
    }
    if vocabulary.scores is not None:
        values["scores"] = [vocabulary.scores.get(index, ADDED_SCORE) for index in range(num_rows)]
    if vocabulary.merges:
        values["merges"] = vocabulary.merges
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | _templates(tokenizer, notes)


def _vocabulary(directory: Path, tokenizer: Tokenizer) -> Vocabulary:
    backend = tokenizer.backend
    if isinstance(backend, TokenizersBackend):
        built = backend.built_files()
        content = built[_JSON] if _JSON in built else (directory / _JSON).read_bytes()
        return from_json(content, where=str(directory / _JSON))
    if isinstance(backend, TiktokenBackend):
        qwen = (directory / _QWEN).is_file()
        file = directory / (_QWEN if qwen else _SPM)
        return from_ranks(read_ranks(file.read_bytes(), where=str(file)), "qwen2" if qwen else "chatglm-bpe")
    file = directory / _SPM
    if not file.is_file():
        raise CheckpointError(
            "llama.cpp has no tokenizer for these files",
            where=str(directory),
            fix="leave it out: --with_tokenizer false",
        )
    # What the class does around the model counts, not what the model says.
    first = backend.id_to_token(backend.encode_batch(["x"], False)[0][0]) or ""
    return from_sentencepiece(file.read_bytes(), add_space_prefix=first.startswith("▁"), where=str(file))


def _place_added(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    backend = tokenizer.backend
    for index in backend.added_ids | backend.special_ids:
        text = backend.id_to_token(index)
        known = vocabulary.kinds.get(index, Kind.NORMAL)
        if text is None or known in (Kind.UNKNOWN, Kind.BYTE):
            continue
        special = index in backend.special_ids
        if not special and vocabulary.model != "gpt2":
            text = text.replace("▁", " ")  # llama.cpp looks for these in text as it comes
        vocabulary.tokens[index] = text
        vocabulary.kinds[index] = Kind.CONTROL if special else Kind.USER_DEFINED
        if vocabulary.scores is not None:
            vocabulary.scores[index] = ADDED_SCORE


def _special(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    ids: dict[str, int] = {}
    for role, name in _ROLES.items():
        token = tokenizer.special.named.get(name)
        index = None if token is None else tokenizer.token_to_id(token.content)
        if index is not None:
            ids[role] = index
            values[f"{role}_token_id"] = index
    stops = [index for index in tokenizer.stop_ids if index != ids.get("eos")]
    if "eos" not in ids and stops:
        values["eos_token_id"] = ids["eos"] = stops.pop(0)
    if stops:
        values["eot_token_id"] = stops[0]
    inner, whole = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("x")
    at = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before, after = whole[:at], whole[at + len(inner) :]
    for name, around, role in (("add_bos_token", before, "bos"), ("add_eos_token", after, "eos")):
        values[name] = bool(around) and around == [ids.get(role)]
        if around and not values[name]:
            tokens = [tokenizer.id_to_token(index) for index in around]
            notes.append(f"the tokenizer puts {tokens} around a text; llama.cpp leaves that to the chat template")
    return values


def _templates(tokenizer: Tokenizer, notes: list[str]) -> dict[str, Any]:
    template = tokenizer.chat_template
    if template is None:
        return {}
    if not isinstance(template.body, JinjaBody):
        notes.append("the chat template is PaddleNLP's chat_template.json, which GGUF cannot hold: it is left out")
        return {}
    sources = template.sources()
    others = {name: text for name, text in sources.items() if name != "default"}
    values: dict[str, Any] = {}
    if "default" in sources:
        values["tokenizer.chat_template"] = sources["default"]
    if others:
        values["tokenizer.chat_templates"] = sorted(others)
        values |= {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    return values
