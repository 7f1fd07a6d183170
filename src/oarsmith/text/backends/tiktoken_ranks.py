"""tiktoken rank files (a token in base64 and its rank on each line): Qwen-1's qwen.tiktoken, GLM-4's tokenizer.model.

Written from the behaviour of the authors' tokenization files; none of their code is run.
"""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from oarsmith.errors import CheckpointError, DataError, OarsmithError
from oarsmith.text.backends.slow import Cutter, is_modern, join_spaced, spaced_tokens
from oarsmith.text.special import SpecialTokens, Token

if TYPE_CHECKING:
    import tiktoken

_MAX_TOKENS = 4_000_000
_MAX_TOKEN_BYTES = 65_536
_MAX_DIGITS = 9
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PATTERN = _WORDS % r"\p{N}"
_GLM4_PATTERN = _WORDS % r"\p{N}{1,3}"
QWEN_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
_COPY = "tokenizer_config.json and tokenizer.model must come from the same model"
GLM4_CONTROLS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)


@dataclass(frozen=True)
class RankRules:
    """What a class does around its ranks.

    Attributes:
        name: of the encoding, for tiktoken's own messages.
        pattern: how text is cut into words.
        prefix: control tokens in front of a text.
        composes: text is normalised to NFC.
        spaced: control tokens that decoding sets apart with spaces.
        special: control tokens that decoding may leave out.
        modern: see `join_spaced`.
    """

    name: str
    pattern: str
    prefix: tuple[str, ...]
    composes: bool
    spaced: frozenset[str]
    special: frozenset[str]
    modern: bool


