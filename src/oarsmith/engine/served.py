"""The model that an engine serves, and what computes its steps. PyTorch comes in only where it must."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from oarsmith.engine.native_model import (
    Compute,
    NativeModel,
    check_weights,
    describe,
    num_threads,
    obstacle,
    open_native,
    pack_decoder,
)
from oarsmith.engine.options import NGRAM, Speculation
from oarsmith.errors import ConfigError, ModelError
from oarsmith.model_path import resolve
from oarsmith.models.cache_form import CacheForm
from oarsmith.models.facts import ModelFacts
from oarsmith.text import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a path is opened; see ``Engine``."""

    dtype: str = "auto"
    device: str = "auto"
    adapter: str | Path | None = None
    any_base: bool = False
    weights: str | None = None
    compute: Compute = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if self.compute not in ("auto", "native", "torch"):
            what = f"compute cannot be {self.compute!r}"
            raise ConfigError(what, where="compute", fix="use auto, native or torch")


@dataclass
class Served:
    """A model that is open, for the compiled step or as a decoder; the other one can still be made of a path.

    ``how``: what computes its steps and, where that is PyTorch, why. ``cache_form``: how its checkpoint wants keys and
    values to be kept, if it says so.
    """

    facts: ModelFacts
    native: NativeModel | None = None
    how: str = "PyTorch, on the decoder that was given"
    cache_form: CacheForm | None = None
    make: Callable[[], Decoder] = field(repr=False, kw_only=True)
    renew: Callable[[], None] = field(default=lambda: None, repr=False, kw_only=True)

    @cached_property
    def decoder(self) -> Decoder:
        """The decoder; loaded when it is first asked for."""
        return self.make()


def serve(model: str | Path | Decoder, options: ModelOptions, page_size: int) -> Served:
    """Open a model.

    Raises:
        OarsmithError: a path that cannot be loaded, options of a path beside a decoder, a decoder in training mode;
            or ``compute`` is native and that is not possible.
    """
    if not isinstance(model, (str, Path)):
        return _loaded(model, options, page_size)

    def to_pack() -> Decoder:
        from oarsmith.loading import load_model

        if options.adapter is None and resolve(model).adapter is None:
            return load_model(model, options.dtype, options.device)
        from oarsmith.adapters.merge import merge_adapter, mergeable

        adapted = load_model(model, options.dtype, options.device, options.adapter, any_base=options.any_base)
        return merge_adapter(adapted, keep=False) if mergeable(adapted) else adapted

    def rounded() -> Decoder:
        from oarsmith.engine.build import load_decoder, load_stored

        if options.weights is None and (stored := load_stored(model, options.dtype, options.device, options.adapter)):
            return stored
        decoder = load_decoder(model, options.dtype, options.device, options.adapter, any_base=options.any_base)
        if options.weights is not None:
            from oarsmith.engine.rounding import round_weights

            round_weights(decoder, options.weights)
        return decoder

    reason: str | None = "as chosen"
    if options.compute != "torch":
        found = _native(model, options, page_size, to_pack)
        if isinstance(found, NativeModel):
            how = describe(found)
            _log.info("steps computed by the %s", how)
            return Served(found.facts, found, how, found.program.own_form, make=rounded)
        if options.compute == "native":
            raise ConfigError(f"the compiled step cannot serve this: {found}", where="compute", fix="use compute auto")
        reason = found
    from oarsmith.checkpoint.quantized.cache_scales import read_cache_form

    how = f"PyTorch ({reason})"
    _log.info("steps computed by %s", how)
    decoder = rounded()
    form = read_cache_form(resolve(model).base, len(decoder.spec.layers))
    return Served(ModelFacts.of(decoder.spec), None, how, form, make=lambda: decoder)


def _loaded(model: Decoder, options: ModelOptions, page_size: int) -> Served:
    """A decoder that is given; the compiled step serves it from a copy of its weights where that is asked for."""
    if replace(options, compute="auto", num_threads=None) != ModelOptions() or options.compute == "torch":
        what = "dtype, device, adapter and weights belong to a path, not to a model that is loaded already"
        raise ConfigError(what, fix="give the engine the path, or load_model what it takes")
    if model.training:
        raise ModelError("the model is in training mode (dropout changes answers)", fix="call model.eval()")
    if options.compute != "native":
        return Served(ModelFacts.of(model.spec), make=lambda: model)
    reason = obstacle(str(model.device), page_size)
    found = pack_decoder(model, options.num_threads or num_threads()) if reason is None else reason
    if isinstance(found, str):
        what = f"the compiled step cannot serve this: {found}"
        raise ConfigError(what, where="compute", fix="leave compute out: PyTorch serves it")
    native = found
    return Served(native.facts, native, describe(native), make=lambda: model, renew=lambda: native.take(model))


def _native(
    path: str | Path, options: ModelOptions, page_size: int, make_decoder: Callable[[], Decoder]
) -> NativeModel | str:
    reason = obstacle(options.device, page_size)
    if reason is not None:
        return reason
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(options.dtype, options.dtype)
    if options.weights is None and dtype not in ("auto", "fp32", "bf16", "fp16"):
        return f"its weights are {dtype}"
    precision = options.weights or dtype
    threads = options.num_threads or num_threads()
    return open_native(path, precision, make_decoder, adapter=options.adapter, threads=threads)


_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


def open_guesser(
    served: Served, speculation: Speculation, tokenizer: Tokenizer | None, options: ModelOptions, page_size: int
) -> Served | None:
    """The model that guesses, if one does; on the compiled step where the served one is.

    Args:
        options: how the served model was opened.

    Raises:
        OarsmithError: it cannot be loaded or is no match, or the served model cannot take tokens back.
    """
    by = speculation.by
    if by is None:
        return None
    if not served.facts.rules.revocable:
        what = "this model remembers more of a token than its keys, so guesses could not be taken back"
        raise ConfigError(what, where="speculative", fix="leave speculative out")
    if by == NGRAM:
        return None
    if served.facts.num_virtual:
        raise _no_guesser("a draft model cannot read the virtual tokens of this adapter", "use ngram")
    own: Tokenizer | None = None
    if not isinstance(by, (str, Path)):
        if by.training:
            raise _no_guesser("the draft model is in training mode", "take another one, in eval mode")
        draft = Served(ModelFacts.of(by.spec), make=lambda: by)
    else:
        how = ModelOptions(device=options.device, num_threads=options.num_threads)
        if served.native is None:
            weight = served.decoder.embedding.weight
            how = ModelOptions(dtype=_DTYPES[str(weight.dtype)], device=str(weight.device), compute="torch")
        draft, where = serve(by, how, page_size), resolve(by)
        own = load_tokenizer(where.base) if (where.base / "tokenizer_config.json").is_file() else None
    if draft.facts.num_scores is not None:
        raise _no_guesser("a reward model writes no tokens that could be checked", "take another one")
    if not draft.facts.rules.revocable or draft.facts.rules.reread_after is not None:
        raise _no_guesser("a draft model of this kind cannot guess", "take another one")
    same = draft.facts.vocab_size == served.facts.vocab_size
    if own is not None and tokenizer is not None:
        shared = min(own.vocab_size, tokenizer.vocab_size)
        same = all(own.id_to_token(index) == tokenizer.id_to_token(index) for index in range(shared))
    if not same:
        raise _no_guesser("the draft model has another vocabulary than the model", "take one with the same tokenizer")
    return draft


def _no_guesser(what: str, fix: str) -> ConfigError:
    return ConfigError(what, where="speculative", fix=fix)
