"""The search of ``oarsmith merge``: merges that are made, judged and thrown away."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from oarsmith.atomic import temporary_directory
from oarsmith.config.merge import MergeConfig
from oarsmith.errors import ModelError
from oarsmith.jobs.row_progress import RowProgress
from oarsmith.merge.judge import Judge, total_loss
from oarsmith.merge.recipe import Recipe
from oarsmith.merge.run import Options, merge_models
from oarsmith.merge.search import Numbers, Trial, knobs, search_evolution, search_grid, with_numbers

# What a merge that cannot be made (weights that sum to zero) is worth.
_WORST = 1e9


def choose_numbers(
    config: MergeConfig, recipe: Recipe, judge: Judge, options: Options, output: Path, console: Console
) -> Recipe:
    """The recipe with the numbers that are best by the judge's files.

    Raises:
        OarsmithError: nothing to choose, too many combinations, no merge that can be made.
    """
    low, high = config.search_range
    chosen = knobs(recipe, config.search_over, config.search_groups)
    quick = replace(options, probe=False, copy_files=())
    total = config.search_trials if config.search == "evolution" else config.search_steps ** len(chosen)
    with temporary_directory(output) as folder, RowProgress(console, 0, total, "searching", unit="merges") as progress:

        def loss(numbers: Numbers) -> float:
            place = folder / "trial"
            try:
                merge_models(with_numbers(recipe, chosen, numbers), place, quick, progress=lambda *_: None)
                scores = judge.score(place)
            except ModelError as error:
                progress.message(f"{_shown(numbers)}: {error.what}")
                progress.add(0)
                return _WORST
            progress.add(0)
            progress.message(f"{_shown(numbers)}: {', '.join(score.words for score in scores)}")
            return total_loss(scores)

        if config.search == "grid":
            trials = search_grid(loss, len(chosen), low, high, config.search_steps, config.search_trials)
        else:
            trials = search_evolution(loss, len(chosen), low, high, config.search_trials, config.seed)
    best = min(trials, key=lambda trial: trial.loss)
    if best.loss >= _WORST:
        raise ModelError("none of the merges could be made", where="search", fix="change search_range")
    _tell(chosen_names(recipe, config), best, len(trials), console)
    return with_numbers(recipe, chosen, best.numbers)


def chosen_names(recipe: Recipe, config: MergeConfig) -> list[str]:
    """What each number is."""
    found = []
    for knob in knobs(recipe, config.search_over, config.search_groups):
        group = f" (layers, {knob.group + 1} of {config.search_groups})" if config.search_groups > 1 else ""
        found.append(f"{knob.parameter}{'' if knob.model is None else f' of {knob.model}'}{group}")
    return found


def _tell(names: list[str], best: Trial, count: int, console: Console) -> None:
    console.print(f"best of {count} merges:")
    for name, number in zip(names, best.numbers, strict=True):
        console.print(f"  {name}: {number:.4g}")


def _shown(numbers: Numbers) -> str:
    return json.dumps([round(number, 4) for number in numbers])
