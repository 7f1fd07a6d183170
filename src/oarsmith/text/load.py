"""`load_tokenizer`: find out what kind of tokenizer a directory holds and read it."""

from __future__ import annotations

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
from oarsmith.text.files import json_object, read_some, text_of
from oarsmith.text.remote import (
    CHATGLM_CODE,
    ICE_TEXT,
    QWEN_RANKS,
    REMOTE_CLASSES,
    chat_variables,
    chatglm_version,
    class_of_files,
    class_rule,
    default_template,
    load_remote,
    with_eos_of_model,
    with_version,
    with_yuan_config,
    yuan_config,
)
from oarsmith.text.special import (
    CLASS_RULES,
    GENERIC,
    SpecialTokens,
    tokenizer_class,
)
from oarsmith.text.special_files import read_special_tokens
from oarsmith.text.tokenizer import ADDITIONAL_TEMPLATES, TEMPLATE_FILES, Tokenizer

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", ICE_TEXT, QWEN_RANKS)
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "GemmaTokenizer")
_KNOWN = (
    "tokenizer.json (Hugging Face tokenizers); tokenizer.model (sentencepiece, classes LlamaTokenizer and "
    "GemmaTokenizer); vocab.json with merges.txt (classes GPT2Tokenizer and Qwen2Tokenizer); and the files of "
    + ", ".join(REMOTE_CLASSES)
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory.

    tokenizer.json is preferred; else the file of the tokenizer's class (see `_KNOWN`). The chat template is the first
    of chat_template.jinja, `chat_template` in tokenizer_config.json, PaddleNLP's chat_template.json, and, for classes
    whose checkpoints never carry one, the built-in that does what their authors' code does. No code of the directory
    is run.

    Raises CheckpointError for a missing directory, missing or damaged files, and a layout that is not known.
    """
    directory = _require_directory(Path(path))
    files = _read_files(directory)
    config = json_object(files, "tokenizer_config.json", directory)
    side = read_some(directory, ("config.json", "generation_config.json", CHATGLM_CODE))
    model_config = json_object(side, "config.json", directory)
    generation = json_object(side, "generation_config.json", directory)
    class_name = tokenizer_class(config, model_config) or class_of_files(files)
    if class_name is None and "tokenizer.json" not in files and "tokenizer.model" in files:
        class_name = "LlamaTokenizer"
    version = None
    if class_name == "ChatGLMTokenizer":
        version = chatglm_version(files, config, model_config, side.get(CHATGLM_CODE, b""))
        files = with_version(files, config, version)
    elif class_name == "YuanTokenizer":
        files, config = with_yuan_config(files, config), yuan_config(config)
    rule = class_rule(class_name, version)
    special = read_special_tokens(
        config,
        json_object(files, "special_tokens_map.json", directory),
        json_object(files, "added_tokens.json", directory),
        json_object(files, "tokenizer.json", directory).get("added_tokens") or [],
        rule,
    )
    backend = _backend(files, config, special, class_name, version, directory)
    eos_ids = _generation_eos(generation, directory)
    template = _chat_template(files, config, directory)
    variables = chat_variables(class_name, backend, generation)
    if template is None and (name := default_template(rule, backend, variables)) is not None:
        template = ChatTemplate.builtin(name)
    stops = (backend.token_to_id(token) for token in rule.stops)
    return Tokenizer(
        backend=backend,
        special=with_eos_of_model(special, class_name, backend, eos_ids),
        chat_template=template,
        eos_ids=(*eos_ids, *(index for index in stops if index is not None)),
        cleans_spaces=bool(config.get("clean_up_tokenization_spaces", rule.cleans)),
        files=files,
        name_or_path=str(path),
        chat_variables=variables,
    )


def _require_directory(directory: Path) -> Path:
    if directory.is_file():
        raise CheckpointError(
            "this is a file, not a model directory",
            where=str(directory),
            fix="name the directory it lies in; a GGUF file becomes one with 'oarsmith convert FILE DIRECTORY'",
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"there is no directory '{directory}'",
            fix="give the path of a model directory on this machine (nothing is downloaded here)",
        )
    return directory


def _backend(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    special: SpecialTokens,
    class_name: str | None,
    version: int | None,
    directory: Path,
) -> Backend:
    if "tokenizer.json" in files:
        rule = CLASS_RULES.get(class_name or "", GENERIC)
        where = str(directory / "tokenizer.json")
        return load_tokenizer_json(files["tokenizer.json"], config, special, rule, where=where)
    if class_name is not None and class_name in REMOTE_CLASSES:
        return load_remote(files, config, special, class_name, version, where=str(directory))
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
    files = read_some(directory, (*_VOCABULARY_FILES, *_SIDE_FILES, *TEMPLATE_FILES))
    additional = directory / ADDITIONAL_TEMPLATES
    if additional.is_dir():
        names = sorted(f"{ADDITIONAL_TEMPLATES}/{file.name}" for file in additional.glob("*.jinja"))
        files |= read_some(directory, tuple(names))
    return files


def _chat_template(files: Mapping[str, bytes], config: Mapping[str, Any], directory: Path) -> ChatTemplate | None:
    named = {
        "default" if name == "chat_template.jinja" else Path(name).stem: text_of(data, directory / name)
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
    content = json_object(files, "chat_template.json", directory)
    origin = str(directory / "chat_template.json")
    if isinstance(content.get("chat_template"), str):
        # Hugging Face processors keep their jinja template under the same file name.
        return ChatTemplate.from_jinja(content["chat_template"], origin=origin)
    return ChatTemplate.from_paddle(content, origin=origin) if content else None


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


def _generation_eos(generation: Mapping[str, Any], directory: Path) -> tuple[int, ...]:
    """eos ids of generation_config.json, () when it names none."""
    value = generation.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) for index in ids):
        raise CheckpointError(
            f"eos_token_id is {value!r}, not an id or a list of ids", where=str(directory / "generation_config.json")
        )
    return tuple(ids)
