"""Answers that a reward model is to score, as ids: what training reads too. PyTorch comes in with the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import nan
from typing import TYPE_CHECKING, Any, cast

from oarsmith.engine.intake import Prompt
from oarsmith.errors import ConfigError, DataError
from oarsmith.models.facts import ModelFacts
from oarsmith.models.prefix import find_prefix
from oarsmith.models.spec import PrefixLM
from oarsmith.text import Tokenizer

if TYPE_CHECKING:
    from oarsmith.data.answers import Answered
    from oarsmith.data.judged import Judged

# Nothing is cut: what is too long for the model is an error.
_ANY_LENGTH = 1 << 40


class AnswerReader:
    """Reads them with one tokenizer; without one, ids alone. From any thread."""

    def __init__(self, tokenizer: Tokenizer | None, facts: ModelFacts) -> None:
        self._tokenizer, self._facts = tokenizer, facts

    def read(self, answer: Prompt, *, tools: Sequence[Any] | None = None, where: str | None = None) -> Answered:
        """A conversation that ends with an answer, or a text or ids as they are.

        Args:
            tools: JSON schemas of the functions that a conversation's assistant may call.
            where: names it in errors.

        Raises:
            OarsmithError: there is no answer, it is longer than the context, ids outside the vocabulary.
        """
        if not isinstance(answer, str) and len(answer) > 0 and isinstance(answer[0], Mapping):
            row: dict[str, Any] = {"messages": [dict(message) for message in cast(Sequence[Any], answer)]}
            return self._judged(row | ({"tools": list(tools)} if tools else {}), where)
        if isinstance(answer, str):
            ids = self._needed_tokenizer().encode(answer)
        else:
            ids = [int(index) for index in cast(Sequence[int], answer)]
        return self._checked(ids[:-1], ids[-1:], where)

    def reply(self, prompt: str, answer: str, *, where: str | None = None) -> Answered:
        """A question and its answer as texts; a prompt that begins with a control token is rendered already.

        Raises:
            OarsmithError: as `read`.
        """
        return self._judged({"prompt": prompt, "completion": answer}, where)

    def read_steps(
        self,
        conversation: Sequence[Mapping[str, Any]],
        separator: str,
        *,
        tools: Sequence[Any] | None = None,
        where: str | None = None,
    ) -> Answered:
        """A conversation whose answer is steps with a separator behind each, as training has them.

        Raises:
            OarsmithError: as `read`; or there is no step.
        """
        from oarsmith.data.judged import Answer

        judged = self._row({"messages": [dict(message) for message in conversation], "tools": list(tools or ())}, where)
        said = judged.answers[0].messages[-1]["content"]
        steps = tuple((step, nan) for step in said.split(separator) if step.strip())
        if not steps:
            raise DataError("the answer has no step", where=where, fix="give steps, with the separator behind each")
        return self._encoded(replace(judged, answers=(Answer(steps=steps),)), where, separator)

    def _judged(self, row: dict[str, Any], where: str | None) -> Answered:
        return self._encoded(self._row(row, where), where)

    def _row(self, row: dict[str, Any], where: str | None) -> Judged:
        from oarsmith.data.preferences import read_answered
        from oarsmith.data.records import Record

        return read_answered(Record({key: value for key, value in row.items() if value}, where or "text"))

    def _encoded(self, judged: Judged, where: str | None, separator: str = "\n") -> Answered:
        from oarsmith.data.answer_samples import AnswerEncoder, AnswerOptions

        options = AnswerOptions(kind=None, max_length=_ANY_LENGTH, step_separator=separator)
        encoded = AnswerEncoder(self._needed_tokenizer(), options).encode(judged)
        if encoded.row is None:
            assert encoded.dropped is not None, judged
            detail = f" ({encoded.dropped.detail})" if encoded.dropped.detail else ""
            raise DataError(f"{encoded.dropped.reason}{detail}", where=where)
        found = self._checked(encoded.row.prompt.tolist(), encoded.row.answers[0].tolist(), where)
        return replace(found, step_ends=encoded.row.step_ends, step_labels=encoded.row.step_labels)

    def _checked(self, prompt: list[int], answer: list[int], where: str | None) -> Answered:
        import numpy as np

        from oarsmith.data.answers import Answered

        ids = [*prompt, *answer]
        if not prompt:
            raise DataError("there are fewer than two tokens", where=where, fix="give a prompt and its answer")
        limit, size = self._facts.room, self._facts.vocab_size
        if len(ids) > limit:
            what = f"prompt and answer have {len(ids)} tokens, more than the model's context of {limit}"
            raise DataError(what, where=where, fix="shorten them")
        low, high = min(ids), max(ids)
        if low < 0 or high >= size:
            what = f"token id {low if low < 0 else high} is outside the model's vocabulary of {size}"
            raise DataError(what, where=where, fix="use the tokenizer that belongs to this model")
        if isinstance(rule := self._facts.visibility, PrefixLM):
            find_prefix(rule, ids)
        return Answered(
            prompt=np.asarray(prompt, np.int32),
            answers=(np.asarray(answer, np.int32),),
            labels=(float("nan"),),
            where=where or "text",
        )

    def _needed_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ConfigError("this engine has no tokenizer", fix="pass tokenizer=, or give token ids")
        return self._tokenizer
