"""Prompts with judged answers on the terminal: what is predicted, and which answer is to become likelier."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.text import Text

from oarsmith.data.answer_samples import AnswerOptions
from oarsmith.data.answer_sets import encode_answers
from oarsmith.data.answers import Answered
from oarsmith.data.preview import CONTEXT, token_texts, visible
from oarsmith.data.report import DataReport

if TYPE_CHECKING:
    from oarsmith.text import Tokenizer

# Two shades in turn, so that borders between tokens show.
_GOOD = (Style(color="black", bgcolor="green"), Style(color="black", bgcolor="bright_green"))
_BAD = (Style(color="black", bgcolor="red"), Style(color="black", bgcolor="bright_red"))
_OTHER = (Style(color="black", bgcolor="yellow"), Style(color="black", bgcolor="bright_yellow"))


def preview_answers(
    source: str | Path, tokenizer: Tokenizer, options: AnswerOptions, count: int, console: Console
) -> None:
    """Prints the first `count` rows of a source, and what became of those that were left out."""
    report = DataReport(str(source), options.max_length)
    for number, (judged, encoded) in enumerate(encode_answers(source, tokenizer, options, report), start=1):
        if encoded.row is not None:
            render_answers(encoded.row, tokenizer, console, share=options.share)
        if encoded.dropped is not None:
            detail = f": {encoded.dropped.detail}" if encoded.dropped.detail else ""
            console.print(Text(f"{judged.where}: left out, {encoded.dropped.reason}{detail}", style="red"))
        for note, times in encoded.notes.items():
            console.print(Text(f"{judged.where}: {times} x {note}", style="yellow"))
        if number == count:
            break
    console.print(_legend())


def render_answers(row: Answered, tokenizer: Tokenizer, console: Console, *, share: bool = True) -> None:
    """Prints one row: where it is from, its counts, its prompt, and each answer by itself."""
    copies = "once" if share or len(row.answers) == 1 else f"{len(row.answers)} times"
    margin = f", margin {row.margin:g}" if row.margin else ""
    head = f"{row.where}: {row.size(share=share)} tokens, of them {len(row.prompt)} of the prompt ({copies}); "
    console.print(Text(f"{head}{row.num_trained} predicted{margin}", style="bold"))
    texts = [token_texts([*row.prompt.tolist(), *answer.tolist()], tokenizer) for answer in row.answers]
    prompt = Text.assemble(("prompt, weight 0: ", "bold"))
    prompt.append("".join(map(visible, texts[0][: len(row.prompt)])), style=CONTEXT)
    console.print(prompt)
    for number, (ids, label) in enumerate(zip(row.answers, row.labels, strict=True)):
        name, shades = _named(row, label)
        shown = Text.assemble((f"{name}, {len(ids)} tokens: ", "bold"))
        _append_answer(shown, row, number, texts[number][len(row.prompt) :], shades)
        console.print(shown)
    console.print()


def _named(row: Answered, label: float) -> tuple[str, tuple[Style, Style]]:
    """What an answer is to the row."""
    if row.step_ends:
        return "answer in judged steps", _OTHER
    if math.isnan(label):
        return "another prompt's answer (KL), weight 1", _OTHER
    is_pair = len(row.answers) == 2 and not any(map(math.isnan, row.labels))
    names = ("rejected", "chosen") if is_pair else ("undesirable", "desirable")
    return f"{names[int(label)]}, weight 1", (_BAD, _GOOD)[int(label)]


def _append_answer(shown: Text, row: Answered, number: int, texts: list[str], shades: tuple[Style, Style]) -> None:
    spoken = row.spoken[number].tolist() if row.spoken else [True] * len(texts)
    judged = dict(zip(row.step_ends, row.step_labels, strict=True))
    for at, (piece, is_spoken) in enumerate(zip(texts, spoken, strict=True)):
        if not row.step_ends:
            shown.append(visible(piece), style=shades[at % 2] if is_spoken else CONTEXT)
        elif at in judged:
            shown.append(f"{visible(piece).rstrip()}[{judged[at]:g}]", style=(_GOOD if judged[at] > 0.5 else _BAD)[0])
            shown.append("\n")
        else:
            shown.append(visible(piece), style=CONTEXT)


def _legend() -> Text:
    legend = Text("legend: ")
    legend.append("chosen, desirable", style=_GOOD[0])
    legend.append(" ")
    legend.append("rejected, undesirable", style=_BAD[0])
    legend.append(" ")
    legend.append("another prompt's", style=_OTHER[0])
    legend.append(" context that is not predicted", style=CONTEXT)
    legend.append("  (shades show token borders)")
    return legend
