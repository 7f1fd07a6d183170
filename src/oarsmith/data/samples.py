"""Conversations and documents as samples: token ids, each with the loss weight of predicting it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from oarsmith.data.conversations import Conversation, DatasetFormat
from oarsmith.data.records import OnMalformed
from oarsmith.data.spans import Message, Span, SpanEncoder
from oarsmith.data.windows import Fitted, Fitter, Window
from oarsmith.errors import ConfigError, DataError

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

TrainOn = Literal["assistant", "last", "all"]

NO_ANSWER = "no answer to train on"
EMPTY_DOCUMENT = "empty document"
SPLIT_TURNS = "turns given their own sample (the template or the tokenizer renders history differently)"
EOS_ADDED = "answers ended with eos (no template ends the turn)"
EMPTY_ANSWERS = "empty answers not trained"
UNASKED = "assistant messages before any question not trained"
UNANSWERED = "messages after the last answer left out"
PIECES = "documents cut into pieces"
REFUSED_TURNS = "answers not trained: "


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One document of a batch.

    Attributes:
        ids: int32 [num_tokens].
        weights: float32 [num_tokens]; weights[i] is the loss weight of predicting ids[i] from what is before it.
            weights[0] is 0.
        where: file:line of the row it comes from.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    where: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_trained(self) -> int:
        """Number of tokens with a loss."""
        return int(np.count_nonzero(self.weights))

    def content(self) -> Iterator[bytes]:
        """Ids and weights."""
        yield len(self).to_bytes(8, "little")
        yield np.ascontiguousarray(self.ids, dtype="<i4").tobytes()
        yield np.ascontiguousarray(self.weights, dtype="<f4").tobytes()


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How rows become samples.

    Attributes:
        max_length: tokens of the longest sample.
        src_length: tokens the prompt keeps where prompt and answer together are too long; None: half of max_length.
        train_on: "assistant" every answer, "last" only the last, "all" every token.
        dataset_format: the format of the rows; None detects it row by row.
        split: split of a folder or dataset.
        on_malformed: a malformed row is an error, or left out and counted.
        on_empty: a row without trained tokens is left out and counted, or an error.
        max_dropped_fraction: more rows left out than this is an error.
        template_variables: variables of the chat template, such as {"enable_thinking": False}.
    """

    max_length: int = 2048
    src_length: int | None = None
    train_on: TrainOn = "assistant"
    dataset_format: DatasetFormat | None = None
    split: str | None = None
    on_malformed: OnMalformed = "error"
    on_empty: Literal["drop", "error"] = "drop"
    max_dropped_fraction: float = 0.2
    template_variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}, at least 2 is needed", where="max_length", fix="raise it"
            )
        if self.src_length is not None and not 0 < self.src_length < self.max_length:
            what = (
                f"src_length is {self.src_length}, which leaves no room for an answer in max_length {self.max_length}"
            )
            raise ConfigError(what, where="src_length", fix=f"choose 1 to {self.max_length - 1}")
        if not 0 <= self.max_dropped_fraction <= 1:
            what = f"max_dropped_fraction is {self.max_dropped_fraction}"
            raise ConfigError(what, where="max_dropped_fraction", fix="choose 0 to 1")


