"""What `engine.py` found: numbers of the measurements, the limit that the memory sets, and the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from read_rate import read_rate
from roofline import model_size

from oarsmith.jobs.bench_report import spread

Measured = Sequence[Mapping[str, Any]]
Values = Mapping[str, list[float]]


@dataclass(frozen=True)
class Column:
    name: str
    heading: str
    digits: int
    more_is_better: bool = False


COLUMNS = (
    Column("prefill", "prompt of 512, tokens/s", 0, True),
    Column("decode", "alone, tokens/s", 1, True),
    Column("batch", "32 at once, tokens/s", 0, True),
    Column("first_median", "their first tokens: median, s", 2),
    Column("first_max", "last, s", 2),
    Column("peak_mb", "peak memory alone, MiB", 0),
    Column("cold_s", "cold start, s", 2),
    Column("command_s", "`oarsmith generate`, s", 2),
)
# How many bits a weight of ours takes: (of the blocks, of the output matrix). Groups of 32 share a scale of 16 bits,
# with 4 bits also a minimum.
BITS = {4: (5.0, 8.5), 8: (8.5, 8.5), 16: (16.0, 16.0)}


def values_of(measured: Measured) -> dict[str, list[float]]:
    """Every value of every column."""
    values: dict[str, list[float]] = {column.name: [] for column in COLUMNS}
    for one in measured:
        answers = one.get("answers", ())
        for name in ("cold_s", "command_s"):
            values[name] += [one[name]] if name in one else []
        if one["part"] == "alone":
            values["peak_mb"].append(one["peak_mb"])
            for answer in answers:
                times, begin = answer["times"], answer["begin"]
                if len(times) == 1:
                    values["prefill"].append(answer["prompt_tokens"] / (times[0] - begin))
                else:
                    values["decode"].append((len(times) - 1) / (times[-1] - times[0]))
        if one["part"] == "batch":
            begin = min(answer["begin"] for answer in answers)
            seconds = max(answer["times"][-1] for answer in answers) - begin
            values["batch"].append(sum(len(answer["times"]) for answer in answers) / seconds)
            first = [answer["times"][0] - answer["begin"] for answer in answers]
            values["first_median"].append(median(first))
            values["first_max"].append(max(first))
    return values


def numbers_of(measured: Measured) -> dict[str, float]:
    """Medians of what has been measured."""
    return {name: median(values) for name, values in values_of(measured).items() if values}


def floors(model: Path, threads: int) -> dict[int, dict[str, float]]:
    """By bits: bytes of the weights that a token needs, and how many times a second the memory can bring them."""
    size, config = model_size(model), json.loads((model / "config.json").read_text())
    head = config["hidden_size"] * config["vocab_size"]
    found = {}
    for bits, (of_blocks, of_head) in BITS.items():
        num_bytes = int((size.matrix_parameters - head) * of_blocks / 8 + head * of_head / 8)
        rate = read_rate(num_bytes, threads)
        found[bits] = {"bytes": num_bytes, "bytes_per_s": rate, "tokens_per_s": rate / num_bytes}
    return found


def table(rows: Sequence[tuple[int, str, Measured]], ours: str, limits: Mapping[int, Mapping[str, float]]) -> str:
    """A Markdown table, medians with ranges, and under each number of bits ours beside the best peer.

    Args:
        rows: (bits, name, measurements) of each engine.
        ours: how our names begin.
        limits: as `floors` gives them.
    """
    values = [(bits, name, values_of(measured)) for bits, name, measured in rows]
    columns = [column for column in COLUMNS if any(found[column.name] for _, _, found in values)]
    lines = ["| bits | | " + " | ".join(column.heading for column in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    said = []
    for bits in dict.fromkeys(bits for bits, _, _ in rows):
        mine = [(name, found) for of, name, found in values if of == bits]
        for name, found in mine:
            shown = f"**{name}**" if name.startswith(ours) else name
            cells = [spread(found[column.name], column.digits) if found[column.name] else "" for column in columns]
            lines.append(f"| {bits} | {shown} | " + " | ".join(cells) + " |")
        theirs = [one for one in mine if not one[0].startswith(ours)]
        own = next((found for name, found in mine if name.startswith(ours)), None)
        if own is not None and theirs:
            cells = [_ratio(column, own[column.name], theirs) for column in columns]
            lines.append(f"| {bits} | Oarsmith / best peer | " + " | ".join(cells) + " |")
        if own is not None and own["decode"]:
            said.append(f"{bits} bits: {_share(median(own['decode']), limits[bits])}")
    return "\n".join([*lines, "", *said])


def _ratio(column: Column, own: list[float], theirs: Iterable[tuple[str, Values]]) -> str:
    """Ours divided by the best peer's, medians, and who that is."""
    others = [(median(found[column.name]), name) for name, found in theirs if found[column.name]]
    if not own or not others:
        return ""
    best: Callable[..., tuple[float, str]] = max if column.more_is_better else min
    value, name = best(others)
    return f"{median(own) / value:.2f} ({name})"


def _share(rate: float, limit: Mapping[str, float]) -> str:
    return (
        f"{limit['bytes'] / 1e6:.0f} MB of weights a token, read at {limit['bytes_per_s'] / 1e9:.1f} GB/s, allow "
        f"{limit['tokens_per_s']:.0f} tokens/s; ours are {rate / limit['tokens_per_s']:.0%} of that"
    )
