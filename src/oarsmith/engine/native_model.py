"""A model that the compiled step serves. PyTorch comes in only where weights are packed for the first time."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oarsmith.compiling import BuildError
from oarsmith.engine.native_backend import NativeBackend
from oarsmith.errors import ConfigError
from oarsmith.model_path import resolve
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.facts import ModelFacts
from oarsmith.native.arena import Arena
from oarsmith.native.library import level, load
from oarsmith.native.program import Program
from oarsmith.native.step import Step
from oarsmith.native.store import PackedStore

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder
    from oarsmith.native.stored import WeightFiles

Compute = Literal["auto", "native", "torch"]
WEIGHTS = ("int8", "int4")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NativeModel:
    """A program with its weights."""

    program: Program
    arena: Arena
    threads: int

    @property
    def facts(self) -> ModelFacts:
        return self.program.facts

    def take(self, decoder: Decoder) -> None:
        """Pack the weights that the decoder has now into the memory that the steps read."""
        found = _pack(decoder, "auto", self.threads, Path())
        assert not isinstance(found, str) and found[1].size == self.arena.size, found
        ctypes.memmove(self.arena.address, found[1].address, self.arena.size)

    def backend(self, num_sequences: int, num_pages: int, page_size: int, *, form: CacheForm | None) -> NativeBackend:
        """What computes steps, with a cache of this size; ``form``: it is kept in 8 bits."""
        step = Step(
            self.program,
            self.arena,
            threads=self.threads,
            num_pages=num_pages,
            page_size=page_size,
            num_sequences=num_sequences,
            form=form,
        )
        return NativeBackend(step)


def pack_decoder(decoder: Decoder, threads: int) -> NativeModel | str:
    """A decoder that is loaded already, its weights packed as they are now; or what keeps it from being served so."""
    found = _pack(decoder, "auto", threads, Path())
    return found if isinstance(found, str) else NativeModel(*found, threads)


def num_threads() -> int:
    """Threads of a step: ``$OMP_NUM_THREADS``, else as many as the process may run on."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def obstacle(device: str, page_size: int = 64) -> str | None:
    """Why the compiled step cannot serve here; None: it can."""
    if device not in ("auto", "cpu"):
        return f"the device is {device}"
    if device == "auto" and _has_gpu():
        return "there is a GPU"
    if page_size % 16:
        return f"block_size {page_size} is no multiple of 16"
    try:
        load()
    except BuildError as error:
        return str(error)
    return None


def _has_gpu() -> bool:
    """Without importing PyTorch where there cannot be one."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    import torch

    return torch.cuda.is_available()


def open_native(
    path: str | Path,
    precision: str,
    make_decoder: Callable[[], Decoder],
    *,
    adapter: str | Path | None = None,
    threads: int,
    store: PackedStore | None = None,
) -> NativeModel | str:
    """The model of a path, from packed weights where they have been kept; else they are packed, and kept.

    Args:
        precision: of its weights: ``auto`` (what the files hold, also where these are codes), ``fp32``, ``bf16``,
            ``fp16``, ``int8``, ``int4``.
        make_decoder: loads the decoder that they are packed from, unless the files hold codes.

    Returns:
        The model, or what keeps it from being served so.
    """
    store = PackedStore() if store is None else store
    where = resolve(path, adapter)
    # An adapter on a base: packed anew each time, so that nothing is kept for every adapter of a sweep.
    kept = store.path(where.base, precision) if where.adapter is None else None
    if kept is not None and (found := store.read(kept)) is not None:
        _log.info("weights from %s", kept)
        return NativeModel(*found, threads)
    from oarsmith.checkpoint.deferred import deferred_decoder, has_codes

    if precision == "auto" and where.adapter is None and has_codes(where.base):
        with deferred_decoder(where.base) as (decoder, files):
            packed = _pack(decoder, precision, threads, where.base, files)
    else:
        packed = _pack(make_decoder(), precision, threads, where.base)
    if isinstance(packed, str):
        return packed
    program, arena = packed
    if kept is not None and store.write(kept, program, arena):
        _log.info("weights packed, and kept in %s", kept)
    return NativeModel(program, arena, threads)


def _pack(
    decoder: Decoder, precision: str, threads: int, base: Path, files: WeightFiles | None = None
) -> tuple[Program, Arena] | str:
    from oarsmith.checkpoint.quantized.cache_scales import read_cache_form
    from oarsmith.native.lower import lower, refusal

    reason = refusal(decoder.spec)
    if reason is not None:
        return reason
    own_form = read_cache_form(base, len(decoder.spec.layers)) if base != Path() else None
    return lower(decoder, _precision_of(decoder, precision), threads=threads, files=files, own_form=own_form)


def _precision_of(decoder: Decoder, precision: str) -> str:
    if precision != "auto":
        return precision
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(str(decoder.embedding.weight.dtype), "fp32")


def check_weights(weights: str | None) -> None:
    """Whether weights can be rounded so.

    Raises:
        ConfigError: they cannot.
    """
    if weights is not None and weights not in WEIGHTS:
        raise ConfigError(f"weights cannot be {weights!r}", where="weights", fix=f"use {' or '.join(WEIGHTS)}")


def describe(model: NativeModel) -> str:
    """For the log: which instructions are in use."""
    threads = "1 thread" if model.threads == 1 else f"{model.threads} threads"
    return f"compiled step ({level()}, {threads})"
