"""Vocabularies that differ, aligned token by token: the result has the union of tokens, or those of one model.

A token that a model lacks gets there the embedding that the base has for it, or else the only model that has it, or
else the mean of those that have it; a recipe can say otherwise for single tokens (mergekit's rules).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.checkpoint.files import read_json_object
from oarsmith.errors import CheckpointError, ConfigError, OarsmithError
from oarsmith.merge.recipe import TokenizerSpec, TokenSpec
from oarsmith.text import Tokenizer, load_tokenizer

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Vocabulary:
    """Which rows of each model make the rows of the result.

    Attributes:
        num_rows: of the result, padding included.
        rows: for each model the row of every token, as many as there are without padding; -1: it lacks it.
        fills: row -> (model, row) pairs whose mean stands in where a model lacks the token; none: zeros.
        forced: rows that get their fill in every model.
        tokenizer: of the result.
        extra: tokens that ``tokenizer`` lacks, with their ids, and whether they are special.
    """

    num_rows: int
    rows: tuple[Tensor, ...]
    fills: Mapping[int, tuple[tuple[int, int], ...]]
    forced: frozenset[int]
    tokenizer: Tokenizer
    extra: Mapping[str, tuple[int, bool]]

    def align(self, model: int, read: Callable[[int], Tensor], name: str) -> Tensor:
        """A model's tensor with a row for each row of the result, in its own dtype.

        Args:
            read: from a model's number to its tensor of this name.
        """
        own = read(model)
        rows = self.rows[model]
        self._require(own, rows, name)
        made = own.new_zeros(self.num_rows, *own.shape[1:])
        count = len(rows)
        has = rows >= 0
        made[:count][has] = own[rows[has]]
        for row, sources in self.fills.items():
            if row in self.forced or not bool(has[row]):
                values = [read(index)[at].float() for index, at in sources]
                made[row] = torch.stack(values).mean(0).to(own.dtype) if values else 0.0
        if self.num_rows > count:
            made[count:] = made[:count].float().mean(0).to(own.dtype)
        return made

    def require_writable(self) -> None:
        """Refuse tokens of other models that the tokenizer has no place for.

        Raises:
            CheckpointError: there are such tokens, and it is not a ``tokenizer.json``.
        """
        if self.extra and not (Path(self.tokenizer.name_or_path) / _TOKENIZER).is_file():
            raise CheckpointError(
                f"{len(self.extra)} tokens of other models cannot be added to this kind of tokenizer",
                where=self.tokenizer.name_or_path,
                fix="use tokenizer_source: base, or models with a tokenizer.json",
            )

    @staticmethod
    def _require(own: Tensor, rows: Tensor, name: str) -> None:
        last = int(rows.max()) if rows.numel() else -1
        if last >= len(own):
            raise CheckpointError(
                f"the tokenizer has id {last}, but {name} has {len(own)} rows",
                where=name,
                fix="use the tokenizer that belongs to the model",
            )


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Every token's text -> its id."""
    found: dict[str, int] = {}
    for index in range(tokenizer.vocab_size):
        token = tokenizer.id_to_token(index)
        if token is not None:
            found.setdefault(token, index)
    return found


