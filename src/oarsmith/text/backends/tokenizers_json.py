"""tokenizer.json through the `tokenizers` library: the file decides; tokenizer_config.json only adds what it may."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from oarsmith.errors import CheckpointError
from oarsmith.text.backends.spelling import read_spelling
from oarsmith.text.special import ClassRule, SpecialTokens, Token

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TokenizersBackend:
    """A `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, built: bool = False) -> None:
        """
        Args:
            tokenizer: finished, see `load_tokenizer_json`.
            built: it was put together here from other files, so saving writes it as tokenizer.json.
        """
        self._tokenizer = tokenizer
        self._built = built
        self._byte_fallback = tokenizer.decoder is not None and b"ByteFallback" in tokenizer.decoder.__getstate__()

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if len(texts) == 1:
            return [self._tokenizer.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_content(self, text: str) -> list[int]:
        return self.encode_batch([text], False)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        return self._tokenizer.id_to_token(index) if index >= 0 else None

    def token_bytes(self, index: int) -> bytes | None:
        token = self.id_to_token(index)
        if token is None or index in self.special_ids:
            return None
        if index in self.added_ids:
            return token.encode("utf-8")
        return self._spelling(token)

    @cached_property
    def _spelling(self) -> Callable[[str], bytes]:
        return read_spelling(self._tokenizer)

    def unsettled(self, index: int, skip_special_tokens: bool) -> bool:
        # The ByteFallback decoder turns a whole run of byte tokens into U+FFFD when any part of it is no UTF-8.
        if not self._byte_fallback or index < 0:
            return False
        token = self._tokenizer.id_to_token(index)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def content(self) -> bytes:
        return self._tokenizer.to_str().encode()

    def built_files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._tokenizer.to_str(pretty=True).encode()} if self._built else {}


def load_tokenizer_json(
    content: bytes, config: Mapping[str, Any], special: SpecialTokens, rule: ClassRule, *, where: str
) -> TokenizersBackend:
    """A backend from the bytes of a tokenizer.json, as transformers 4.57 would set it up.

    Tokens of tokenizer_config.json are added; classes that do so (`ClassRule.rewrites`) replace the post-processor;
    `add_prefix_space` and `split_special_tokens` of the config apply. Raises CheckpointError for a damaged file or an
    added token whose id in tokenizer_config.json is not the one it gets.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise CheckpointError(
            f"the tokenizers library cannot read the file: {error}",
            where=where,
            fix="copy or download it again, or update the package 'tokenizers' if a newer version wrote it",
        ) from error
    finish(tokenizer, config, special, rule, where=where)
    return TokenizersBackend(tokenizer)


def finish(
    tokenizer: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special: SpecialTokens,
    rule: ClassRule,
    *,
    where: str,
) -> None:
    """Apply to a tokenizer what stands outside tokenizer.json."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    _add_tokens(tokenizer, special, where=where)
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel) and config.get("add_prefix_space") is not None:
        tokenizer.pre_tokenizer.add_prefix_space = bool(config["add_prefix_space"])
    if rule.rewrites:
        tokenizer.post_processor = bos_eos_processor(tokenizer, config, special, rule, where=where)


def _add_tokens(tokenizer: tokenizers.Tokenizer, special: SpecialTokens, *, where: str) -> None:
    specials = special.all()
    names = {token.content for token in specials}
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known.update(token.content for token in special.added.values())
    adding = [
        _added_token(token, special=token.special or token.content in names)
        for _, token in sorted(special.added.items())
    ]
    adding += [_added_token(token, special=True) for token in specials if not token.bare or token.content not in known]
    tokenizer.add_tokens(adding)
    for index, token in special.added.items():
        actual = tokenizer.token_to_id(token.content)
        if actual != index:
            raise CheckpointError(
                f"tokenizer_config.json gives token '{token.content}' the id {index}, tokenizer.json makes it {actual}",
                where=where,
                fix="the two files belong to different tokenizers: copy both from the same model",
            )


def _added_token(token: Token, *, special: bool) -> AddedToken:
    normalized = (not token.special) if token.normalized is None else token.normalized
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=normalized,
        special=special,
    )


def bos_eos_processor(
    tokenizer: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special: SpecialTokens,
    rule: ClassRule,
    *,
    where: str,
) -> processors.TemplateProcessing:
    """[BOS] text [EOS] as `add_bos_token` and `add_eos_token` say. Raises CheckpointError for a missing token."""
    single: list[str | int] = ["$A:0"]
    tokens = []
    for key, role, wanted in (
        ("add_bos_token", "bos_token", config.get("add_bos_token", rule.adds_bos)),
        ("add_eos_token", "eos_token", config.get("add_eos_token", False)),
    ):
        if not wanted:
            continue
        token = special.named.get(role)
        if token is None:
            raise CheckpointError(
                f"{key} is true but there is no {role}",
                where=where,
                fix=f"set {role} in tokenizer_config.json, or {key} to false",
            )
        index = tokenizer.token_to_id(token.content)
        assert index is not None, token
        tokens.append((token.content, index))
        single = [f"{token.content}:0", *single] if role == "bos_token" else [*single, f"{token.content}:0"]
    return processors.TemplateProcessing(single=single, pair=None, special_tokens=tokens)
