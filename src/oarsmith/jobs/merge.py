"""``oarsmith merge``: models into one, by a recipe or flags; a mixture of them; an adapter of what came out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from oarsmith.atomic import atomic_write_text, temporary_directory
from oarsmith.config.merge import MergeConfig, RecipeKeys
from oarsmith.config.merge_combinations import by_flags
from oarsmith.config.resolved import Resolved, is_given
from oarsmith.errors import ConfigError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.outputs import check_destination, describe, progress_bar
from oarsmith.merge.card import RECIPE, recipe_text, write_card
from oarsmith.merge.flags import Flags, idle_flags, recipe_of_flags
from oarsmith.merge.models import ModelFiles, find_model
from oarsmith.merge.plan import dtype_of
from oarsmith.merge.recipe import Recipe, SliceSpec, SourceSpec, model_name, read_recipe, read_tokenizer, recipe_values
from oarsmith.merge.run import Card, Merged, Options, merge_models

if TYPE_CHECKING:
    from oarsmith.merge.judge import Judge

_MOST_PROCESSES = 8
Table = list[list[str]]


def run(resolved: Resolved[MergeConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    output = Path(config.output_path)
    if config.experts:
        return _mixture(config, output, console)
    recipe = recipe_of(config)
    files = _check(config, recipe.models, output)
    if by_flags(config):
        idle = [flag for flag in idle_flags(recipe) if is_given(resolved.provenance[flag])]
        if idle:
            console.print(f"note:  {recipe.method} has no {', '.join(idle)}: without an effect")
    base = None if config.adapter_rank is None else _base_of_adapter(recipe, files)
    judge = _judge(config)
    table: Table = []
    if judge is not None:
        if config.search != "none":  # first: it looks at the recipe before anything takes long
            from oarsmith.jobs.merge_search import choose_numbers

            recipe = choose_numbers(config, recipe, judge, options_of(config), output, console)
        table = _inputs_judged(judge, files, console)
    if base is not None:
        return _adapter(config, recipe, base, output, console, judge, table)

    def card(folder: Path, found: Merged) -> None:
        if judge is not None:
            table.append(["merged", *(score.words for score in judge.score(folder))])
        write_card(folder, found, recipe_values(recipe), config.seed, table)

    _say(_merged(config, recipe, output, console, card), output, recipe.method, console)
    _print_table(table, console)
    console.print(f"next:  oarsmith chat {output}")
    return 0


def recipe_of(config: MergeConfig) -> Recipe:
    """The recipe of a configuration.

    Raises:
        ConfigError: neither a recipe nor models, or both.
    """
    paths = list(config.model_path_list)
    if config.model_path_str is not None:
        paths += [path.strip() for path in config.model_path_str.split(",") if path.strip()]
    if not paths and config.lora_model_path is None:
        values = config.model_dump()
        given = {name: values[name] for name in RecipeKeys.model_fields if values[name] is not None}
        return read_recipe(given)
    if config.models or config.slices or config.modules:
        raise ConfigError("models are named twice: in a recipe and by flags", where="model_path_list", fix="keep one")
    made = recipe_of_flags(_flags(config, paths))
    return replace(made, tokenizer=read_tokenizer(config.model_dump()), chat_template=config.chat_template)


def _flags(config: MergeConfig, paths: list[str]) -> Flags:
    base = config.base_model_path
    if base is None and config.base_model is not None:
        base = model_name(config.base_model, "base_model")
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
    return Options(
        num_processes=config.n_process or min(len(os.sched_getaffinity(0)), _MOST_PROCESSES),
        max_shard_bytes=int(config.max_shard_gb * 1e9),
        seed=config.seed,
        probe=config.probe,
        copy_files=config.copy_file_list,
    )


def _check(config: MergeConfig, models: tuple[str, ...], output: Path) -> list[ModelFiles]:
    """The models, none of which the result replaces."""
    files = [find_model(reference) for reference in models]
    inputs = [path for one in files for path in (one.base, one.adapter) if path is not None]
    check_destination(output, config.overwrite, inputs=inputs)
    return files


def _merged(config: MergeConfig, recipe: Recipe, output: Path, console: Console, card: Card) -> Merged:
    with progress_bar(console) as show:
        return merge_models(recipe, output, options_of(config), progress=show, card=card)


def _mixture(config: MergeConfig, output: Path, console: Console) -> int:
    from oarsmith.merge.mixture import expert_values, mixture_planner, read_experts

    if config.models or config.slices or config.modules or by_flags(config):
        raise ConfigError("a mixture is made of experts alone", where="experts", fix="remove the other models")
    if config.base_model is None:
        raise ConfigError("all but the experts is the base's", where="base_model", fix="name it: base_model: PATH")
    base = model_name(config.base_model, "base_model")
    experts = read_experts(config.experts or [], config.gate_mode, config.experts_per_token)
    sources = [SourceSpec(model) for model in dict.fromkeys([base, *(one.model for one in experts)])]
    recipe = Recipe("passthrough", (SliceSpec(tuple(sources)),), chat_template=config.chat_template)
    _check(config, recipe.models, output)
    dtype = dtype_of(config.out_dtype or config.dtype)
    planner = mixture_planner(experts, base, config.gate_mode, config.experts_per_token, dtype, config.seed)
    values = dict(expert_values(experts, base, config.gate_mode, config.experts_per_token))
    if config.chat_template is not None:
        values["chat_template"] = config.chat_template
    with progress_bar(console) as show:
        report = merge_models(
            recipe,
            output,
            options_of(config),
            progress=show,
            card=lambda folder, found: write_card(folder, found, values, config.seed),
            make_plan=planner,
        )
    _say(report, output, "mixture", console)
    console.print(f"next:  oarsmith chat {output}")
    return 0


def _base_of_adapter(recipe: Recipe, files: list[ModelFiles]) -> ModelFiles:
    if recipe.base is None:
        raise ConfigError("an adapter is put on a base model", where="base_model", fix="name it: base_model: PATH")
    base = files[recipe.models.index(recipe.base)]
    if base.adapter is not None or base.base.is_file():
        raise ConfigError("the base of an adapter is a model directory", where="base_model", fix="name one")
    return base


def _adapter(
    config: MergeConfig,
    recipe: Recipe,
    base: ModelFiles,
    output: Path,
    console: Console,
    judge: Judge | None,
    table: Table,
) -> int:
    """Merge in float32 beside the destination, and write what that adds to the base as an adapter."""
    from oarsmith.merge.extract_lora import extract_lora

    assert config.adapter_rank is not None, "there is a base to put it on"
    exact = replace(recipe, out_dtype="float32", chat_template=None)
    with temporary_directory(output) as staged, progress_bar(console) as show:
        options = Options(options_of(config).num_processes, seed=config.seed, probe=False)
        report = merge_models(exact, staged / "model", options, progress=show)
        found = extract_lora(base, staged / "model", output, config.adapter_rank, config.adapter_tolerance, show)
    atomic_write_text(output / RECIPE, recipe_text({**recipe_values(recipe), "adapter_rank": config.adapter_rank}))
    ranks = sorted(found.ranks.values())
    console.print(
        f"wrote {output}: LoRA on {len(ranks)} projections, ranks {ranks[0]} to {ranks[-1]}, "
        f"{found.explained:.2%} of the squared change of {report.num_tensors:,} tensors' projections"
    )
    if found.left_out:
        console.print(f"note:  {len(found.left_out)} tensors changed that no LoRA holds, first {found.left_out[0]}")
    if judge is not None:
        table.append(["merged (adapter)", *(score.words for score in judge.score(base.base, output))])
        _print_table(table, console)
    console.print(f"next:  oarsmith chat {base.base} --adapter {output}")
    return 0


def _judge(config: MergeConfig) -> Judge | None:
    if not config.evaluate:
        return None
    from oarsmith.merge.judge import Judge

    return Judge(config.evaluate, config.evaluate_rows, config.evaluate_length)


def _inputs_judged(judge: Judge, files: list[ModelFiles], console: Console) -> Table:
    """A table of the models before they are merged; GGUF files are not judged."""
    table: Table = [["model", *(Path(file).name for file in judge.files)]]
    for one in files:
        if one.base.is_dir():
            console.print(f"judging {one.reference}")
            table.append([one.reference, *(score.words for score in judge.score(one.base, one.adapter))])
    return table


def _say(report: Merged, output: Path, method: str, console: Console) -> None:
    if report.kept:
        console.print(f"{report.kept:,} of {report.num_tensors:,} tensors were there from an interrupted merge")
    if report.idle:
        console.print(f"note:  {method} has no {', '.join(report.idle)}: without an effect")
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


def _print_table(table: Table, console: Console) -> None:
    if len(table) > 1:
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        for row in table:
            console.print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
