"""What an engine is told about its size and its guesses. No PyTorch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from oarsmith.errors import ConfigError
from oarsmith.models.cache_form import CacheForm

if TYPE_CHECKING:
    from oarsmith.models.decoder import Decoder


NGRAM = "ngram"
CacheDtype = Literal["auto", "int8", "fp8"]
_CODES: dict[str, Literal["int", "e4m3"]] = {"int8": "int", "fp8": "e4m3"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an engine has room for; see ``Engine``. ``tokens_each``: most tokens that an answer brings to a step.

    Raises:
        ConfigError: a size below the least.
    """

    batch_size: int
    num_pages: int | None
    cache_bytes: int | None
    block_size: int
    max_step_tokens: int | None
    prefix_caching: bool
    tokens_each: int
    cache_dtype: CacheDtype = "auto"

    def step_tokens(self, gpu: bool) -> int:
        """Most tokens of a step: as is said, else so many that products are at their best and first answers soon."""
        if self.max_step_tokens is not None:
            return self.max_step_tokens
        return max(2048 if gpu else 512, 2 * self.batch_size * self.tokens_each)

    def cache_form(self, own: CacheForm | None) -> CacheForm | None:
        """How keys and values are kept in 8 bits, if they are. ``own``: how the checkpoint wants them to be."""
        if self.cache_dtype == "auto" or (own is not None and own.code == _CODES[self.cache_dtype]):
            return own
        return CacheForm(code=_CODES[self.cache_dtype])

    def pages(self, max_positions: int, page_bytes: int, free: int) -> int:
        """How many pages the cache has: as is said, else for as many sequences that fill the context, but no more than
        half of the memory that is free has room for.

        Args:
            max_positions: the context.
            page_bytes: of a page.
            free: bytes.

        Raises:
            ConfigError: not a single page fits into ``cache_bytes``.
        """
        if self.num_pages is not None:
            return self.num_pages
        if self.cache_bytes is not None:
            if self.cache_bytes < page_bytes:
                what = f"cache_bytes is {self.cache_bytes:,}; a page of {self.block_size} tokens has {page_bytes:,}"
                raise ConfigError(what, where="cache_bytes", fix="raise it, or lower block_size")
            return self.cache_bytes // page_bytes
        return max(min(self.batch_size * -(-max_positions // self.block_size), free // 2 // page_bytes), 1)

    def __post_init__(self) -> None:
        if self.cache_dtype not in ("auto", *_CODES):
            what = f"cache_dtype cannot be {self.cache_dtype!r}"
            raise ConfigError(what, where="cache_dtype", fix="use auto, int8 or fp8")
        if self.num_pages is not None and self.cache_bytes is not None:
            what = "num_pages and cache_bytes both say how large the cache is"
            raise ConfigError(what, where="cache_bytes", fix="give one of them")
        step = max(self.batch_size, 1) * self.tokens_each
        least = {"batch_size": 1, "num_pages": 1, "cache_bytes": 1, "block_size": 1, "max_step_tokens": step}
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                what = f"{name} is {value}"
                if name == "max_step_tokens":
                    what += f", and {self.batch_size} answers bring up to {self.tokens_each} tokens each to a step"
                raise ConfigError(what, where=name, fix=f"{name} must be at least {limit}")


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """Who guesses tokens, and how many at a time; see ``Engine``.

    Raises:
        ConfigError: no tokens, or likenesses of no length.
    """

    by: str | Path | Decoder | None
    num_draft_tokens: int
    ngram_min: int
    ngram_max: int

    def __post_init__(self) -> None:
        least = {"num_draft_tokens": 1, "ngram_min": 1, "ngram_max": max(self.ngram_min, 1)}
        for name, limit in least.items():
            value = getattr(self, name)
            if value < limit:
                raise ConfigError(f"{name} is {value}", where=name, fix=f"{name} must be at least {limit}")
