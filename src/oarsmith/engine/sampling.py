"""How the tokens of an answer are chosen, and when it ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from oarsmith.errors import ConfigError

CONSTRAINTS = ("json_schema", "json_object", "regex", "grammar", "choices")
"""Names of what an answer may be made to match; at most one of them is given."""

# Dividing by less would leave float32; the likeliest token has all of the probability long before.
_GREEDY_BELOW = 1e-5
_MAX_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Applied to the logits in this order: constraint, bad words, minimum length, logit bias, repetition, presence and
    frequency penalty, temperature, top-k, top-p, min-p, typical-p. Each filter sees what the one before it left, its
    probabilities made to add up to 1 again, as in transformers.

    Args:
        max_new_tokens: longest answer in tokens; the model's context may end it earlier.
        min_new_tokens: no stop token before the answer has this many tokens, and no stop text is looked for.
        temperature: logits are divided by it; 0 takes the likeliest token (the filters cannot change that one).
        top_k: draw only among the k likeliest tokens and those as likely as the last of them; 0: all.
        top_p: draw only among the likeliest tokens whose probabilities add up to this (at least one).
        min_p: draw only tokens at least this likely, as a share of the likeliest one's probability; 0: all.
        typical_p: draw only among the tokens that are about as surprising as one expects (-log p nearest to the
            entropy), as many as add up to this (Meister et al. 2022); 1: all.
        repetition_penalty: logits of tokens that occur in prompt or answer are divided by it where positive and
            multiplied where negative (Keskar et al. 2019).
        presence_penalty: taken from the logit of every token that occurs in the answer.
        frequency_penalty: taken from a token's logit once for every time it occurs in the answer.
        logit_bias: added to the logits of these token ids.
        bad_words: texts, or sequences of token ids, that the answer does not get. A text is kept out as the tokenizer
            spells it at the beginning of a word and within one; other spellings of it stay possible.
        stop: texts that end an answer; they are not part of it.
        stop_ids: token ids that end an answer, besides the tokenizer's.
        ignore_eos: do not end at the tokenizer's end-of-sequence and end-of-turn tokens.
        skip_special_tokens: leave special tokens out of the text; if not, all but the one that ends it are in it.
        seed: the draws of request number i of a call follow from (seed, i) alone; None: a new one for each call.
        n: answers to each prompt, each with draws of its own.
        best_of: generate this many and keep the n with the highest mean log-probability of their tokens; None: n.
        num_beams: beam search: keep this many beginnings, those likeliest as a whole (after everything above but the
            temperature and the filters, which take no part), and give the n best answers; 1: none.
        length_penalty: an answer's log-probability is divided by its length to the power of it: above 0 longer ones
            are preferred.
        early_stopping: True: the search ends once it has ``num_beams`` answers; False: when it is unlikely to find
            a better one; "never": when it cannot. As in transformers.
        logprobs: also give each token's log-probability and those of this many of the likeliest ones, in the model's
            own distribution (before everything above); None: do not.
        prompt_logprobs: the same for the tokens of the prompt.
        json_schema: the answer is JSON that this schema (a mapping, or JSON text) allows.
        json_object: the answer is a JSON object.
        regex: the answer as a whole matches it.
        grammar: the answer matches this Lark grammar (rule ``start``).
        choices: the answer is one of these texts.

    Raises:
        ConfigError: a value outside its range, or values that exclude one another.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: Sequence[str | Sequence[int]] = ()
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] = ()

    def __post_init__(self) -> None:
        # A bare string would otherwise be taken for one text a character.
        for name in ("stop", "bad_words", "choices"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else _tuple(name, value))
        words = (word if isinstance(word, str) else _tuple("bad_words", word) for word in self.bad_words)
        object.__setattr__(self, "bad_words", tuple(words))
        object.__setattr__(self, "stop_ids", _tuple("stop_ids", self.stop_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for name, holds, limit in _CHECKS:
            if not holds(getattr(self, name)):
                what = f"{name} is {_shown(getattr(self, name))}"
                raise ConfigError(what, where=name, fix=f"{name} must be {limit}")
        self._check_together()

    def _check_together(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            what = f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}"
            raise ConfigError(what, where="min_new_tokens", fix=f"min_new_tokens must be at most {self.max_new_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            what = f"best_of {self.best_of} is less than n {self.n}"
            raise ConfigError(what, where="best_of", fix=f"best_of must be at least {self.n}, or not given")
        if self.num_beams > 1:
            self._check_beams()
        elif self.num_samples > 1 and self.greedy:
            name = "n" if self.n > 1 else "best_of"
            what = f"{name} is {getattr(self, name)} and the answers are greedy: all would be the same"
            raise ConfigError(what, where=name, fix=f"{name} must be 1 unless temperature is above 0")
        if len(self.constraints) > 1:
            what = f"{' and '.join(self.constraints)} are given; an answer can be held to one of them"
            raise ConfigError(what, where=self.constraints[1], fix="give one of them")
        if self.constraints and self.ignore_eos:
            what = f"{self.constraints[0]} with ignore_eos: an answer that is complete could not end"
            raise ConfigError(what, where="ignore_eos", fix="leave ignore_eos out")

    def _check_beams(self) -> None:
        if not self.greedy or self.best_of is not None:
            name = "temperature" if not self.greedy else "best_of"
            what = f"{name} is {getattr(self, name)} and num_beams {self.num_beams}: a beam search does not draw"
            raise ConfigError(what, where=name, fix=f"leave out {name} or num_beams")
        if self.n > self.num_beams:
            what = f"n {self.n} is more than num_beams {self.num_beams}"
            raise ConfigError(what, where="n", fix=f"n must be at most {self.num_beams}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY_BELOW

    @property
    def num_samples(self) -> int:
        """Answers that are worked on at the same time for a prompt, of which n are kept."""
        if self.num_beams > 1:
            return self.num_beams
        return self.n if self.best_of is None else self.best_of

    @property
    def constraints(self) -> tuple[str, ...]:
        """Names of the constraints that are given."""
        absent = {"json_object": False, "choices": ()}
        return tuple(name for name in CONSTRAINTS if getattr(self, name) != absent.get(name))


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ConfigError(f"{name} is {_shown(value)}", where=name, fix=f"{name} must be a list")
    return tuple(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _bias(value: Any) -> Mapping[int, float]:
    """A copy with whole numbers for keys: JSON has them as text."""
    limit = "token ids with a number from -100 to 100 each"
    try:
        bias = {int(index): float(number) for index, number in value.items()}
    except (AttributeError, TypeError, ValueError) as error:
        what = f"logit_bias is {_shown(value)}"
        raise ConfigError(what, where="logit_bias", fix=f"logit_bias must be {limit}") from error
    for index, number in bias.items():
        if index < 0 or not -100 <= number <= 100:
            what = f"logit_bias has {number!r} for token {index}"
            raise ConfigError(what, where="logit_bias", fix=f"logit_bias must be {limit}")
    return MappingProxyType(bias)


def _whole(low: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def _number(low: float, high: float, *, open_low: bool = False) -> Callable[[Any], bool]:
    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return False
        return (low < value if open_low else low <= value) and value <= high

    return holds


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _all_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: all(check(value) for value in values)


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _bad_word(value: Any) -> bool:
    return _text(value) if isinstance(value, str) else len(value) > 0 and _all_of(_whole(0))(value)


def _schema(value: Any) -> bool:
    if not isinstance(value, str):
        return value is None or isinstance(value, Mapping)
    try:
        return isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


_CHECKS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", _whole(1), "at least 1"),
    ("min_new_tokens", _whole(0), "0 or above"),
    ("temperature", _number(0, math.inf), "0 (greedy) or above"),
    ("top_k", _whole(0), "0 (all tokens) or above"),
    ("top_p", _number(0, 1, open_low=True), "above 0 and at most 1"),
    ("min_p", _number(0, 1), "from 0 (all tokens) to 1"),
    ("typical_p", _number(0, 1, open_low=True), "above 0 and at most 1"),
    ("repetition_penalty", _number(0, math.inf, open_low=True), "above 0 (1: none)"),
    ("presence_penalty", _number(-2, 2), "from -2 to 2 (0: none)"),
    ("frequency_penalty", _number(-2, 2), "from -2 to 2 (0: none)"),
    ("bad_words", _all_of(_bad_word), "texts, or lists of token ids, that are not empty"),
    ("stop", _all_of(_text), "texts that are not empty"),
    ("stop_ids", _all_of(_whole(0)), "token ids, 0 or above"),
    ("ignore_eos", _flag, "true or false"),
    ("skip_special_tokens", _flag, "true or false"),
    ("seed", _optional(_whole(-(2**63))), "a whole number, or not given"),
    ("n", _whole(1), "at least 1"),
    ("best_of", _optional(_whole(1)), "at least 1, or not given"),
    ("num_beams", _whole(1), "at least 1 (no search)"),
    ("length_penalty", _number(-math.inf, math.inf), "a number"),
    ("early_stopping", lambda value: value is True or value is False or value == "never", 'true, false or "never"'),
    ("logprobs", _optional(_whole(0)), "0 or above, or not given"),
    ("prompt_logprobs", _optional(_whole(0)), "0 or above, or not given"),
    ("json_schema", _schema, "a JSON schema: a mapping, or JSON text of one"),
    ("json_object", _flag, "true or false"),
    ("regex", _optional(_text), "a regular expression that is not empty"),
    ("grammar", _optional(_text), "a Lark grammar that is not empty"),
    ("choices", _all_of(_text), "texts that are not empty"),
)
