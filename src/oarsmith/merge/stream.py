"""A plan carried out: tensors one by one, in several processes, each written at its place in files that grow beside the
destination; what an interrupted merge has done is kept.

The place of every tensor is known before the first is read, so any process writes any tensor. A journal says which are
there, with their hashes; a merge that begins again takes those that still have them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from oarsmith.atomic import atomic_write_text, require_space
from oarsmith.checkpoint.safetensors_stream import (
    SafetensorsFile,
    TensorInfo,
    sharded_files,
    write_index,
)
from oarsmith.checkpoint.source import open_source
from oarsmith.checkpoint.verify import digest
from oarsmith.errors import ModelError
from oarsmith.merge.job import TensorJob
from oarsmith.merge.models import MergeModel, ModelFiles, open_for_merge
from oarsmith.merge.plan import Source, TensorTask
from oarsmith.merge.registry import find_method, with_sparsifier
from oarsmith.merge.vocabulary import Vocabulary

JOURNAL = "merging.jsonl"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Work:
    """All that a process needs.

    Attributes:
        files: of the models, by number.
        method, sparsify: by their names.
        folder: where files grow.
        placed: tensor -> file and first byte.
    """

    files: tuple[ModelFiles, ...]
    method: str
    sparsify: str
    seed: int
    vocabulary: Vocabulary | None
    folder: Path
    placed: Mapping[str, tuple[str, int]]


@dataclass(frozen=True)
class Done:
    """A tensor that is written: its hash, and those of the tensors it was made of."""

    name: str
    digest: str
    inputs: tuple[tuple[int, str, str], ...]


@dataclass
class Streamed:
    """What a merge wrote: hash of each tensor, and of each model's tensors."""

    digests: dict[str, str] = field(default_factory=dict)
    inputs: dict[int, dict[str, str]] = field(default_factory=dict)
    num_kept: int = 0

    def add(self, done: Done) -> None:
        self.digests[done.name] = done.digest
        for model, name, known in done.inputs:
            self.inputs.setdefault(model, {})[name] = known


class Worker:
    """Makes tensors, in whichever process it was built."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._models: dict[int, MergeModel] = {}
        self._aligning: dict[Source, Tensor] = {}
        self._merge = with_sparsifier(find_method(work.method), work.sparsify).merge

    def _model(self, index: int) -> MergeModel:
        if index not in self._models:
            self._models[index] = open_for_merge(self._work.files[index])
        return self._models[index]

    @torch.no_grad()
    def run(self, task: TensorTask) -> Done:
        """Read, merge, check, write.

        Raises:
            OarsmithError: a result that is not finite (the tensor named), a file that has changed.
        """
        if task.value is not None:
            return Done(task.name, self._write(task.name, task.value), ())
        self._aligning.clear()
        base = None if task.base is None else self._read(task.base, task)
        job = TensorJob(
            name=task.name,
            base=base,
            tensors=tuple(self._read(one, task) for one in task.sources),
            own=task.own,
            shared=task.shared,
            dtype=task.dtype,
            seed=self._work.seed,
        )
        result = self._merge(job).to(task.dtype).contiguous()
        assert tuple(result.shape) == task.shape, (task.name, result.shape, task.shape)
        require_finite(result, task.name)
        return Done(task.name, self._write(task.name, result), tuple(self._inputs(task)))

    def _read(self, source: Source, task: TensorTask) -> Tensor:
        if not task.vocabulary or self._work.vocabulary is None:
            return self._model(source.model).read(source.name)

        def read(model: int) -> Tensor:
            # Rows of any model may stand in for those that another lacks.
            one = replace(source, model=model)
            if one not in self._aligning:
                self._aligning[one] = self._model(model).read(one.name)
            return self._aligning[one]

        return self._work.vocabulary.align(source.model, read, source.name)

    def _inputs(self, task: TensorTask) -> Iterator[tuple[int, str, str]]:
        used = {*task.sources, *([] if task.base is None else [task.base]), *self._aligning}
        for one in sorted(used, key=lambda source: source.model):
            yield one.model, one.name, self._models[one.model].digests[one.name]

    def _write(self, name: str, tensor: Tensor) -> str:
        file, start = self._work.placed[name]
        if tensor.numel():
            with (self._work.folder / file).open("r+b") as target:
                target.seek(start)
                target.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest(tensor)

    def close(self) -> None:
        for model in self._models.values():
            model.close()


def require_finite(tensor: Tensor, name: str) -> None:
    """Refuse numbers that are none.

    Raises:
        ModelError: there is one.
    """
    if tensor.numel() and not all(bool(one.isfinite()) for one in tensor.aminmax()):
        raise ModelError(
            f"tensor {name} of the merged model holds numbers that are not finite",
            where=name,
            fix="look for them in the models (oarsmith eval), lower the weights, or write float32",
        )


_worker: list[Worker] = []


def _begin(work: Work, parent: int) -> None:
    """In a new process. One thread each: the processes share the cores. It ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    _worker[:] = [Worker(work)]


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(task: TensorTask) -> Done:
    return _worker[0].run(task)


