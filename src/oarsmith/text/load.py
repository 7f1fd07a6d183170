"""`load_tokenizer`: find out what kind of tokenizer a directory holds and read it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.errors import CheckpointError
from oarsmith.text.backends import Backend
from oarsmith.text.backends.sentencepiece_model import load_sentencepiece
from oarsmith.text.backends.tokenizers_json import load_tokenizer_json
from oarsmith.text.backends.vocab_merges import SPLIT_PATTERNS, load_vocab_merges
from oarsmith.text.chat import ChatTemplate
from oarsmith.text.special import CLASS_RULES, GENERIC, SpecialTokens, read_special_tokens, tokenizer_class
from oarsmith.text.tokenizer import ADDITIONAL_TEMPLATES, TEMPLATE_FILES, Tokenizer

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "GemmaTokenizer")
_KNOWN = (
    "tokenizer.json (Hugging Face tokenizers); tokenizer.model (sentencepiece, classes LlamaTokenizer and "
    "GemmaTokenizer); vocab.json with merges.txt (classes GPT2Tokenizer and Qwen2Tokenizer)"
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory.

    tokenizer.json is preferred, then tokenizer.model, then vocab.json with merges.txt. The chat template is the first
    of chat_template.jinja, `chat_template` in tokenizer_config.json, and PaddleNLP's chat_template.json. No code of
    the directory is run.

    Raises CheckpointError for a missing directory, missing or damaged files, and a layout that is not known.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no directory '{directory}'",
            fix="give the path of a model directory on this machine (nothing is downloaded here)",
        )
    files = _read_files(directory)
    config = _json_object(files, "tokenizer_config.json", directory)
    model_config = _json_object(_read_some(directory, ("config.json",)), "config.json", directory)
    class_name = tokenizer_class(config, model_config)
    rule = CLASS_RULES.get(class_name or "", GENERIC)
    if class_name is None and "tokenizer.json" not in files and "tokenizer.model" in files:
        rule = CLASS_RULES["LlamaTokenizer"]
    special = read_special_tokens(
        config,
        _json_object(files, "special_tokens_map.json", directory),
        _json_object(files, "added_tokens.json", directory),
        _json_object(files, "tokenizer.json", directory).get("added_tokens") or [],
        rule,
    )
    return Tokenizer(
        backend=_backend(files, config, special, class_name, directory),
        special=special,
        chat_template=_chat_template(files, config, directory),
        eos_ids=_generation_eos(directory),
        cleans_spaces=bool(config.get("clean_up_tokenization_spaces", False)),
        files=files,
        name_or_path=str(path),
    )


def _backend(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    special: SpecialTokens,
    class_name: str | None,
    directory: Path,
) -> Backend:
    if "tokenizer.json" in files:
        rule = CLASS_RULES.get(class_name or "", GENERIC)
        where = str(directory / "tokenizer.json")
        return load_tokenizer_json(files["tokenizer.json"], config, special, rule, where=where)
    if "tokenizer.model" in files:
        name = class_name or "LlamaTokenizer"
        _require_class(name, _SENTENCEPIECE_CLASSES, "tokenizer.model", directory)
        where = str(directory / "tokenizer.model")
        return load_sentencepiece(files["tokenizer.model"], config, special, CLASS_RULES[name], name, where=where)
    if "vocab.json" in files and "merges.txt" in files:
        name = class_name or "GPT2Tokenizer"
        _require_class(name, tuple(SPLIT_PATTERNS), "vocab.json with merges.txt", directory)
        return load_vocab_merges(
            files["vocab.json"], files["merges.txt"], config, special, CLASS_RULES[name], name, where=str(directory)
        )
    present = sorted(name for name in files if name in _VOCABULARY_FILES)
    raise CheckpointError(
        f"no tokenizer found: looked for {', '.join(_VOCABULARY_FILES)}"
        + (f"; found only {', '.join(present)}" if present else ""),
        where=str(directory),
        fix=f"add one of: {_KNOWN}",
    )


def _require_class(name: str, known: tuple[str, ...], layout: str, directory: Path) -> None:
    if name not in known:
        raise CheckpointError(
            f"a {layout} of tokenizer class '{name}' is not known (code in checkpoints is never run)",
            where=str(directory),
            fix=f"known layouts: {_KNOWN}",
        )


def _read_files(directory: Path) -> dict[str, bytes]:
    """Every file that belongs to the tokenizer, by its name relative to the directory."""
    files = _read_some(directory, (*_VOCABULARY_FILES, *_SIDE_FILES, *TEMPLATE_FILES))
    additional = directory / ADDITIONAL_TEMPLATES
    if additional.is_dir():
        names = sorted(f"{ADDITIONAL_TEMPLATES}/{file.name}" for file in additional.glob("*.jinja"))
        files |= _read_some(directory, tuple(names))
    return files


def _read_some(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    files = {}
    for name in names:
        file = directory / name
        if not file.is_file():
            continue
        try:
            files[name] = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"cannot read the file: {error.strerror}", where=str(file)) from error
    return files


def _json_object(files: Mapping[str, bytes], name: str, directory: Path) -> dict[str, Any]:
    """The object in a JSON file, {} when the file is absent."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", where=str(directory / name)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, not an object", where=str(directory / name))
    return content


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], directory: Path) -> ChatTemplate | None:
    named = {
        "default" if name == "chat_template.jinja" else Path(name).stem: _text(data, directory / name)
        for name, data in files.items()
        if name == "chat_template.jinja" or name.startswith(f"{ADDITIONAL_TEMPLATES}/")
    }
    if named:
        return ChatTemplate.from_jinja(named, origin=str(directory / "chat_template.jinja"))
    origin = str(directory / "tokenizer_config.json")
    in_config = config.get("chat_template")
    if isinstance(in_config, str):
        return ChatTemplate.from_jinja(in_config, origin=origin)
    if in_config is not None:
        return ChatTemplate.from_jinja(_named_templates(in_config, origin), origin=origin)
    content = _json_object(files, "chat_template.json", directory)
    origin = str(directory / "chat_template.json")
    if isinstance(content.get("chat_template"), str):
        # Hugging Face processors keep their jinja template under the same file name.
        return ChatTemplate.from_jinja(content["chat_template"], origin=origin)
    return ChatTemplate.from_paddle(content, origin=origin) if content else None


def _text(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8 text: {error}", where=str(file)) from error


def _named_templates(entries: Any, origin: str) -> dict[str, str]:
    """A list of {"name": ..., "template": ...}, or an object from name to template, as an object."""
    if isinstance(entries, list):
        entries = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    if not isinstance(entries, dict) or not all(isinstance(text, str) for pair in entries.items() for text in pair):
        raise CheckpointError(
            "chat_template is neither a text nor a list of named ones",
            where=origin,
            fix='write a text, or [{"name": "default", "template": "..."}, ...]',
        )
    return entries


def _generation_eos(directory: Path) -> tuple[int, ...]:
    """eos ids of generation_config.json, () when there is none."""
    files = _read_some(directory, ("generation_config.json",))
    value = _json_object(files, "generation_config.json", directory).get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) for index in ids):
        raise CheckpointError(
            f"eos_token_id is {value!r}, not an id or a list of ids", where=str(directory / "generation_config.json")
        )
    return tuple(ids)