@dataclass(frozen=True, slots=True)
class Dropped:
    """Why a row gave no sample: `reason` is one of a few fixed sentences, `detail` what it was in this row."""

    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The samples of one row (several where turns need their own), or why there are none, and what was cut on the
    way."""

    samples: tuple[Sample, ...]
    dropped: Dropped | None = None
    notes: Mapping[str, int] = field(default_factory=dict)


class ConversationEncoder:
    """Encodes conversations with one tokenizer under one set of options."""

    def __init__(self, tokenizer: Tokenizer, options: SampleOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._encoder = SpanEncoder(tokenizer, options.template_variables)

    def encode(self, conversation: Conversation) -> Encoded:
        """The samples of one conversation or document.

        Raises:
            DataError: message weights together with train_on="all".
        """
        if conversation.document is not None:
            return self._document(conversation.document, conversation.where)
        notes: Counter[str] = Counter()
        trained = self._trained_messages(conversation, notes)
        if not trained:
            reason = next((name for name in (EMPTY_ANSWERS, UNASKED) if notes[name]), "no assistant message")
            return Encoded((), Dropped(NO_ANSWER, reason), notes)
        unanswered = len(conversation.messages) - 1 - max(trained)
        if unanswered and self._options.train_on != "last":
            notes[UNANSWERED] += unanswered
        window = Window(conversation.messages, trained).until(max(trained))
        src_length = self._options.src_length or self._options.max_length // 2
        encoder = self._encoder.with_variables(conversation.context) if conversation.context else self._encoder
        fitter = Fitter(encoder, max_length=self._options.max_length, src_length=src_length)
        return self._collect(fitter.fit(window, conversation.tools), conversation, notes)

    def _collect(self, fitted: Fitted, conversation: Conversation, notes: Counter[str]) -> Encoded:
        notes += fitted.notes
        if len(fitted.spans) > 1:
            notes[SPLIT_TURNS] += len(fitted.spans) - 1
        notes[EOS_ADDED] += sum(span.eos_added for span in fitted.spans)
        if not fitted.spans:
            assert fitted.refused, f"{conversation.where}: no sample and no reason"
            return Encoded((), Dropped(fitted.refused[0].reason, fitted.refused[0].detail), +notes)
        for refused in fitted.refused:
            notes[REFUSED_TURNS + refused.reason] += 1
        return Encoded(tuple(self._sample(span, conversation.where) for span in fitted.spans), None, +notes)

    def _sample(self, span: Span, where: str) -> Sample:
        weights = np.asarray(span.weights, dtype=np.float32)
        if self._options.train_on == "all":
            weights[:] = 1.0
        weights[0] = 0.0
        sample = Sample(np.asarray(span.ids, dtype=np.int32), weights, where)
        assert len(sample.ids) == len(weights) <= self._options.max_length, (where, len(sample.ids), len(weights))
        return sample

    def _trained_messages(self, conversation: Conversation, notes: Counter[str]) -> dict[int, float]:
        """Index -> loss weight of the assistant messages that are trained."""
        options = self._options
        trained: dict[int, float] = {}
        asked = False
        for index, message in enumerate(conversation.messages):
            if "weight" in message and options.train_on == "all":
                what = f"message {index} has a weight, but train_on 'all' gives every token the same"
                raise DataError(what, where=conversation.where, fix="remove the weights, or use train_on 'assistant'")
            if message["role"] in ("user", "tool"):
                asked = True
            elif message["role"] == "assistant" and message.get("weight", 1.0) > 0:
                if not asked:
                    notes[UNASKED] += 1
                elif not _says_something(message):
                    notes[EMPTY_ANSWERS] += 1
                else:
                    trained[index] = message.get("weight", 1.0)
        if trained and options.train_on != "assistant":
            last = max(trained)
            return {last: trained[last]}
        return trained

    def _document(self, text: str, where: str) -> Encoded:
        """Plain text: every token trained, eos at the end, pieces of max_length where it is longer.

        A piece begins with the last token of the one before, so that no token goes untrained for being first.
        """
        ids = self._tokenizer.encode(text)
        if not text.strip() or not ids:
            return Encoded((), Dropped(EMPTY_DOCUMENT))
        eos_id = self._tokenizer.eos_id
        if eos_id is not None and ids[-1] != eos_id:
            ids = [*ids, eos_id]
        max_length = self._options.max_length
        pieces = [ids[start : start + max_length] for start in range(0, max(len(ids) - 1, 1), max_length - 1)]
        samples = tuple(self._sample(Span(piece, [1.0] * len(piece), []), where) for piece in pieces)
        if len(ids) < 2:
            return Encoded((), Dropped(EMPTY_DOCUMENT, "one token"))
        return Encoded(samples, None, {PIECES: len(pieces) - 1} if len(pieces) > 1 else {})


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def encode_conversation(conversation: Conversation, tokenizer: Tokenizer, options: SampleOptions) -> Encoded:
    """The samples of one conversation; see `ConversationEncoder` for many."""
    return ConversationEncoder(tokenizer, options).encode(conversation)
