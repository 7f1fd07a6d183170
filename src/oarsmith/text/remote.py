"""Tokenizer classes that are code in their checkpoint: which of ours to take, and what is known about their chats.

`auto_map` is ignored and no file of the checkpoint is run; the class's name says which behaviour is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oarsmith.errors import CheckpointError
from oarsmith.text.backends import Backend
from oarsmith.text.backends.ice_text import IceText
from oarsmith.text.backends.remote_sentencepiece import load_baichuan, load_chatglm, load_internlm2
from oarsmith.text.backends.sentencepiece_model import load_sentencepiece
from oarsmith.text.backends.tiktoken_ranks import load_chatglm4, load_qwen
from oarsmith.text.special import (
    CHATGLM_RULES,
    CLASS_RULES,
    GENERIC,
    YUAN_ADDITIONAL,
    YUAN_SETTINGS,
    ClassRule,
    SpecialTokens,
    Token,
)

ICE_TEXT, QWEN_RANKS, MODEL = "ice_text.model", "qwen.tiktoken", "tokenizer.model"
CHATGLM_CODE = "tokenization_chatglm.py"
REMOTE_CLASSES: Mapping[str, tuple[str, ...]] = {
    "BaichuanTokenizer": (MODEL,),
    "BaiChuanTokenizer": (MODEL,),
    "InternLM2Tokenizer": (MODEL,),
    "ChatGLMTokenizer": (ICE_TEXT, MODEL),
    "ChatGLM4Tokenizer": (MODEL,),
    "QWenTokenizer": (QWEN_RANKS,),
    "YuanTokenizer": (MODEL,),
}
"""The class and the files one of which it reads."""
_VERSION_KEY = "chatglm_version"
_BAICHUAN_ROLES = {"user_token": ("user_token_id", 195), "assistant_token": ("assistant_token_id", 196)}


def class_of_files(files: Mapping[str, bytes]) -> str | None:
    """The class of a directory that names none, by the file only this class has."""
    if ICE_TEXT in files:
        return "ChatGLMTokenizer"
    return "QWenTokenizer" if QWEN_RANKS in files else None


def chatglm_version(
    files: Mapping[str, bytes], config: Mapping[str, Any], model_config: Mapping[str, Any], code: bytes
) -> int | None:
    """Which ChatGLM a `ChatGLMTokenizer` belongs to; None: 2 or 3.

    ChatGLM2 and ChatGLM3 have the same class name, files and config keys. They are told apart by the name they were
    released under, by ChatGLM3's tokens in tokenizer_config.json, or by what the authors' code file mentions (it is
    searched, not run).
    """
    if MODEL not in files:
        return 1
    if config.get(_VERSION_KEY) in (2, 3):
        return int(config[_VERSION_KEY])
    for name in (config.get("name_or_path"), model_config.get("_name_or_path")):
        found = re.search(r"chatglm-?([23])", name, re.IGNORECASE) if isinstance(name, str) else None
        if found:
            return int(found[1])
    if "<|observation|>" in json.dumps(config):
        return 3
    if b"class ChatGLMTokenizer" in code:
        return 3 if b"<|observation|>" in code else 2
    return None


def with_version(files: Mapping[str, bytes], config: Mapping[str, Any], version: int | None) -> dict[str, bytes]:
    """The files, with tokenizer_config.json saying the version where nothing else in them would."""
    if version not in (2, 3) or chatglm_version(files, config, {}, b"") == version:
        return dict(files)
    return _with_config(files, {**config, _VERSION_KEY: version})


def yuan_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as Yuan 2's authors' calls complete it; any LlamaTokenizer then gives their ids."""
    if config.get("additional_special_tokens"):
        return {**config, **YUAN_SETTINGS}
    return {**config, **YUAN_SETTINGS, "additional_special_tokens": list(YUAN_ADDITIONAL)}


def with_yuan_config(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files, with tokenizer_config.json complete by itself."""
    complete = yuan_config(config)
    return dict(files) if complete == config else _with_config(files, complete)


def _with_config(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[str, bytes]:
    content = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    return {**files, "tokenizer_config.json": content.encode()}


def class_rule(class_name: str | None, version: int | None) -> ClassRule:
    """What is known about a class."""
    if class_name == "ChatGLMTokenizer":
        return CHATGLM_RULES[version]
    return CLASS_RULES.get(class_name or "", GENERIC)


def load_remote(
    files: Mapping[str, bytes],
    config: Mapping[str, Any],
    special: SpecialTokens,
    class_name: str,
    version: int | None,
    *,
    where: str,
) -> Backend:
    """The backend of one of `REMOTE_CLASSES`. Raises CheckpointError when its file is missing or damaged."""
    wanted = REMOTE_CLASSES[class_name]
    present = [name for name in wanted if name in files]
    if not present:
        raise CheckpointError(f"a {class_name} needs the file {' or '.join(wanted)}", where=where)
    name = present[-1]
    data, at, rule = files[name], f"{where}/{name}", class_rule(class_name, version)
    if class_name == "QWenTokenizer":
        return load_qwen(data, where=at)
    if class_name == "ChatGLM4Tokenizer":
        return load_chatglm4(data, config, special, where=at)
    if class_name == "InternLM2Tokenizer":
        return load_internlm2(data, config, special, rule, where=at)
    if class_name == "YuanTokenizer":
        return load_sentencepiece(data, config, special, rule, "LlamaTokenizer", where=at)
    if class_name == "ChatGLMTokenizer":
        if name == ICE_TEXT:
            return IceText(data, config, special, where=at)
        return load_chatglm(data, config, special, version=version, where=at)
    return load_baichuan(data, config, special, rule, where=at)


def chat_variables(class_name: str | None, backend: Backend, generation: Mapping[str, Any]) -> dict[str, str]:
    """Template variables beside the special tokens: Baichuan's role tokens, by the ids of generation_config.json."""
    if class_name not in ("BaichuanTokenizer", "BaiChuanTokenizer"):
        return {}
    found = {}
    for name, (key, default) in _BAICHUAN_ROLES.items():
        index = generation.get(key, default)
        token = backend.id_to_token(index) if isinstance(index, int) else None
        if token is not None:
            found[name] = token
    return found


def default_template(rule: ClassRule, backend: Backend, variables: Mapping[str, str]) -> str | None:
    """The built-in template of a checkpoint that carries none, if its tokenizer has the tokens for it."""
    if any(backend.token_to_id(token) is None for token in rule.needs):
        return None
    if rule.template == "baichuan" and len(variables) < len(_BAICHUAN_ROLES):
        return None
    return rule.template


def with_eos_of_model(
    special: SpecialTokens, class_name: str | None, backend: Backend, eos_ids: tuple[int, ...]
) -> SpecialTokens:
    """Qwen-1's tokenizer files name no EOS; the model's generation_config.json does."""
    if class_name != "QWenTokenizer" or "eos_token" in special.named or not eos_ids:
        return special
    text = backend.id_to_token(eos_ids[0])
    return special if text is None else replace(special, named={**special.named, "eos_token": Token(text)})
