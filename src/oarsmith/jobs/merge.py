"""``oarsmith merge``: models into one, by a recipe or flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from oarsmith.config.merge import MergeConfig, PaddleKeys, RecipeKeys
from oarsmith.config.resolved import Resolved
from oarsmith.errors import ConfigError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.outputs import check_destination, describe, progress_bar
from oarsmith.merge.card import write_card
from oarsmith.merge.flags import Flags, recipe_of_flags
from oarsmith.merge.models import find_model
from oarsmith.merge.recipe import Recipe, read_recipe
from oarsmith.merge.run import Merged, Options, merge_models

_MOST_PROCESSES = 8


def run(resolved: Resolved[MergeConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    output = Path(config.output_path)
    recipe, written = recipe_of(config)
    files = [find_model(reference) for reference in recipe.models]
    inputs = [path for one in files for path in (one.base, one.adapter) if path is not None]
    check_destination(output, config.overwrite, inputs=inputs)
    merge(config, recipe, written, output, console)
    console.print(f"next:  oarsmith chat {output}")
    return 0


def recipe_of(config: MergeConfig) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a configuration, and what of it was given, to be written beside the model.

    Raises:
        ConfigError: neither a recipe nor models, or both.
    """
    paths = list(config.model_path_list)
    if config.model_path_str is not None:
        paths += [path.strip() for path in config.model_path_str.split(",") if path.strip()]
    given = {name: value for name in _names(RecipeKeys) if (value := getattr(config, name)) is not None}
    if not paths and config.lora_model_path is None:
        return read_recipe(given), given
    if config.models or config.slices or config.modules:
        raise ConfigError("models are named twice: in a recipe and by flags", where="model_path_list", fix="keep one")
    flags = {name: getattr(config, name) for name in _names(PaddleKeys)}
    return recipe_of_flags(_flags(config, paths)), {**given, **_plain(flags), "model_path_list": paths}


def _names(keys: type[RecipeKeys] | type[PaddleKeys]) -> list[str]:
    return list(keys.__annotations__)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in values.items() if value is not None
    }


def _flags(config: MergeConfig, paths: list[str]) -> Flags:
    base = config.base_model_path or (None if config.base_model is None else str(config.base_model))
    if config.lora_model_path is not None:
        if len(paths) + (base is not None) != 1:
            raise ConfigError(
                "an adapter goes into one model", where="lora_model_path", fix="name it: --base_model_path PATH"
            )
        paths, base = [f"{base or paths[0]}+{config.lora_model_path}"], None
    return Flags(
        models=paths,
        base=base,
        weights=config.weight_list,
        merge_method=config.merge_method,
        merge_type=config.merge_type,
        sparsify_type=config.sparsify_type,
        normalize=config.normalize,
        slerp_alpha=config.slerp_alpha,
        slerp_normalize_eps=config.slerp_normalize_eps,
        slerp_dot_threshold=config.slerp_dot_threshold,
        ties_elect_type=config.ties_elect_type,
        reserve_p=config.reserve_p,
        rescale=config.rescale,
        epsilon=config.epsilon,
        dtype=config.out_dtype or config.dtype,
    )


def options_of(config: MergeConfig) -> Options:
    """How the merge is carried out."""
    cores = len(os.sched_getaffinity(0))
    return Options(
        num_processes=config.n_process or min(cores, _MOST_PROCESSES),
        max_shard_bytes=int(config.max_shard_gb * 1e9),
        seed=config.seed,
        probe=config.probe,
        copy_files=config.copy_file_list,
    )


def merge(config: MergeConfig, recipe: Recipe, written: Mapping[str, Any], output: Path, console: Console) -> Merged:
    """Merge into a directory and say what was done."""
    with progress_bar(console) as show:
        report = merge_models(
            recipe,
            output,
            options_of(config),
            progress=show,
            card=lambda folder, found: write_card(folder, found, written, config.seed),
        )
    if report.kept:
        console.print(f"{report.kept:,} of {report.num_tensors:,} tensors were there from an interrupted merge")
    if report.idle:
        console.print(f"note:  {recipe.method} has no {', '.join(report.idle)}: without an effect")
    for note in report.notes:
        console.print(f"note:  {note}")
    console.print(
        f"wrote {output}: {report.num_tensors:,} tensors, {report.num_parameters:,} parameters, read back: names, "
        "shapes, hashes agree, all numbers finite"
    )
    for name, found in report.verified.answers.items():
        console.print(f"beside {name}: {describe(found)}")
    if not report.verified.known:
        console.print("note:  the family is not known: answers were not looked at")
    return report