class TiktokenBackend:
    """A tiktoken encoding with control tokens."""

    def __init__(self, ranks: Mapping[bytes, int], controls: Mapping[str, int], rules: RankRules) -> None:
        """
        Args:
            ranks: see `read_ranks`.
            controls: control tokens and their ids, which are no ranks; they are cut out of a text.
            rules: which class's behaviour.
        """
        self._ranks = ranks
        self._rules = rules
        self._controls = dict(controls)
        self._cutter = Cutter([Token(token) for token in controls], frozenset())
        self._names = {index: token for token, index in controls.items()}
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._spaced = {controls[token]: token for token in rules.spaced}
        self._encoding = _encoding(ranks, rules)

    @property
    def vocab_size(self) -> int:
        return len(self._ranks) + len(self._controls)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(index for token, index in self._controls.items() if token in self._rules.special)

    @cached_property
    def added_ids(self) -> frozenset[int]:
        return frozenset(self._names)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        before = [self._controls[token] for token in self._rules.prefix] if add_special_tokens else []
        return [[*before, *self._encode(text)] for text in texts]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for is_token, part in self._cutter.split(self._composed(text)):
            ids += [self._controls[part]] if is_token else self._ordinary(part)
        return ids

    def encode_content(self, text: str) -> list[int]:
        return self._ordinary(self._composed(text))

    def _composed(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._rules.composes else text

    def _ordinary(self, text: str) -> list[int]:
        text.encode("utf-8")  # tiktoken would put U+FFFD for half a character
        try:
            # Not encode_ordinary, which panics where this raises.
            return self._encoding.encode(text, allowed_special=set(), disallowed_special=())
        except ValueError as error:
            raise DataError(
                f"tiktoken cannot cut the text into words: {error}",
                fix="the text holds white space by the million: shorten it or drop the row",
            ) from error

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        raise OarsmithError(
            "character positions of tokens are not available for a tiktoken file",
            fix="use a template without {% generation %} blocks",
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        kept = [i for i in ids if i not in skipped]
        return join_spaced(kept, self._spaced, self._text_of, modern=self._rules.modern)

    def _text_of(self, ids: list[int]) -> str:
        # A character's bytes never reach across a control token, so all of them decode as one.
        return b"".join(map(self._spelled, ids)).decode("utf-8", errors="replace")

    def _spelled(self, index: int) -> bytes:
        name = self._names.get(index)
        return self._bytes.get(index, b"") if name is None else name.encode("utf-8")

    def token_to_id(self, token: str) -> int | None:
        return self._controls.get(token, self._ranks.get(token.encode("utf-8", errors="replace")))

    def id_to_token(self, index: int) -> str | None:
        token = self._bytes.get(index)
        return self._names.get(index) if token is None else token.decode("utf-8", errors="replace")

    def token_bytes(self, index: int) -> bytes | None:
        return None if index in self.special_ids else self._spelled(index) or None

    def unsettled(self, index: int, skip_special_tokens: bool) -> bool:
        return False

    def content(self) -> bytes:
        ranks = b"".join(b"%d %s\n" % (rank, token) for rank, token in sorted(self._bytes.items()))
        rules = {**asdict(self._rules), "spaced": sorted(self._spaced), "special": sorted(self._rules.special)}
        facts = [rules, sorted(self._controls.items())]
        return ranks + json.dumps(facts).encode()

    def built_files(self) -> dict[str, bytes]:
        return {}


def load_qwen(ranks_file: bytes, *, where: str) -> TiktokenBackend:
    """A backend for Qwen-1's `QWenTokenizer`: its control tokens, right after the ranks, are cut out of every text."""
    ranks = read_ranks(ranks_file, where=where)
    controls = {token: len(ranks) + i for i, token in enumerate(QWEN_CONTROLS)}
    rules = RankRules(
        name="qwen",
        pattern=_QWEN_PATTERN,
        prefix=(),
        composes=True,
        spaced=frozenset(),
        special=frozenset(QWEN_CONTROLS),
        modern=False,
    )
    return TiktokenBackend(ranks, controls, rules)


def load_chatglm4(
    ranks_file: bytes, config: Mapping[str, Any], special: SpecialTokens, *, where: str
) -> TiktokenBackend:
    """A backend for GLM-4's `ChatGLM4Tokenizer`: tokenizer_config.json lists the control tokens and their ids."""
    ranks = read_ranks(ranks_file, where=where)
    added = dict(special.added)
    if not added:
        added = {len(ranks) + i: Token(token) for i, token in enumerate(GLM4_CONTROLS)}
    controls = {token.content: index for index, token in added.items()}
    for name in ("[gMASK]", "<sop>", *(token.content for token in special.all())):
        if name not in controls:
            raise CheckpointError(
                f"the token '{name}' is not in added_tokens_decoder of tokenizer_config.json", where=where, fix=_COPY
            )
    for text, index in controls.items():
        if index < len(ranks):
            raise CheckpointError(
                f"tokenizer_config.json gives token '{text}' the id {index}, which is one of the {len(ranks):,} ranks",
                where=where,
                fix=_COPY,
            )
    rules = RankRules(
        name="glm-4",
        pattern=_GLM4_PATTERN,
        prefix=("[gMASK]", "<sop>"),
        composes=False,
        spaced=spaced_tokens(config, special, added, len(ranks)),
        special=frozenset(token.content for token in special.all()),
        modern=is_modern(config),
    )
    return TiktokenBackend(ranks, controls, rules)


def read_ranks(content: bytes, *, where: str) -> dict[bytes, int]:
    """Tokens and their ranks, which are 0, 1, 2, ... and hold every single byte.

    Raises CheckpointError for anything else, with the line.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        token, rank = _rank_of(line, f"{where}:{number}")
        if token in ranks:
            raise CheckpointError(f"the token {token!r} stands there twice", where=f"{where}:{number}")
        ranks[token] = rank
        if len(ranks) > _MAX_TOKENS:
            raise CheckpointError(f"more than {_MAX_TOKENS:,} tokens", where=where, fix="this is no tokenizer file")
    values = set(ranks.values())
    if len(values) != len(ranks) or (ranks and max(values) != len(ranks) - 1):
        raise CheckpointError(
            f"the ranks of its {len(ranks):,} tokens are not 0 to {len(ranks) - 1:,}, each once",
            where=where,
            fix="copy or download the file again",
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"no token for the byte 0x{missing[0]:02X}, so not every text could be encoded",
            where=where,
            fix="copy or download the file again",
        )
    return ranks


def _rank_of(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.split()
    try:
        if len(fields) != 2 or not fields[1].isdigit() or len(fields[1]) > _MAX_DIGITS:
            raise ValueError("not two fields, a token and its rank")
        token = base64.b64decode(fields[0], validate=True)
        if not 0 < len(token) <= _MAX_TOKEN_BYTES:
            raise ValueError(f"a token of {len(token)} bytes")
    except ValueError as error:
        raise CheckpointError(
            f"not a line of a tiktoken file ({error}): {line[:40]!r}",
            where=where,
            fix="each line is a token in base64, a space and its rank (a Git LFS pointer or a sentencepiece model is "
            "no such file): copy or download it again",
        ) from error
    return token, int(fields[1])


def _encoding(ranks: Mapping[bytes, int], rules: RankRules) -> tiktoken.Encoding:
    import tiktoken  # here: most tokenizers do without

    return tiktoken.Encoding(rules.name, pat_str=rules.pattern, mergeable_ranks=dict(ranks), special_tokens={})
