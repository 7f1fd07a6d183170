"""The chat template a user names."""

from __future__ import annotations

import json
from pathlib import Path

from oarsmith.errors import DataError
from oarsmith.text.chat import ChatTemplate
from oarsmith.text.tokenizer import Tokenizer


def with_named_template(tokenizer: Tokenizer, name: str | None) -> Tokenizer:
    """The tokenizer with another template.

    Args:
        name: None keeps the tokenizer's own; ``none`` takes it away; a file is read (``.json``: PaddleNLP's
            chat_template.json, else jinja); a directory is looked into; anything else is a built-in's name.
    """
    if name is None:
        return tokenizer
    if name == "none":
        return tokenizer.with_chat_template(None)
    path = Path(name)
    if path.is_dir():
        path = next((p for p in (path / "chat_template.jinja", path / "chat_template.json") if p.is_file()), path)
    if not path.is_file():
        return tokenizer.with_chat_template(ChatTemplate.builtin(name))
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".json":
        return tokenizer.with_chat_template(ChatTemplate.from_jinja(text, origin=str(path)))
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"not valid JSON: {error}", where=str(path)) from error
    return tokenizer.with_chat_template(ChatTemplate.from_paddle(content, origin=str(path)))
