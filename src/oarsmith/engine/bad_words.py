"""Words that an answer does not get, as token ids."""

from __future__ import annotations

from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ConfigError
from oarsmith.text import Tokenizer


def spell_bad_words(sampling: Sampling, tokenizer: Tokenizer | None) -> list[tuple[int, ...]]:
    """The sampling's bad words: texts as the tokenizer spells them with and without a space in front.

    Raises:
        ConfigError: a text, and no tokenizer.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in sampling.bad_words:
        if not isinstance(word, str):
            found[tuple(word)] = None
        elif tokenizer is None:
            raise ConfigError(
                f"bad_words has the text {word!r}, and this engine has no tokenizer",
                where="bad_words",
                fix="give it as a list of token ids",
            )
        else:
            for text in (word, " " + word.lstrip()):
                if ids := tokenizer.encode(text, add_special_tokens=False):
                    found[tuple(ids)] = None
    return list(found)
