"""Judged answers as token ids: what generation is given, and what the model says after it.

The prompt's ids are those that inference starts from, the same for every answer of the row; an answer goes on from them
up to and with the token that ends the turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from oarsmith.data.answers import Answered
from oarsmith.data.judged import Judged, Kind
from oarsmith.data.records import OnMalformed
from oarsmith.data.samples import EOS_ADDED, Dropped
from oarsmith.data.spans import NO_TEMPLATE_FOR_ROLES, Message, RefusedError, SpanEncoder
from oarsmith.data.windows import QUESTION_CUT, TURNS_DROPPED, Window, first_that_fits, with_question_cut
from oarsmith.errors import ConfigError

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

SAME_ANSWERS = "the answers are the same"
SAME_AFTER_CUT = "the answers are the same once they are cut"
NO_ROOM = "no room for the answers behind the prompt"
HISTORY_CHANGES = "the chat template renders an answer's earlier messages differently once they are history"
BEGINNING_CUT = "prompt cut at its beginning, template and all"
ANSWERS_CUT = "answers cut at their end"
STEPS_CUT = "judged steps left out at the end"
AS_TEXT = "prompts that begin with a control token taken as they are, without the chat template"

_DEFAULT_PROMPT = 2048


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How rows of preference data become prompts with answers.

    Attributes:
        kind: what every row has to be; "point" makes two rows of a pair. None: each row is what it is.
        unjudged: rows of answers that nobody judged are taken too.
        mismatched: rows of one answer get a second one, given to another prompt (KTO's KL term).
        share: a prompt lies in a batch once (``models/sharing.py``); else a row takes a copy for each answer.
        max_length: tokens of the longest row, prompt and all answers together.
        max_prompt_len: tokens the prompt keeps where the row is too long; None: 2048, or half of max_length where that
            is less.
        step_separator: text behind each judged step, at whose last token the step is judged.
        split, on_malformed, max_dropped_fraction, template_variables: as of ``SampleOptions``.
    """

    kind: Kind | None = "pair"
    unjudged: bool = False
    mismatched: bool = False
    share: bool = True
    max_length: int = 4096
    max_prompt_len: int | None = None
    step_separator: str = "\n"
    split: str | None = None
    on_malformed: OnMalformed = "error"
    max_dropped_fraction: float = 0.2
    template_variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.prompt_limit(1) < self.max_length:
            what = f"max_prompt_len {self.max_prompt_len} leaves no room for answers in max_length {self.max_length}"
            raise ConfigError(what, where="max_prompt_len", fix="lower it, or raise max_length")

    def prompt_limit(self, num_answers: int) -> int:
        """Tokens the prompt keeps where the row is too long; copies of it never fill more than half of the row."""
        limit = self.max_prompt_len or min(_DEFAULT_PROMPT, self.max_length // 2)
        return limit if self.share or num_answers == 1 else min(limit, self.max_length // (2 * num_answers))


@dataclass(frozen=True, slots=True)
class EncodedAnswers:
    """One row, or why there is none, and what was cut on the way."""

    row: Answered | None
    dropped: Dropped | None = None
    notes: Mapping[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Draft:
    """Ids of a prompt and its answers, with the answers' tokens that are spoken and the ends of their steps."""

    prompt: list[int]
    answers: list[list[int]]
    spoken: list[list[bool]]
    step_ends: list[int] = field(default_factory=list)
    eos_added: int = 0

    def size(self, share: bool) -> int:
        return len(self.prompt) * (1 if share else len(self.answers)) + sum(map(len, self.answers))


class AnswerEncoder:
    """Encodes judged answers with one tokenizer under one set of options."""

    def __init__(self, tokenizer: Tokenizer, options: AnswerOptions) -> None:
        self._options = options
        self._encoder = SpanEncoder(tokenizer, options.template_variables)
        self._plain = SpanEncoder(tokenizer.with_chat_template(None), {})
        names = (tokenizer.id_to_token(index) for index in tokenizer.special_ids)
        self._control_tokens = tuple(name for name in names if name)

    def encode(self, judged: Judged) -> EncodedAnswers:
        """The ids of one row, cut to the limits."""
        notes: Counter[str] = Counter()
        try:
            draft = self._fitted(judged, notes)
        except RefusedError as refused:
            return EncodedAnswers(None, Dropped(refused.reason, refused.detail), notes)
        notes[EOS_ADDED] += draft.eos_added
        masks = () if all(map(all, draft.spoken)) else tuple(np.asarray(mask, np.bool_) for mask in draft.spoken)
        steps = judged.answers[0].steps[: len(draft.step_ends)]
        row = Answered(
            prompt=np.asarray(draft.prompt, np.int32),
            answers=tuple(np.asarray(ids, np.int32) for ids in draft.answers),
            labels=tuple(answer.label for answer in judged.answers),
            where=judged.where,
            margin=judged.margin,
            spoken=masks,
            step_ends=tuple(draft.step_ends),
            step_labels=tuple(label for _, label in steps),
        )
        assert row.size(share=self._options.share) <= self._options.max_length, judged.where
        return EncodedAnswers(row, None, +notes)

    def _fitted(self, judged: Judged, notes: Counter[str]) -> _Draft:
        encoder = self._encoder
        if judged.prompt.context:
            encoder = encoder.with_variables(judged.prompt.context)
        text = self._text_encoder(judged, notes)
        if text is not None:
            draft = self._draft_text(text, judged)
            _require_different(judged, draft, SAME_ANSWERS)
            if draft.size(self._options.share) > self._options.max_length:
                self._cut_beginning(draft, notes)
        else:
            draft = self._draft(encoder, judged, judged.prompt.messages)
            _require_different(judged, draft, SAME_ANSWERS)
            if draft.size(self._options.share) > self._options.max_length:
                draft = self._with_less_before(encoder, judged, notes)
        self._cut_answers(draft, notes)
        _require_different(judged, draft, SAME_AFTER_CUT)
        return draft

    def _text_encoder(self, judged: Judged, notes: Counter[str]) -> SpanEncoder | None:
        """What encodes the prompt as the text that it is; None where its messages are rendered.

        Text that somebody rendered already has its control tokens; a template around them would be a second one.
        """
        text = judged.prompt.document
        if text is None:
            return None
        if self._encoder.has_template and text.startswith(self._control_tokens):
            notes[AS_TEXT] += 1
            return self._encoder
        return None if self._encoder.has_template and judged.prompt.messages else self._plain

    def _draft_text(self, encoder: SpanEncoder, judged: Judged) -> _Draft:
        prompt = judged.prompt.document
        assert prompt is not None
        if judged.answers[0].steps:
            return self._draft_steps(encoder, judged, prompt)
        draft = _Draft([], [], [])
        for answer in judged.answers:
            said = answer.text
            if said is None:  # another prompt's answer (KTO), of a row that came as messages
                said = _content(answer.messages)
            draft.prompt, ids, eos_added = encoder.turn_of(prompt, prompt + said)
            draft.answers.append(ids)
            draft.spoken.append([True] * len(ids))
            draft.eos_added += eos_added
        return draft

    def _draft(self, encoder: SpanEncoder, judged: Judged, messages: Sequence[Message]) -> _Draft:
        """Ids of the answers after these messages, which are the prompt or its newest turns."""
        tools = judged.prompt.tools
        if judged.answers[0].steps:
            return self._draft_steps(encoder, judged, encoder.render(messages, tools, prompt=True))
        draft = _Draft([], [], [])
        for answer in judged.answers:
            said = answer.messages or ({"role": "assistant", "content": (answer.text or "").strip()},)
            whole = [*messages, *said]
            own = {at: 1.0 for at in range(len(messages), len(whole)) if whole[at]["role"] == "assistant"}
            encoded = encoder.encode_turns(whole, tools, own)
            if encoded.refused:
                raise encoded.refused[0]
            if len(encoded.spans) > 1:
                raise RefusedError(HISTORY_CHANGES)
            span = encoded.spans[0]
            start = span.weights.index(1.0)
            assert not draft.answers or draft.prompt == span.ids[:start], judged.where
            draft.prompt = span.ids[:start]
            draft.answers.append(span.ids[start:])
            draft.spoken.append([weight > 0 for weight in span.weights[start:]])
            draft.eos_added += span.eos_added
        return draft

    def _draft_steps(self, encoder: SpanEncoder, judged: Judged, prompt: str) -> _Draft:
        """Each step encoded by itself and then the separator, as TRL's PRMTrainer does: a step is judged at the
        separator, whatever it ends with."""
        separator, ids, ends = self._options.step_separator, list[int](), list[int]()
        for step, _ in judged.answers[0].steps:
            for text in (step.removesuffix(separator), separator):
                ids += encoder.tokenizer.encode(text, add_special_tokens=False)
            ends.append(len(ids) - 1)
        return _Draft(encoder.encode(prompt), [ids], [[True] * len(ids)], ends)

    def _with_less_before(self, encoder: SpanEncoder, judged: Judged, notes: Counter[str]) -> _Draft:
        """Whole turns go from the oldest side first; one that is too long by itself keeps the end of its question."""
        options, tools = self._options, judged.prompt.tools
        window = Window(judged.prompt.messages, {})
        num_head, starts = window.turns()
        if len(starts) > 1:

            def fits(turn: int) -> bool:
                draft = self._draft(encoder, judged, window.since(num_head, starts[turn]).messages)
                return draft.size(options.share) <= options.max_length

            first = first_that_fits(len(starts) - 1, fits)
            notes[TURNS_DROPPED] += len(starts) - 1 if first is None else first
            window = window.since(num_head, starts[-1 if first is None else first])
            draft = self._draft(encoder, judged, window.messages)
            if first is not None:
                return draft
        else:
            draft = self._draft(encoder, judged, window.messages)
        limit = options.prompt_limit(len(draft.answers))
        if len(draft.prompt) <= limit:
            return draft
        try:
            asked = [*window.messages, {"role": "assistant", "content": "-"}]
            shorter = with_question_cut(encoder, asked, tools, limit)[:-1]
        except RefusedError:  # what is around the question is too long by itself
            self._cut_beginning(draft, notes)
            return draft
        notes[QUESTION_CUT] += 1
        return self._draft(encoder, judged, shorter)

    def _cut_beginning(self, draft: _Draft, notes: Counter[str]) -> None:
        """Keeps the last tokens of the prompt, and the token that begins every text."""
        limit = self._options.prompt_limit(len(draft.answers))
        if len(draft.prompt) > limit:
            bos = [draft.prompt[0]] if draft.prompt[0] == self._encoder.tokenizer.bos_id else []
            draft.prompt = [*bos, *draft.prompt[len(draft.prompt) - limit + len(bos) :]]
            notes[BEGINNING_CUT] += 1

    def _cut_answers(self, draft: _Draft, notes: Counter[str]) -> None:
        """All answers in proportion, so that none is told by its length; of judged steps the whole ones are kept."""
        over = draft.size(self._options.share) - self._options.max_length
        if over <= 0:
            return
        sizes = [len(ids) for ids in draft.answers]
        room = sum(sizes) - over
        kept = [size * room // sum(sizes) for size in sizes[:-1]]
        kept.append(room - sum(kept))
        if draft.step_ends:
            whole = [end for end in draft.step_ends if end < room]
            notes[STEPS_CUT] += len(draft.step_ends) - len(whole)
            draft.step_ends, kept = whole, [whole[-1] + 1 if whole else 0]
        else:
            notes[ANSWERS_CUT] += sum(keep < size for keep, size in zip(kept, sizes, strict=True))
        if min(kept) < 1:
            raise RefusedError(NO_ROOM, f"{len(draft.prompt)} tokens of {self._options.max_length} are the prompt")
        draft.answers = [ids[:keep] for ids, keep in zip(draft.answers, kept, strict=True)]
        draft.spoken = [mask[:keep] for mask, keep in zip(draft.spoken, kept, strict=True)]


def _content(messages: Sequence[Message]) -> str:
    """An answer of one message as text."""
    if len(messages) != 1 or "tool_calls" in messages[0]:
        raise RefusedError(NO_TEMPLATE_FOR_ROLES, "tools")
    text: str = messages[0]["content"]
    return text


def _require_different(judged: Judged, draft: _Draft, reason: str) -> None:
    """Of a pair that is alike nothing can be learned."""
    if judged.kind == "pair" and judged.answers[1].label == 0.0 and draft.answers[0] == draft.answers[1]:
        raise RefusedError(reason)
