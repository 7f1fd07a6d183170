"""What a model is worth by some files: perplexity of texts, loss on rows with answers, how often the better of two
answers is the likelier one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from oarsmith.data.answer_samples import AnswerOptions
from oarsmith.data.answer_sets import build_answers
from oarsmith.data.dataset import build_samples
from oarsmith.data.loader import Loader
from oarsmith.data.preferences import is_preference
from oarsmith.data.records import read_records
from oarsmith.data.samples import SampleOptions
from oarsmith.data.sources import read_text_file
from oarsmith.errors import DataError
from oarsmith.loading import load_model
from oarsmith.methods.sft import OBJECTIVE
from oarsmith.model_path import find_tokenizer
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer
from oarsmith.training.evaluate import Piece, evaluate, score_pieces, windows

_TEXTS = (".txt", ".text", ".md")


@dataclass(frozen=True)
class Score:
    """A model on one file.

    Attributes:
        words: as a table shows it.
        loss: what a search makes small: nats per token, or the share of pairs that are the wrong way round.
    """

    words: str
    loss: float


Judged = Callable[[Decoder], Score]


@dataclass(frozen=True)
class Judge:
    """Judges models by files.

    Attributes:
        rows: of each file that are used, or windows of its text.
        length: tokens of one at most.
    """

    files: tuple[str, ...]
    rows: int
    length: int
    # By file and tokenizer: a search judges many models that have one tokenizer.
    _read: dict[tuple[str, str], Judged] = field(default_factory=dict, init=False, repr=False, compare=False)

    def score(self, path: Path, adapter: Path | None = None) -> tuple[Score, ...]:
        """A model on every file, with its own tokenizer.

        Raises:
            OarsmithError: a model or file that cannot be read.
        """
        tokenizer = find_tokenizer(path, adapter)
        model = load_model(path, adapter=adapter)
        return tuple(self._judged(file, tokenizer)(model) for file in self.files)

    def _judged(self, file: str, tokenizer: Tokenizer) -> Judged:
        key = file, tokenizer.fingerprint
        if key not in self._read:
            self._read[key] = self._judge_of(file, tokenizer)
        return self._read[key]

    def _judge_of(self, file: str, tokenizer: Tokenizer) -> Judged:
        if Path(file).suffix.lower() in _TEXTS:
            return self._text(file, tokenizer)
        first = next(iter(read_records(file, None)), None)
        if first is None:
            raise DataError("there is no row in it", where=file, fix="give a text, rows with answers, or pairs")
        return self._pairs(file, tokenizer) if is_preference(first.value) else self._answers(file, tokenizer)

    def _text(self, file: str, tokenizer: Tokenizer) -> Judged:
        pieces = windows(tokenizer.encode(read_text_file(file)), self.length, self.length)[: self.rows]
        if not pieces:
            raise DataError("the text is shorter than two tokens", where=file, fix="give a longer text")

        def judged(model: Decoder) -> Score:
            scores = list(score_pieces(model, pieces))
            loss = -sum(one.logprob for one in scores) / sum(one.num_tokens for one in scores)
            return Score(f"perplexity {math.exp(min(loss, 700.0)):.3f}", loss)

        return judged

    def _answers(self, file: str, tokenizer: Tokenizer) -> Judged:
        options = SampleOptions(max_length=self.length, max_dropped_fraction=1.0)
        samples = build_samples(file, tokenizer, options).samples[: self.rows]
        loader = Loader(
            samples,
            rows_per_batch=max(1, 4096 // self.length),
            capacity=self.length,
            packing=True,
            shuffle=False,
        )

        def judged(model: Decoder) -> Score:
            batches = (loader.batch_at(0, index) for index in range(loader.batches_per_epoch(0)))
            found = evaluate(model, OBJECTIVE, batches)
            return Score(f"perplexity {found.perplexity:.3f}, accuracy {found.accuracy:.1%}", found.loss)

        return judged

    def _pairs(self, file: str, tokenizer: Tokenizer) -> Judged:
        options = AnswerOptions(kind="pair", max_length=self.length, max_dropped_fraction=1.0)
        rows = list(islice(build_answers(file, tokenizer, options).rows, self.rows))
        pieces = [
            Piece([*row.prompt.tolist(), *answer.tolist()], len(row.prompt)) for row in rows for answer in row.answers
        ]

        def judged(model: Decoder) -> Score:
            logprobs = [one.logprob for one in score_pieces(model, pieces)]
            right = sum(a > b for a, b in zip(logprobs[::2], logprobs[1::2], strict=True))
            return Score(f"{right} of {len(rows)} pairs", 1 - right / len(rows))

        return judged


def total_loss(scores: Sequence[Score]) -> float:
    """What a search makes small: the mean over files."""
    return sum(one.loss for one in scores) / len(scores)
