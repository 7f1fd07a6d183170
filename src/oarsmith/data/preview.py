"""Samples on the terminal, each token coloured by its loss weight."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.text import Text

from oarsmith.data.dataset import encode_rows
from oarsmith.data.report import DataReport
from oarsmith.data.samples import Sample, SampleOptions
from oarsmith.text import StreamDecoder

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

CONTEXT = Style(dim=True)
# Two shades in turn, so that borders between tokens show.
_TRAINED = (Style(color="black", bgcolor="green"), Style(color="black", bgcolor="bright_green"))
_PARTLY = (Style(color="black", bgcolor="yellow"), Style(color="black", bgcolor="bright_yellow"))


def preview(source: str | Path, tokenizer: Tokenizer, options: SampleOptions, count: int, console: Console) -> None:
    """Prints the samples of the first `count` rows of a source, and what became of the rows that gave none."""
    report = DataReport(str(source), options.max_length)
    rows = encode_rows(source, tokenizer, options, report)
    for number, (record, encoded) in enumerate(rows, start=1):
        for sample in encoded.samples:
            render_preview(sample, tokenizer, console)
        if encoded.dropped is not None:
            detail = f": {encoded.dropped.detail}" if encoded.dropped.detail else ""
            console.print(Text(f"{record.where}: left out, {encoded.dropped.reason}{detail}", style="red"))
        for note, times in encoded.notes.items():
            console.print(Text(f"{record.where}: {times} x {note}", style="yellow"))
        if number == count:
            break
    console.print(_legend())


def render_preview(sample: Sample, tokenizer: Tokenizer, console: Console) -> None:
    """Prints one sample: where it is from, its counts, and its tokens."""
    console.print(Text(f"{sample.where}: {len(sample)} tokens, {sample.num_trained} trained", style="bold"))
    shown = Text()
    pieces = token_texts(sample.ids.tolist(), tokenizer)
    for number, (piece, weight) in enumerate(zip(pieces, sample.weights.tolist(), strict=True)):
        shades = _TRAINED if weight == 1.0 else _PARTLY
        shown.append(visible(piece), style=shades[number % 2] if weight else CONTEXT)
    console.print(shown)
    console.print()


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text; where several make one character, the last of them has it and the others "".

    Special tokens that decode to nothing (ChatGLM's) have their names.
    """
    decoder, special = StreamDecoder(tokenizer, skip_special_tokens=False), tokenizer.special_ids
    texts = []
    for token_id in ids:
        if token_id in special and not tokenizer.decode([token_id]):
            texts.append(decoder.finish() + (tokenizer.id_to_token(token_id) or ""))
        else:
            texts.append(decoder.push(token_id))
    if texts:
        texts[-1] += decoder.finish()
    return texts


def visible(piece: str) -> str:
    """Control characters as their Unicode pictures, a line break as its sign and a break: nothing reaches the
    terminal as a command."""
    shown = "".join(chr(0x2400 + ord(c)) if c < " " and c != "\n" else ("\u2421" if c == "\x7f" else c) for c in piece)
    return shown.replace("\n", "\u21b5\n")


def _legend() -> Text:
    legend = Text("legend: ")
    legend.append("trained", style=_TRAINED[0])
    legend.append(" trained with another weight than 1", style=_PARTLY[0])
    legend.append(" context without loss", style=CONTEXT)
    legend.append("  (shades show token borders)")
    return legend
