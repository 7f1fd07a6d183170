"""``exact``, ``regex`` and ``format``: answers as texts."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from oarsmith.errors import ConfigError
from oarsmith.rl.completion import Completion
from oarsmith.rl.rewards.options import RewardOptions
from oarsmith.rl.rewards.values import Reward, RewardError, Value
from oarsmith.rl.rewards.verifiers.answers import final_answer
from oarsmith.rl.rewards.verifiers.verifier import Verifier, column, texts_of
from oarsmith.rl.rewards.watch import Watch

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactOptions(RewardOptions):
    """Options of ``exact``."""

    column: str = Field("answer", description="Column of the row with the right text, or a list of which any counts.")
    right: float = Field(1.0, description="Value of an answer that is it.")
    wrong: float = Field(0.0, description="Value of one that is not.")
    normalise: bool = Field(
        True, description="Case, punctuation, articles and spacing do not count (SQuAD's rule); false: every character."
    )
    part: Literal["whole", "final", "contains"] = Field(
        "whole",
        description="whole: all of the answer; final: what it marks as final (boxed, ####, 'answer is'); contains: the "
        "right text stands somewhere in it.",
    )


class ExactReward(Verifier):
    """The answer is the text of a column (Rajpurkar et al. 2016, SQuAD's exact match)."""

    def __init__(self, options: ExactOptions) -> None:
        super().__init__(options.name or "exact")
        self._options = options

    def check(self, one: Completion, where: str) -> Value:
        options = self._options
        given = column(one.row, options.column, reward=self.name, where=where)
        wanted = [self._form(text) for text in texts_of(given, options.column, reward=self.name, where=where)]
        said = final_answer(one.text, anywhere=False) if options.part == "final" else one.text
        if said is None:
            return options.wrong
        form = self._form(said)
        if options.part == "contains":
            found = any(f" {text} " in f" {form} " if options.normalise else text in form for text in wanted)
        else:
            found = form in wanted
        return options.right if found else options.wrong

    def _form(self, text: str) -> str:
        return plain(text) if self._options.normalise else text


def plain(text: str) -> str:
    """A text without case, punctuation, English articles and extra spacing."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


class RegexOptions(RewardOptions):
    """Options of ``regex``."""

    pattern: str = Field(description="Python regular expression.")
    whole: bool = Field(False, description="All of the answer must match it, not a part.")
    dot_all: bool = Field(True, description="A dot matches line breaks too.")
    right: float = Field(1.0, description="Value of an answer that matches.")
    wrong: float = Field(0.0, description="Value of one that does not.")
    timeout: float = Field(10.0, gt=0, description="Seconds for a batch; some expressions never end on some texts.")


_SEARCH = """
import json, re, sys
asked = json.load(sys.stdin)
pattern = re.compile(asked["pattern"], asked["flags"])
search = pattern.fullmatch if asked["whole"] else pattern.search
print(json.dumps([search(text) is not None for text in asked["texts"]]))
"""


class RegexReward(Reward):
    """The answer matches an expression. It is matched in a process of its own, which can be ended.

    Raises:
        ConfigError: the expression is none.
    """

    def __init__(self, options: RegexOptions) -> None:
        super().__init__(options.name or "regex", waits=True)
        self._options = options
        try:
            re.compile(options.pattern)
        except re.error as error:
            raise ConfigError(f"the pattern is no regular expression: {error}", where="reward 'regex'") from error

    def values(self, batch: Sequence[Completion], watch: Watch) -> list[Value | RewardError]:
        options = self._options
        flags = int(re.DOTALL if options.dot_all else 0)
        asked = {"pattern": options.pattern, "flags": flags, "whole": options.whole, "texts": [o.text for o in batch]}
        with watch.waiting(f"reward '{self.name}': the expression {options.pattern[:60]!r}"):
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-S", "-c", _SEARCH],
                    input=json.dumps(asked).encode(),
                    capture_output=True,
                    timeout=options.timeout,
                    check=True,
                )
            except subprocess.TimeoutExpired as error:
                what = f"reward '{self.name}': {options.pattern[:60]!r} took longer than {options.timeout:g} s"
                raise RewardError(what, fix="write it without nested repetitions, or raise its timeout") from error
            except subprocess.CalledProcessError as error:
                what = f"reward '{self.name}' failed: {error.stderr.decode(errors='replace').strip()[-200:]}"
                raise RewardError(what) from error
        return [options.right if found else options.wrong for found in json.loads(done.stdout)]


class FormatOptions(RewardOptions):
    """Options of ``format``."""

    tags: list[str] = Field(
        ["think", "answer"], min_length=1, description="Tags that the answer consists of, in this order, each once."
    )
    partial: bool = Field(True, description="Each tag that stands once gives its share; false: all of the form or 0.")
    value: float = Field(1.0, description="Value of an answer in whole form.")


class FormatReward(Verifier):
    """``<think>...</think><answer>...</answer>``, with other tags as asked for (DeepSeek-R1, section 2.2.2)."""

    def __init__(self, options: FormatOptions) -> None:
        super().__init__(options.name or "format")
        self._options = options
        inside = r"\s*".join(
            f"<{re.escape(tag)}>(?:(?!</?{re.escape(tag)}>).)*</{re.escape(tag)}>" for tag in options.tags
        )
        self._whole = re.compile(rf"\s*{inside}\s*", re.DOTALL)

    def check(self, one: Completion, where: str) -> Value:
        options, text = self._options, one.text
        once = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in options.tags)
        if once and self._whole.fullmatch(text):
            return options.value
        if not options.partial:
            return 0.0
        marks = [mark for tag in options.tags for mark in (f"<{tag}>", f"</{tag}>")]
        # One mark more than there are: only the whole form has all.
        return options.value * sum(text.count(mark) == 1 for mark in marks) / (len(marks) + 1)
