"""Answers held to a JSON schema, a regular expression, a grammar or a choice, through the library llguidance.

Grammars are data for an automaton: nothing of them is executed, imported or fetched. Their size and what an automaton
may grow to are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from oarsmith.engine.sampling import Sampling
from oarsmith.errors import ConfigError, MissingExtraError, OarsmithError
from oarsmith.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_CHARACTERS = 2**18
"""Longest schema, expression, grammar, or choices together."""

_MAX_MESSAGE = 500
_KEPT = 64
# Between the parts of JSON; without a bound a model can write spaces until its tokens are used up.
_JSON_SPACE = r"[\x20\x0A\x0D\x09]{0,64}"
_EXPECTED = {
    "json_schema": "JSON schema of the kinds llguidance knows",
    "regex": "regular expression without look-around and back-references",
    "grammar": "Lark grammar with a rule named start",
}


class Constraints:
    """Compiles constraints for one tokenizer; the last few are kept.

    Args:
        tokenizer: None: every constraint is an error.
        vocab_size: the model's; it may be larger than the tokenizer's.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled = lru_cache(maxsize=_KEPT)(self._compile)

    def of(self, sampling: Sampling) -> Grammar | None:
        """The constraint of one answer at its beginning; None: the sampling has none.

        Raises:
            ConfigError: it cannot be followed, with what is wrong in it; or the engine has no tokenizer, or that has
                no token to end an answer with.
            MissingExtraError: llguidance is not installed.
        """
        if not sampling.constraints:
            return None
        (name,) = sampling.constraints
        text = _text(name, getattr(sampling, name))
        if len(text) > MAX_CHARACTERS:
            what = f"{name} has {len(text):,} characters"
            raise ConfigError(what, where=name, fix=f"{name} must have at most {MAX_CHARACTERS:,} characters")
        return Grammar(name, self._compiled(name, text).deep_copy())

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        if self._tokenizer is None:
            raise ConfigError("a constraint needs the text of tokens, and this engine has no tokenizer")
        return _Vocabulary(self._tokenizer, self._vocab_size).made

    def _compile(self, name: str, text: str) -> LLMatcher:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise MissingExtraError("llguidance", "constrained", name) from error
        vocabulary = self._vocabulary
        options: Any = {"whitespace_pattern": _JSON_SPACE, "lenient": False}
        if name in ("json_schema", "json_object"):
            try:
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=options)
            except ValueError as error:
                raise _refused(name, str(error)) from error
        else:
            made = LLMatcher.grammar_from_regex if name == "regex" else LLMatcher.grammar_from_lark
            try:
                grammar = made(text)
            except ValueError as error:
                # Half a surrogate pair, which JSON can spell, has no UTF-8.
                raise _refused(name, "it holds a lone surrogate") from error
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=_limits())
        fault = "" if not matcher.is_error() else matcher.get_error()
        if not fault:
            matcher.compute_bitmask()
            fault = "no text matches it" if matcher.is_error() else ""
        if fault:
            raise _refused(name, fault)
        return matcher


class Grammar:
    """A constraint on the way; see `state.Constraint`."""

    def __init__(self, name: str, matcher: LLMatcher) -> None:
        self._name = name
        self._matcher = matcher

    def allowed(self) -> bytearray:
        mask = bytearray(self._matcher.compute_logit_bias())
        self._check()
        return mask

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def fork(self) -> Grammar:
        return Grammar(self._name, self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OarsmithError(
                f"{self._name} cannot be followed any further: {_short(self._matcher.get_error())}",
                where=self._name,
                fix="make it simpler",
            )


class _Vocabulary:
    """The tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        size = min(tokenizer.vocab_size, vocab_size)
        stop_ids = [index for index in tokenizer.stop_ids if index < size]
        if not stop_ids:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token: an answer held to a constraint could not end",
                where=tokenizer.name_or_path,
                fix="name an eos_token in tokenizer_config.json",
            )
        self._tokenizer = tokenizer
        self.eos_token_id = stop_ids[0]
        self.bos_token_id = None
        self.special_token_ids = sorted({i for i in tokenizer.special_ids if i < size} | set(stop_ids))
        self._special = frozenset(self.special_token_ids)
        self.tokens = [self._bytes(index) for index in range(size)]
        # Padding of the embedding: tokens without text, which nothing allows.
        self.tokens += [b""] * (vocab_size - size)
        self._made: LLTokenizer | None = None
        self._made = LLTokenizer(TokenizerWrapper(self), eos_token=stop_ids)

    def _bytes(self, index: int) -> bytes:
        if index in self._special:
            # A name: no text is made of it.
            return (self._tokenizer.id_to_token(index) or "").encode()
        return self._tokenizer.token_bytes(index) or b""

    @property
    def made(self) -> LLTokenizer:
        assert self._made is not None
        return self._made

    def __call__(self, text: str) -> Sequence[int]:
        """How the model would spell a text that others stand before, where the grammar leaves no choice."""
        if not isinstance(text, str):
            raise TypeError("texts, not bytes")
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        # sentencepiece puts a space in front of a text.
        for part in (ids, ids[1:]):
            plain = all(index < len(self.tokens) and index not in self._special for index in part)
            if plain and b"".join(self.tokens[index] for index in part) == text.encode():
                return part
        return [] if self._made is None else self._made.greedy_tokenize(text)


def _refused(name: str, fault: str) -> ConfigError:
    fix = f"give a {_EXPECTED[name]}" if name in _EXPECTED else None
    return ConfigError(f"{name} cannot be followed: {_short(fault)}", where=name, fix=fix)


def _text(name: str, value: Any) -> str:
    if name == "json_object":
        return '{"type": "object"}'
    if name == "choices":
        return "start: " + " | ".join(map(_quoted, value))
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is not JSON: {error}", where=name, fix="give a JSON schema") from error


def _quoted(text: str) -> str:
    """A Lark string: JSON's, in which characters that cannot be printed are escaped too."""
    return "".join(
        character if character.isprintable() or ord(character) > 0xFFFF else f"\\u{ord(character):04x}"
        for character in json.dumps(text, ensure_ascii=False)
    )


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    # A state takes 1 to 2 kB, a grammar of this size up to 2 s; the library bounds a step to 14 ms.
    return LLParserLimits(max_lexer_states=50_000, max_grammar_size=50_000, verbose_errors=False)


def _short(message: str) -> str:
    message = message.partition("\n<state>")[0].strip()
    return message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + "..."
