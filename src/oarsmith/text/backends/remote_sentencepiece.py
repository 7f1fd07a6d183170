"""sentencepiece models whose authors ship their own tokenizer class: Baichuan, InternLM2, ChatGLM2 and ChatGLM3.

Written from the behaviour of the authors' tokenization files under transformers 4.33; none of their code is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from oarsmith.errors import CheckpointError, OarsmithError
from oarsmith.text.backends.slow import Cutter, is_modern, join_spaced, spaced_tokens, swallowing
from oarsmith.text.backends.spm import UNDERLINE, piece_bytes, place_added, read_processor
from oarsmith.text.cleanup import CLEANED, clean_up_spaces
from oarsmith.text.special import ClassRule, SpecialTokens

CHATGLM2_CONTROLS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM3_CONTROLS = (*CHATGLM2_CONTROLS, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHATGLM_PREFIX = ("[gMASK]", "sop")


class Joining(Enum):
    """How pieces become text again.

    SPACED: a special token puts a space in front of the run of text before it, except as the very first token.
    SPACED_FIRST: also as the first token.
    PLAIN: sentencepiece alone joins them.
    """

    SPACED = "a space before a run that a special token ends"
    SPACED_FIRST = "the same, also before a first special token"
    PLAIN = "plain"


@dataclass(frozen=True)
class RemoteRules:
    """What a class does around its sentencepiece model.

    Attributes:
        joining: how pieces become text.
        bos, eos: tokens around a text, None for none.
        prefix: tokens in front of a text (ChatGLM).
        controls: tokens with the ids after the model's own, which no text can spell (ChatGLM).
        shows_controls: decoding shows them as text (ChatGLM3), or as nothing (ChatGLM2).
        hides_named: BOS, EOS and unknown decode to nothing and are not cut out of text (ChatGLM).
        keeps_space: the named tokens never swallow white space, also where they are plain strings (Baichuan).
        cleans: decoding takes spaces before punctuation and contractions out of each run (InternLM2).
    """

    joining: Joining
    bos: str | None = None
    eos: str | None = None
    prefix: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    shows_controls: bool = True
    hides_named: bool = False
    keeps_space: bool = False
    cleans: bool = False


class RemoteSentencePiece:
    """A sentencepiece model under one of these classes' rules."""

    def __init__(
        self,
        model: bytes,
        config: Mapping[str, Any],
        special: SpecialTokens,
        rules: RemoteRules,
        *,
        where: str,
    ) -> None:
        """
        Args:
            model: bytes of tokenizer.model. Raises CheckpointError when sentencepiece cannot read them.
            config: tokenizer_config.json; only which version of transformers wrote it matters.
            special: special and added tokens; one outside the vocabulary gets the next free id.
            rules: which class's behaviour.
        """
        self._model = model
        self._rules = rules
        self._processor, pieces = read_processor(model, where=where)
        size = len(pieces)
        self._controls = {token: size + i for i, token in enumerate(rules.controls)}
        self._ids: dict[str, int] = {piece: i for i, piece in enumerate(pieces)} | self._controls
        self._texts = dict(enumerate([*pieces, *rules.controls]))
        named = {} if rules.hides_named else special.named
        cut = SpecialTokens(named=named, additional=special.additional, added=special.added)
        added = place_added(cut, self._ids)
        self._added_ids = frozenset(added)
        self._ids |= {token.content: index for index, token in added.items()}
        self._texts |= {index: token.content for index, token in added.items()}
        self._shadowed = {i: self._ids[piece] for i, piece in enumerate(pieces) if self._ids[piece] != i}
        self._modern = is_modern(config)
        spaced = spaced_tokens(config, cut, added, size + len(rules.controls))
        self._spaced = {text: text for text in spaced}
        self._special_texts = frozenset(token.content for token in cut.all())
        self._hidden = self._hidden_ids() if rules.hides_named else frozenset()
        kept = frozenset(t.content for t in special.named.values()) if rules.keeps_space else frozenset()
        self._swallowing = swallowing(config, cut.all()) - kept
        self._cutter = Cutter(added.values(), self._swallowing)
        self._added = added

    def _hidden_ids(self) -> frozenset[int]:
        own = {self._processor.bos_id(), self._processor.eos_id(), self._processor.unk_id()}
        return frozenset(own) if self._rules.shows_controls else frozenset(own | set(self._controls.values()))

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return self._hidden | {self._ids[text] for text in self._special_texts}

    @property
    def added_ids(self) -> frozenset[int]:
        return self._added_ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        rules = self._rules
        before = [self._ids[token] for token in (*rules.prefix, rules.bos) if token] if add_special_tokens else []
        after = [self._ids[rules.eos]] if add_special_tokens and rules.eos else []
        return [[*before, *self._encode(text), *after] for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for is_token, part in self._cutter.split(text):
            if is_token:
                ids.append(self._ids[part])
            elif self._shadowed:
                # The authors look pieces up by their text, where a control token of that text comes first.
                ids += [self._shadowed.get(index, index) for index in self.encode_content(part)]
            else:
                ids += self.encode_content(part)
        return ids

    def encode_content(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        raise OarsmithError(
            "character positions of tokens are not available for a sentencepiece tokenizer.model",
            fix="use a template without {% generation %} blocks",
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        tokens = ["" if i in self._hidden else self._texts[i] for i in ids if i in self._texts and i not in skipped]
        return join_spaced(tokens, self._spaced, self._join, modern=self._modern)

    def _join(self, tokens: list[str]) -> str:
        if self._rules.joining is Joining.PLAIN:
            return self._text_of(tokens)
        text, pending, after_special = "", list[str](), False
        for i, token in enumerate(tokens):
            if token in self._special_texts:
                if not after_special and (i > 0 or self._rules.joining is Joining.SPACED_FIRST):
                    text += " "
                text += self._text_of(pending) + token
                pending, after_special = [], True
            else:
                pending.append(token)
                after_special = False
        text += self._text_of(pending)
        return clean_up_spaces(text) if self._rules.cleans else text

    def _text_of(self, pieces: list[str]) -> str:
        if not pieces:
            return ""
        text: str = self._processor.decode_pieces(pieces)
        return text

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, index: int) -> str | None:
        return self._texts.get(index)

    def token_bytes(self, index: int) -> bytes | None:
        if index in self._added_ids:
            return None if index in self.special_ids else self._texts[index].encode("utf-8")
        return piece_bytes(self._processor, index)

    def unsettled(self, index: int, skip_special_tokens: bool) -> bool:
        # A special token that follows a run of text puts a space in front of that run.
        if self._rules.joining is not Joining.PLAIN and not skip_special_tokens and index not in self.special_ids:
            return True
        return self._rules.cleans and CLEANED.has(self._texts.get(index, "").replace(UNDERLINE, " "))

    def content(self) -> bytes:
        rules = {**asdict(self._rules), "joining": self._rules.joining.value}
        added = {index: asdict(token) for index, token in sorted(self._added.items())}
        facts = {"rules": rules, "added": added, "modern": self._modern, "swallowing": sorted(self._swallowing)}
        return self._model + json.dumps(facts, sort_keys=True).encode()

    def built_files(self) -> dict[str, bytes]:
        return {}


def load_baichuan(
    model: bytes, config: Mapping[str, Any], special: SpecialTokens, rule: ClassRule, *, where: str
) -> RemoteSentencePiece:
    """A backend for `BaichuanTokenizer` (Baichuan and Baichuan2)."""
    rules = RemoteRules(Joining.SPACED, *_bos_and_eos(config, special, rule, where), keeps_space=True)
    return RemoteSentencePiece(model, config, special, rules, where=where)


def load_internlm2(
    model: bytes, config: Mapping[str, Any], special: SpecialTokens, rule: ClassRule, *, where: str
) -> RemoteSentencePiece:
    """A backend for `InternLM2Tokenizer`."""
    rules = RemoteRules(Joining.SPACED_FIRST, *_bos_and_eos(config, special, rule, where), cleans=True)
    return RemoteSentencePiece(model, config, special, rules, where=where)


def load_chatglm(
    model: bytes, config: Mapping[str, Any], special: SpecialTokens, *, version: int | None, where: str
) -> RemoteSentencePiece:
    """A backend for `ChatGLMTokenizer` over a tokenizer.model.

    Args:
        version: 2 or 3; None (not known) takes ChatGLM3's tokens, which are ChatGLM2's and four more.
    """
    rules = RemoteRules(
        Joining.PLAIN,
        prefix=CHATGLM_PREFIX,
        controls=CHATGLM2_CONTROLS if version == 2 else CHATGLM3_CONTROLS,
        shows_controls=version != 2,
        hides_named=True,
    )
    return RemoteSentencePiece(model, config, special, rules, where=where)


def _bos_and_eos(
    config: Mapping[str, Any], special: SpecialTokens, rule: ClassRule, where: str
) -> tuple[str | None, str | None]:
    found: list[str | None] = []
    for key, role, default in (("add_bos_token", "bos_token", rule.adds_bos), ("add_eos_token", "eos_token", False)):
        token = special.named.get(role) if config.get(key, default) else None
        if token is None and config.get(key, default):
            raise CheckpointError(
                f"{key} is true but there is no {role}", where=where, fix=f"set {role} or {key} false"
            )
        found.append(token.content if token is not None else None)
    return found[0], found[1]
