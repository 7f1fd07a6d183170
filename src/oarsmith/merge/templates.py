"""The chat template of a merged model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from oarsmith.errors import OarsmithError
from oarsmith.text import Tokenizer, load_tokenizer
from oarsmith.text.chat import ChatTemplate
from oarsmith.text.choose import with_named_template


def with_recipe_template(tokenizer: Tokenizer, word: str, folders: Sequence[Path]) -> tuple[Tokenizer, str | None]:
    """The tokenizer with the template a recipe asks for, and what should be said of it.

    Args:
        word: ``auto`` is the one that most models have; a template's text; else as for other commands: a built-in's
            name, a file, ``none``.
        folders: of the models, whose tokenizers may be missing.

    Raises:
        OarsmithError: no such template, or one that does not parse.
    """
    if word != "auto":
        if "{" in word:
            return tokenizer.with_chat_template(ChatTemplate.from_jinja(word, origin="chat_template")), None
        return with_named_template(tokenizer, word), None
    found = [template for folder in folders if (template := _template(folder)) is not None]
    if not found:
        return tokenizer, "chat_template auto: no model has one"
    body, count = Counter(repr(template.body) for template in found).most_common(1)[0]
    chosen = next(template for template in found if repr(template.body) == body)
    return tokenizer.with_chat_template(chosen), f"chat template: that of {count} of {len(folders)} models"


def _template(folder: Path) -> ChatTemplate | None:
    try:
        return load_tokenizer(folder).chat_template
    except OarsmithError:
        return None  # a model without a tokenizer has no vote
