"""sentencepiece `tokenizer.model`, with what transformers' slow Llama and Gemma tokenizers do around it.

`legacy` differs after special tokens: true encodes each piece of text between them as a text of its own (with a
dummy space in front); false puts one space in front of the whole text and none after a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.text.backends.spm import UNDERLINE, piece_bytes, place_added, read_processor, runs
from oarsmith.text.special import ClassRule, SpecialTokens

# normalizer_spec { add_dummy_prefix: false }, as protobuf wire bytes: appended to a serialized model it overrides
# that one field (fields of an embedded message that occurs twice are merged).
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Style(Enum):
    """Whose rules apply around the sentencepiece model."""

    LLAMA_LEGACY = "llama, legacy"
    LLAMA = "llama"
    GEMMA = "gemma"


@dataclass(frozen=True)
class SentencePieceRules:
    """Flags of tokenizer_config.json for a sentencepiece model."""

    style: Style
    add_prefix_space: bool
    bos: str | None
    eos: str | None
    split_special_tokens: bool


class SentencePieceBackend:
    """A sentencepiece model with added tokens."""

    def __init__(self, model: bytes, special: SpecialTokens, rules: SentencePieceRules, *, where: str) -> None:
        """
        Args:
            model: bytes of tokenizer.model. Raises CheckpointError when sentencepiece cannot read them.
            special: special and added tokens; one outside the model's vocabulary gets the next free id.
            rules: which class's behaviour.
        """
        self._model = model
        self._rules = rules
        override = _NO_DUMMY_PREFIX if rules.style is Style.LLAMA else b""
        self._processor, pieces = read_processor(model + override, where=where)
        self._added = place_added(special, {piece: i for i, piece in enumerate(pieces)})
        # A repeated or unknown piece means its unknown id, as in the model itself.
        self._ids = {piece: i for i, piece in enumerate(pieces)} | {t.content: i for i, t in self._added.items()}
        self._pieces = dict(enumerate(pieces)) | {i: token.content for i, token in self._added.items()}
        self._by_content = {token.content: token for token in self._added.values()}
        self._special_texts = frozenset(token.content for token in special.all())
        # transformers joins these with spaces: added tokens that are no special tokens, or lie above the model's ids.
        self._spaced = frozenset(self._by_content) - self._special_texts | {
            token.content for token in special.additional if self._ids[token.content] >= len(pieces)
        }
        longest_first = sorted(self._by_content, key=len, reverse=True)
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        unk = special.named.get("unk_token")
        self._unk = unk.content if unk is not None else "<unk>"

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self._ids[text] for text in self._special_texts)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        return frozenset(self._added)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        bos = [self._ids[self._rules.bos]] if add_special_tokens and self._rules.bos is not None else []
        eos = [self._ids[self._rules.eos]] if add_special_tokens and self._rules.eos is not None else []
        return [[*bos, *self._encode(text), *eos] for text in texts]

    def encode_content(self, text: str) -> list[int]:
        return self.encode_batch([text], False)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        raise OarsmithError(
            "character positions of tokens are not available for a sentencepiece tokenizer.model",
            fix="convert the tokenizer to a tokenizer.json, or use a template without {% generation %} blocks",
        )

    def _encode(self, text: str) -> list[int]:
        if self._rules.style is not Style.LLAMA or not text:
            return self._tokens_to_ids(self._tokens(text))
        text = text.replace(UNDERLINE, " ")
        tokens = self._tokens((UNDERLINE if self._rules.add_prefix_space else "") + text)
        if len(tokens) > 1 and tokens[0] == UNDERLINE and tokens[1] in self._special_texts:
            tokens = tokens[1:]
        return self._tokens_to_ids(tokens)

    def _tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        unknown = self._processor.unk_id()
        return [self._ids.get(token, unknown) for token in tokens]

    def _tokens(self, text: str) -> list[str]:
        tokens: list[str] = []
        for part in self._split(text):
            if not part:
                continue
            if part in self._by_content and not self._rules.split_special_tokens:
                tokens.append(part)
            else:
                tokens.extend(self._text_tokens(part))
        return tokens

    def _split(self, text: str) -> list[str]:
        """Cut added tokens out of the text and let them swallow the white space they claim."""
        if self._splitter is None or self._rules.split_special_tokens:
            return [text]
        parts = [part for part in self._splitter.split(text) if part]
        for i, part in enumerate(parts):
            token = self._by_content.get(part)
            if token is None:
                continue
            left, right = parts[i - 1] if i > 0 else "", parts[i + 1] if i + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[i + 1] = right.lstrip()
            if token.lstrip and left:
                parts[i - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[i - 1] += part
                parts[i] = ""
            elif token.single_word and right and right[0] != " ":
                parts[i + 1] = part + parts[i + 1]
                parts[i] = ""
        return parts

    def _text_tokens(self, text: str) -> list[str]:
        if self._rules.style is not Style.LLAMA or not text.startswith((UNDERLINE, " ")):
            return self._pieces_of(text)
        # sentencepiece drops leading spaces without the dummy prefix; behind the unknown token's text they stay.
        prefix_length = len(self._pieces_of(self._unk))
        tokens = self._pieces_of(self._unk + text)
        return tokens[prefix_length:] if len(tokens) >= prefix_length else tokens

    def _pieces_of(self, text: str) -> list[str]:
        pieces: list[str] = self._processor.encode(text, out_type=str)
        return pieces

    def _join(self, pieces: list[str]) -> str:
        text: str = self._processor.decode(pieces)
        return text

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        tokens = [self._pieces[i] for i in ids if i in self._pieces]
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._special_texts]
        return self._decode_gemma(tokens) if self._rules.style is Style.GEMMA else self._decode_llama(tokens)

    def _decode_gemma(self, tokens: Sequence[str]) -> str:
        texts: list[str] = []
        for is_added, run in runs(tokens, frozenset(self._by_content)):
            texts.extend(run if is_added else [self._join(run)])
        return "".join(texts).replace(UNDERLINE, " ")

    def _decode_llama(self, tokens: Sequence[str]) -> str:
        texts: list[str] = []
        parts = runs(tokens, self._spaced)
        for number, (is_spaced, run) in enumerate(parts, start=1):
            if is_spaced:
                texts.extend(run)
                continue
            text = self._decode_llama_run(run)
            # transformers keeps a last run without text, which makes a trailing space.
            if text or number == len(parts):
                texts.append(text)
        return " ".join(texts)

    def _decode_llama_run(self, tokens: list[str]) -> str:
        if tokens[0].startswith(UNDERLINE) and self._rules.add_prefix_space:
            tokens = [tokens[0][1:], *tokens[1:]]
        text, pending, after_special = "", list[str](), False
        for i, token in enumerate(tokens):
            if token in self._special_texts:
                if not after_special and i != 0 and self._rules.style is Style.LLAMA_LEGACY:
                    text += " "
                text += self._join(pending) + token
                pending, after_special = [], True
            else:
                bare = not token.startswith(UNDERLINE)
                if after_special and i == 1 and self._rules.add_prefix_space and bare:
                    text += " "
                pending.append(token)
                after_special = False
        return text + self._join(pending)

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, index: int) -> str | None:
        return self._pieces.get(index)

    def token_bytes(self, index: int) -> bytes | None:
        if index in self._added:
            return None if index in self.special_ids else self._added[index].content.encode("utf-8")
        return piece_bytes(self._processor, index)

    def unsettled(self, index: int, skip_special_tokens: bool) -> bool:
        # Legacy puts a space in front of a run of text once a special token follows that run.
        return self._rules.style is Style.LLAMA_LEGACY and not skip_special_tokens and index not in self.special_ids

    def content(self) -> bytes:
        rules = {**asdict(self._rules), "style": self._rules.style.value}
        added = {index: asdict(token) for index, token in sorted(self._added.items())}
        facts = {"rules": rules, "added": added, "special": sorted(self._special_texts)}
        return self._model + json.dumps(facts, sort_keys=True).encode()

    def built_files(self) -> dict[str, bytes]:
        return {}


def load_sentencepiece(
    model: bytes, config: Mapping[str, Any], special: SpecialTokens, rule: ClassRule, class_name: str, *, where: str
) -> SentencePieceBackend:
    """A backend for classes LlamaTokenizer (`legacy` true unless the config says false) and GemmaTokenizer."""
    if class_name == "GemmaTokenizer":
        style = Style.GEMMA
    else:
        style = Style.LLAMA if config.get("legacy") is False else Style.LLAMA_LEGACY
    named = {}
    for key, role, default in (("add_bos_token", "bos_token", rule.adds_bos), ("add_eos_token", "eos_token", False)):
        named[role] = special.named.get(role) if config.get(key, default) else None
        if config.get(key, default) and named[role] is None:
            raise CheckpointError(
                f"{key} is true but there is no {role}", where=where, fix=f"set {role} or {key} false"
            )
    bos, eos = named["bos_token"], named["eos_token"]
    prefix_space = config.get("add_prefix_space")
    rules = SentencePieceRules(
        style=style,
        add_prefix_space=True if prefix_space is None else bool(prefix_space),
        bos=bos.content if bos is not None else None,
        eos=eos.content if eos is not None else None,
        split_special_tokens=bool(config.get("split_special_tokens", False)),
    )
    return SentencePieceBackend(model, special, rules, where=where)