def align_vocabularies(
    spec: TokenizerSpec, references: Sequence[str], folders: Sequence[Path], base: str | None
) -> Vocabulary:
    """How the models' vocabularies become that of the result.

    Args:
        references, folders: of the models, as the recipe names them and where their tokenizers lie.
        base: the recipe's base model.

    Raises:
        OarsmithError: a tokenizer that cannot be read, a source that is not one of the models.
    """
    loaded = [load_tokenizer(folder) for folder in folders]
    theirs = [tokens_of(one) for one in loaded]
    first = references.index(base) if base is not None else 0
    brought: Iterable[tuple[str, bool]] = ()
    match spec.source:
        case "union":
            tokens = dict(theirs[first])
            brought = _of_others(loaded, theirs)
        case "base":
            if base is None:
                raise ConfigError("there is no base model", where="tokenizer", fix="name base_model, or use union")
            tokens = dict(theirs[first])
        case path:
            first, tokens = _named(path, references, loaded, theirs)
    extra: dict[str, tuple[int, bool]] = {}
    size = max(tokens.values(), default=-1) + 1
    for token, special in (*brought, *((token, False) for token in spec.tokens)):
        if token not in tokens:
            tokens[token], extra[token] = size, (size, special)
            size += 1
    rows = tuple(_rows(tokens, other, size) for other in theirs)
    fills = _fills(spec, tokens, rows, theirs, references, base)
    tokenizer = loaded[first] if first < len(loaded) else load_tokenizer(spec.source)
    multiple = spec.pad_to_multiple_of or 1
    forced = frozenset(tokens[token] for token, one in spec.tokens.items() if one.force)
    return Vocabulary(-(-size // multiple) * multiple, rows, fills, forced, tokenizer, extra)


def _of_others(loaded: Sequence[Tokenizer], theirs: Sequence[Mapping[str, int]]) -> Iterator[tuple[str, bool]]:
    """Every model's tokens in the order of their ids, and whether they are special."""
    for tokenizer, tokens in zip(loaded, theirs, strict=True):
        special = tokenizer.special_ids
        for token, at in sorted(tokens.items(), key=lambda pair: pair[1]):
            yield token, at in special


def _named(
    path: str, references: Sequence[str], loaded: Sequence[Tokenizer], theirs: Sequence[dict[str, int]]
) -> tuple[int, dict[str, int]]:
    if path in references:
        index = references.index(path)
        return index, dict(theirs[index])
    try:
        return len(loaded), tokens_of(load_tokenizer(path))
    except OarsmithError as error:
        raise ConfigError(
            f"{path!r} is neither union nor base nor a model with a tokenizer: {error.what}",
            where="tokenizer",
            fix="use union, base, or the path of a model",
        ) from error


def _rows(tokens: Mapping[str, int], theirs: Mapping[str, int], size: int) -> Tensor:
    rows = torch.full((size,), -1, dtype=torch.int64)
    for token, at in tokens.items():
        rows[at] = theirs.get(token, -1)
    return rows


def _fills(
    spec: TokenizerSpec,
    tokens: Mapping[str, int],
    rows: Sequence[Tensor],
    theirs: Sequence[Mapping[str, int]],
    references: Sequence[str],
    base: str | None,
) -> dict[int, tuple[tuple[int, int], ...]]:
    stacked = torch.stack(list(rows))
    lacking = (stacked < 0).any(0)
    fills: dict[int, tuple[tuple[int, int], ...]] = {}
    for token, row in tokens.items():
        if (one := spec.tokens.get(token)) is not None:
            fills[row] = _chosen(one, token, theirs, references)
        elif bool(lacking[row]):
            have = [(index, int(at)) for index, at in enumerate(stacked[:, row]) if at >= 0]
            own = [pair for pair in have if base is not None and references[pair[0]] == base]
            fills[row] = tuple(own or have)
    return fills


def _chosen(
    one: TokenSpec, token: str, theirs: Sequence[Mapping[str, int]], references: Sequence[str]
) -> tuple[tuple[int, int], ...]:
    if one.source is None:
        return ()
    index = references.index(one.source)
    wanted = token if one.token is None else one.token
    at = wanted if isinstance(wanted, int) else theirs[index].get(wanted)
    if at is None:
        raise ConfigError(
            f"{one.source} has no token {wanted!r}", where=f"tokenizer.tokens.{token}", fix="name one that it has"
        )
    return ((index, at),)


def write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """Write the tokenizer of the result, with tokens that other models brought (see ``require_writable``)."""
    vocabulary.tokenizer.save(folder)
    if not vocabulary.extra:
        return
    path = folder / _TOKENIZER
    content: dict[str, Any] = read_json_object(path)
    added = content.setdefault("added_tokens", [])
    for token, (index, special) in vocabulary.extra.items():
        entry = {"id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        added.append({**entry, "normalized": False, "special": special})
    added.sort(key=lambda entry: entry["id"])
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
