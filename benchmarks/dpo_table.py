"""The tables of `benchmarks/dpo.py`: seconds of a step, and whether both sides do the same work."""

from __future__ import annotations

import statistics

from turns import OUR_NAMES, OURS, Measurement, spread

PEERS = {
    "default": "TRL, defaults",
    "plain": "TRL, no checkpointing",
    "precomputed": "TRL, reference precomputed",
    "best": "TRL, reference precomputed, pairs one by one",
    "master": "the same, fp32 weights, bf16 autocast",
}
# Both sides in fp32, the reference in every step: to compare numbers, not speed.
EXACT = "exact"
NAMES = {**PEERS, EXACT: "TRL, fp32", **OUR_NAMES}


def with_reference(one: Measurement) -> float:
    """Seconds of a step and of its share, by tokens, of the pass that computes the reference for one epoch."""
    return one.seconds_per_step + one.steps[0]["reference_s"] * one.tokens_per_step / one.dataset_tokens


def by_system(found: list[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Of each trainer its rounds, in order."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for one in sorted(found, key=lambda one: one.round):
        groups.setdefault((one.mode, one.system), []).append(one)
    return groups


def table(found: list[Measurement]) -> str:
    """Medians over the rounds, with the smallest and the largest value; ratios are taken within a round."""
    heads = ["", "", "s/step, reference known", "s/step, one epoch with its reference", "peer / Oarsmith, known"]
    heads += ["peer / Oarsmith, one epoch", "peak MiB", "start to end of step 1, s", "CPU"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    groups = by_system(found)
    for (mode, system), rows in groups.items():
        ours = groups[mode, OURS]
        in_step = system in ("default", "plain")
        known = [a.seconds_per_step / b.seconds_per_step for a, b in zip(rows, ours, strict=True)]
        epoch = [with_reference(a) / with_reference(b) for a, b in zip(rows, ours, strict=True)]
        cells = [
            mode,
            NAMES[system],
            spread([one.seconds_per_step for one in rows], 2) + (" (computes it)" if in_step else ""),
            spread([with_reference(one) for one in rows], 2),
            "" if system == OURS else spread(known, 2),
            "" if system == OURS else spread(epoch, 2),
            spread([one.peak_mb for one in rows], 0),
            spread([one.first_step_s for one in rows], 1),
            f"{statistics.median(one.cpu_share for one in rows):.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement(found: list[Measurement]) -> str:
    """The first round's losses, and how far log-probabilities of answers (mean over a step's pairs) are from ours."""
    heads = ["", "", "log-probability of step 1: chosen, rejected", "loss of each step", "largest difference of a loss"]
    heads += ["of a mean log-probability"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    groups = by_system(found)
    for (mode, system), (one, *_) in groups.items():
        ours, first = groups[mode, OURS][0], one.steps[0]
        pairs = list(zip(one.steps, ours.steps, strict=True))
        cells = [mode, NAMES[system], f"{first['logps_chosen']:.2f}, {first['logps_rejected']:.2f}"]
        cells.append(" ".join(f"{loss:.4f}" for loss in one.losses))
        if system == OURS:
            cells += ["", ""]
        else:
            cells.append(f"{max(abs(a['loss'] - b['loss']) for a, b in pairs):.2g}")
            gaps = (abs(a[key] - b[key]) for a, b in pairs for key in ("logps_chosen", "logps_rejected"))
            cells.append(f"{max(gaps):.2g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