def stream(
    work: Work,
    tasks: Sequence[TensorTask],
    key: str,
    *,
    num_processes: int,
    max_shard_bytes: int,
    progress: Progress,
) -> Streamed:
    """Write every tensor into ``work.folder``, or those that an interrupted merge has not.

    Args:
        key: says which merge this is: what another has left in the folder is thrown away.

    Raises:
        OarsmithError: as `Worker.run`; the disk is full.
    """
    infos = {task.name: TensorInfo(task.dtype, task.shape) for task in tasks}
    files = sharded_files(infos, max_shard_bytes)
    placed = {name: (file, start) for file, one in files.items() for name, start in one.starts.items()}
    work = replace(work, placed=placed)
    total = sum(info.num_bytes for info in infos.values())
    found = _resume(work.folder, files, key, total)
    left = sorted((task for task in tasks if task.name not in found.digests), key=lambda t: -infos[t.name].num_bytes)
    done = total - sum(infos[task.name].num_bytes for task in left)
    progress("merging", done, total)
    with ExitStack() as stack:
        made = _results(work, left, num_processes, stack)
        with (work.folder / JOURNAL).open("a", encoding="utf-8") as journal:
            for one in made:
                found.add(one)
                journal.write(json.dumps([one.name, one.digest, one.inputs]) + "\n")
                journal.flush()
                done += infos[one.name].num_bytes
                progress("merging", done, total)
    return found


def _results(work: Work, tasks: Sequence[TensorTask], num_processes: int, stack: ExitStack) -> Iterable[Done]:
    if num_processes <= 1 or len(tasks) <= 1:
        worker = Worker(work)
        stack.callback(worker.close)
        return map(worker.run, tasks)
    # Forked, so that no process imports PyTorch again; their one thread each needs no pool of the parent's.
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin, initargs=(work, os.getpid()))
    stack.callback(pool.shutdown, cancel_futures=True)
    futures: list[Future[Done]] = [pool.submit(_run, task) for task in tasks]
    return _finished(futures)


def _finished(futures: Sequence[Future[Done]]) -> Iterator[Done]:
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise ModelError(
            "a process of the merge was ended from outside, most likely for lack of memory",
            where="n_process",
            fix="lower n_process and give the command again: it goes on from what is written",
        ) from error


def _resume(folder: Path, files: Mapping[str, SafetensorsFile], key: str, total: int) -> Streamed:
    """The files with room for every tensor, and what of an earlier, interrupted run of this merge is whole."""
    journal, found = folder / JOURNAL, Streamed()
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
    if lines and lines[0] == json.dumps(key) and all((folder / file).is_file() for file in files):
        with open_source(folder) as source:
            for line in lines[1:]:
                entry = _entry(line)
                if entry is not None and entry.name in source.shapes and _same(source.read(entry.name), entry.digest):
                    found.add(entry)
        found.num_kept = len(found.digests)
        return found
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    require_space(folder, total)
    for name, file in files.items():
        with (folder / name).open("xb") as target:
            target.write(file.header)
            target.truncate(file.num_bytes)
    if len(files) > 1:
        names = {name: file for file, one in files.items() for name in one.starts}
        write_index(folder / "model.safetensors.index.json", names, total)
    atomic_write_text(journal, json.dumps(key) + "\n")
    return found


def _entry(line: str) -> Done | None:
    """A line of the journal; the last one may be cut off."""
    try:
        name, digest, inputs = json.loads(line)
    except (ValueError, TypeError):
        return None
    return Done(name, digest, tuple((model, tensor, known) for model, tensor, known in inputs))


def _same(tensor: Tensor, known: str) -> bool:
    return digest(tensor) == known
