"""A merge from recipe to verified directory."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from oarsmith._version import __version__
from oarsmith.atomic import TEMPORARY_PREFIX, atomic_directory, atomic_write_text
from oarsmith.checkpoint.convert import DTYPE_NAMES, copy_side_files
from oarsmith.checkpoint.safetensors_stream import MAX_SHARD_BYTES, SAFETENSORS_DTYPES
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.verify import Digests, digest
from oarsmith.errors import CheckpointError
from oarsmith.merge.models import MergeModel, ModelFiles, find_model, open_for_merge
from oarsmith.merge.plan import Plan, Planner
from oarsmith.merge.recipe import Recipe
from oarsmith.merge.registry import find_method, with_sparsifier
from oarsmith.merge.stream import JOURNAL, Progress, Streamed, Work, stream
from oarsmith.merge.templates import with_recipe_template
from oarsmith.merge.verify import Verified, verify
from oarsmith.merge.vocabulary import Vocabulary, align_vocabularies, write_tokenizer
from oarsmith.text import load_tokenizer

_WRITTEN = ("config.json", "README.md")


@dataclass(frozen=True)
class Options:
    """How a merge is carried out; none of it changes a number but ``seed``.

    Attributes:
        num_processes: tensors that are worked on at a time.
        probe: compare answers on probe tokens with those of the models, which takes a forward pass of each.
        copy_files: further files of the reference model to copy.
    """

    num_processes: int = 1
    max_shard_bytes: int = MAX_SHARD_BYTES
    seed: int = 0
    probe: bool = True
    copy_files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """A model that was merged: what the recipe calls it, and the hash of its tensors that were read.

    The hash is SHA-256 over a line ``name SHA-256`` of each tensor as the file holds it, in the order of names; that of
    an adapter on it is of the adapter's file.
    """

    reference: str
    hash: str
    num_tensors: int
    adapter_hash: str | None = None


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        kept: tensors that an interrupted merge had written already.
        idle: parameters of the recipe that the method does not have.
    """

    inputs: tuple[Input, ...]
    hash: str
    num_tensors: int
    num_parameters: int
    num_bytes: int
    kept: int
    idle: tuple[str, ...]
    verified: Verified
    notes: tuple[str, ...] = field(default=())


Card = Callable[[Path, Merged], None]


def merge_models(
    recipe: Recipe,
    output: Path,
    options: Options,
    *,
    progress: Progress,
    card: Card | None = None,
    make_plan: Callable[[Sequence[MergeModel]], Plan] | None = None,
) -> Merged:
    """Merge models into a directory, which appears complete and verified, or not at all.

    What an interrupted merge has written lies beside it, under a name that begins with ``.tmp-merge-``.

    Args:
        card: writes what is to stand beside the weights.
        make_plan: from the recipe's models to another plan than that of its method.

    Raises:
        OarsmithError: a recipe, model or result that cannot be; names the tensor or key.
    """
    method = with_sparsifier(find_method(recipe.method), recipe.sparsify)
    staging = staging_of(output)
    with ExitStack() as stack:
        found = [find_model(reference) for reference in recipe.models]
        files = tuple(_as_directory(one, staging.with_name(f"{staging.name}-gguf"), progress) for one in found)
        models = []
        for one in files:
            models.append(open_for_merge(one))
            stack.callback(models[-1].close)
        vocabulary = _vocabulary(recipe, files)
        plan = Planner(recipe, models, method, vocabulary).plan() if make_plan is None else make_plan(models)
        _check_side_files(recipe, models[plan.reference], models, vocabulary, options)
        for model in models:
            model.close()
        key = _key(recipe, found, options, plan)
        work = Work(files, recipe.method, recipe.sparsify, options.seed, vocabulary, staging, {})
        streamed = stream(
            work,
            plan.tasks,
            key,
            num_processes=options.num_processes,
            max_shard_bytes=options.max_shard_bytes,
            progress=progress,
        )
        report = _finish(recipe, output, staging, plan, models, vocabulary, streamed, options, progress, card)
    shutil.rmtree(staging.with_name(f"{staging.name}-gguf"), ignore_errors=True)
    return report


def staging_of(output: Path) -> Path:
    """Where the files of a merge grow; the name is the same each time, so that it can go on."""
    return output.resolve().with_name(f"{TEMPORARY_PREFIX}merge-{output.resolve().name}")


def _finish(
    recipe: Recipe,
    output: Path,
    staging: Path,
    plan: Plan,
    models: Sequence[MergeModel],
    vocabulary: Vocabulary | None,
    streamed: Streamed,
    options: Options,
    progress: Progress,
    card: Card | None,
) -> Merged:
    reference = models[plan.reference]
    with atomic_directory(output) as folder:
        notes = _side_files(recipe, folder, reference, models, vocabulary, options)
        for file in sorted(staging.iterdir()):
            if file.name != JOURNAL:
                file.rename(folder / file.name)
        _write_config(folder, plan)
        try:
            folders = [model.files for model in models]
            verified = verify(folder, _meant(plan, streamed), folders, progress, probe=options.probe)
        except CheckpointError:
            shutil.rmtree(staging)
            raise
        report = Merged(
            inputs=tuple(_input(model.files, streamed.inputs.get(i, {})) for i, model in enumerate(models)),
            hash=hash_of(streamed.digests),
            num_tensors=len(plan.tasks),
            num_parameters=sum(math.prod(task.shape) for task in plan.tasks),
            num_bytes=sum(math.prod(task.shape) * task.dtype.itemsize for task in plan.tasks),
            kept=streamed.num_kept,
            idle=plan.idle,
            verified=verified,
            notes=tuple(notes),
        )
        if card is not None:
            card(folder, report)
    shutil.rmtree(staging, ignore_errors=True)
    return report


def _meant(plan: Plan, streamed: Streamed) -> Digests:
    meant = Digests()
    for task in plan.tasks:
        meant.known[task.name] = SAFETENSORS_DTYPES[task.dtype], task.shape, streamed.digests[task.name]
    return meant


def hash_of(digests: Mapping[str, str]) -> str:
    """SHA-256 of a model's tensors by their own hashes: the same whatever the shards."""
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()


def _input(files: ModelFiles, digests: Mapping[str, str]) -> Input:
    adapter = None
    if files.adapter is not None:
        # Many files, of which a merge without adapters needs none.
        from oarsmith.adapters.peft_layout import WEIGHTS
        from oarsmith.training.checkpoint import file_hash

        adapter = file_hash(files.adapter / WEIGHTS)
    return Input(files.reference, hash_of(digests), len(digests), adapter)


def _key(recipe: Recipe, files: Sequence[ModelFiles], options: Options, plan: Plan) -> str:
    """Which merge this is: recipe, seed, shards, and what tells whether a model's files have changed."""
    routers = [digest(task.value) for task in plan.tasks if task.value is not None]
    stats = []
    for one in files:
        for path in (one.base, one.adapter):
            if path is None:
                continue
            entries = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
            stats += [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in entries]
    whole = [__version__, asdict(recipe), options.seed, options.max_shard_bytes, stats, plan.config, routers]
    text = json.dumps(whole, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_directory(files: ModelFiles, folder: Path, progress: Progress) -> ModelFiles:
    """A GGUF file becomes a directory first, tensor by tensor; anything else is read where it lies."""
    if not files.base.is_file():
        return files
    if files.base.suffix != ".gguf":
        raise CheckpointError("this is no model", where=str(files.base), fix="name a model directory or a .gguf file")
    name = hashlib.sha256(f"{files.base.resolve()} {files.base.stat().st_mtime_ns}".encode()).hexdigest()[:16]
    target = folder / name
    if not target.is_dir():
        from oarsmith.checkpoint.gguf.convert import convert_gguf

        convert_gguf(files.base, target, "auto", lambda done, total: progress("reading GGUF", done, total))
    return replace(files, base=target)


def _vocabulary(recipe: Recipe, files: Sequence[ModelFiles]) -> Vocabulary | None:
    if recipe.tokenizer is None:
        return None
    folders = [
        one.adapter if one.adapter is not None and (one.adapter / "tokenizer_config.json").is_file() else one.base
        for one in files
    ]
    return align_vocabularies(recipe.tokenizer, [one.reference for one in files], folders, recipe.base)


def _write_config(folder: Path, plan: Plan) -> None:
    """Beside the weights, whose dtype it names."""
    config: dict[str, Any] = dict(plan.config)
    with open_source(folder) as source:
        config["dtype" if "dtype" in config else "torch_dtype"] = DTYPE_NAMES[source.stored_dtype()]
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def _check_side_files(
    recipe: Recipe,
    reference: MergeModel,
    models: Sequence[MergeModel],
    vocabulary: Vocabulary | None,
    options: Options,
) -> None:
    """Refuse what `_side_files` would, before the work is done."""
    if vocabulary is not None:
        vocabulary.require_writable()
    if recipe.chat_template is not None:
        tokenizer = load_tokenizer(reference.files.base) if vocabulary is None else vocabulary.tokenizer
        with_recipe_template(tokenizer, recipe.chat_template, [model.files.base for model in models])
    for name in options.copy_files:
        source = reference.files.base / name
        if Path(name).name != name or not source.is_file():
            raise CheckpointError(
                "there is no such file to copy", where=str(source), fix="name files of the first or base model"
            )


def _side_files(
    recipe: Recipe,
    folder: Path,
    reference: MergeModel,
    models: Sequence[MergeModel],
    vocabulary: Vocabulary | None,
    options: Options,
) -> list[str]:
    """Tokenizer, generation config, template and licence, and what else was asked for."""
    home, notes = reference.files.base, []
    copy_side_files(home, folder)
    if vocabulary is not None:
        write_tokenizer(vocabulary, folder)
        if vocabulary.extra:
            notes.append(f"{len(vocabulary.extra):,} tokens of other models were added to the tokenizer")
    if recipe.chat_template is not None:
        tokenizer = load_tokenizer(folder)
        made, note = with_recipe_template(tokenizer, recipe.chat_template, [model.files.base for model in models])
        made.save(folder)
        notes += [note] if note else []
    for name in options.copy_files:
        if name in _WRITTEN or name.endswith(".safetensors"):
            notes.append(f"{name} is the merge's own, and that of {reference.reference} is not copied")
        else:
            shutil.copyfile(home / name, folder / name)
    return notes
