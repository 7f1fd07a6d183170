"""Byte-level BPE of a tokenizer.json through tiktoken, several times as fast, where it provably gives the same ids.

The proof has three parts; where one fails there is no fast plan, and the tokenizer's own library does the work.

*Words.* The pre-tokenizer must be one of a few known regular expressions, which mean the same in both libraries but for
their character classes, and those are compared for every assigned plane of Unicode (`_disagreements`). Texts with a
character on which the libraries disagree are left to the tokenizer itself (`FastPlan.unsafe`).

*Merges.* `tokenizers` merges listed pairs of tokens, tiktoken any pair whose text is a token. Within a word, what
happens between two borders that no merge has crossed does not depend on what lies outside. So a pair x y with the text
of a token t is met in some word only if BPE on t alone meets it, and then the pair is the last state of t before t. If
every token alone becomes itself, each pair that is met is therefore listed, it is the only one of its t, and the orders
of merges are the same if that of the lists is. Tokens that BPE never makes are taken out of the list (`_merge_order`).

*Everything else.* Texts that hold an added token are left to the tokenizer (`FastPlan.added`), as are texts that NFC
would change where the tokenizer composes; special tokens around a text are found by encoding one.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, models, pre_tokenizers

from oarsmith.text import Tokenizer
from oarsmith.text.backends.tokenizers_json import TokenizersBackend

if TYPE_CHECKING:
    import tiktoken

# What ByteLevel cuts with (GPT-2), on its own and behind a cut around every digit. There the white space in front of a
# digit ends its part, so that the lookahead sees the end of a text.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
# Patterns a tokenizer.json may hold: in each every character belongs to a word (tiktoken drops what none matches), and
# only the classes of characters could mean different things to the two libraries.
_KNOWN_PATTERNS = (
    _GPT2,
    _CL100K % r"\p{N}",  # Qwen2
    _CL100K % r"\p{N}{1,3}",  # Llama 3, GLM-4
    f"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIXES}?|{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIXES}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # GPT-4o, gpt-oss
)
_CLASS = re.compile(r"\\p\{[A-Z][a-z]?\}|\\s")
# Planes without an assigned character are not compared; their characters count as unsafe.
_COMPARED = (range(0x40000), range(0xE0000, 0xF0000))
NOT_COMPARED = r"\U00040000-\U000DFFFF\U000F0000-\U0010FFFF"
_PROBE = "oar"
NO_TOKEN = -1


@dataclass(frozen=True)
class FastPlan:
    """What a worker needs to encode with tiktoken.

    Attributes:
        pattern: cuts a text into words.
        tokens: bytes of the tokens by rank; the first 256 are the single bytes.
        ids: id of each of them; NO_TOKEN for a byte that the vocabulary lacks. No merge has such a byte, so it shows
            in the ranks of every text that holds it, and the tokenizer itself decides what becomes of it.
        unsafe: characters about which the libraries disagree, none of them ASCII. Those of NOT_COMPARED are unsafe too.
        added: matches a text that holds an added token; None where there are none.
        composes: the tokenizer brings texts into NFC.
        prefix, suffix: ids around every text.
    """

    pattern: str
    tokens: tuple[bytes, ...]
    ids: tuple[int, ...]
    unsafe: str
    added: str | None
    composes: bool
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def encoding(self) -> tiktoken.Encoding:
        """The encoder; its ids are ranks."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding("corpus", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens={})


def plan_fast(tokenizer: Tokenizer, *, add_special_tokens: bool) -> FastPlan | str:
    """The plan for a tokenizer, or why there is none."""
    if not isinstance(tokenizer.backend, TokenizersBackend):
        return "the tokenizer has no tokenizer.json"
    content = json.loads(tokenizer.backend.content())
    pattern = _pattern(content["pre_tokenizer"])
    if pattern is None:
        return "its pre-tokenizer is not one known regular expression"
    normalizer = content["normalizer"]
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return "it changes texts before it cuts them"
    expression, digits = pattern
    unsafe = _disagreements(expression, digits=digits)
    if isinstance(unsafe, str):
        return unsafe
    contents = {token["content"] for token in content["added_tokens"]}
    tokens = _merge_order(content["model"], contents)
    if isinstance(tokens, str):
        return tokens
    around = _around(tokenizer, add_special_tokens)
    if around is None:
        return "it puts more around a text than a prefix and a suffix"
    vocabulary = content["model"]["vocab"]
    added = sorted(contents | {unicodedata.normalize("NFC", text) for text in contents}, key=len, reverse=True)
    return FastPlan(
        pattern=expression,
        tokens=tuple(_bytes(token) for token in tokens),
        ids=tuple(vocabulary.get(token, NO_TOKEN) for token in tokens),
        unsafe="".join(sorted(unsafe)),
        added="|".join(map(re.escape, added)) if added else None,
        composes=normalizer is not None,
        prefix=around[0],
        suffix=around[1],
    )


def _pattern(pre_tokenizer: Any) -> tuple[str, bool] | None:
    """(regular expression, whether digits are cut by `Digits`) of a byte-level pre-tokenizer."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if not parts or parts[-1]["type"] != "ByteLevel" or parts[-1]["add_prefix_space"]:
        return None
    cuts_words = parts[-1]["use_regex"]
    match parts[:-1]:
        case [] if cuts_words:
            return _GPT2, False
        case [{"type": "Digits", "individual_digits": True}] if cuts_words:
            return _GPT2_DIGITS, True
        case [{"type": "Split", "pattern": {"Regex": str(found)}, "behavior": "Isolated", "invert": False}] if (
            not cuts_words and found in _KNOWN_PATTERNS
        ):
            return found, False
    return None


def _disagreements(pattern: str, *, digits: bool) -> set[str] | str:
    """Characters of the compared planes that a class of the pattern holds in one library and not in the other."""
    everything = "".join(chr(c) for part in _COMPARED for c in part if not 0xD800 <= c <= 0xDFFF)
    found: set[str] = set()
    folded = ["(?i:[a-z])"] if "(?i:" in pattern else []
    for name in (*sorted(set(_CLASS.findall(pattern))), *folded):
        ours = _matched(name, everything)
        inside, outside = "".join(sorted(ours)), "".join(c for c in everything if c not in ours)
        pieces = pre_tokenizers.Split(Regex(f"{name}+"), "removed").pre_tokenize_str(inside)
        pieces += pre_tokenizers.Split(Regex(f"{name}+"), "removed", invert=True).pre_tokenize_str(outside)
        found |= {character for piece, _ in pieces for character in piece}
        if digits and name == r"\p{N}":
            # With a letter in front, every second part is digits.
            parts = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str("x" + outside)
            found |= {character for piece, _ in parts[1::2] for character in piece}
            parts = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str("1" + inside)
            found |= {character for piece, _ in parts[1::2] for character in piece}
    if any(character.isascii() for character in found):
        return "the libraries disagree about a class of ASCII characters"
    return found


def _matched(name: str, text: str) -> set[str]:
    """Characters that tiktoken's regular expressions count into a class: it drops what no word matches."""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("probe", pat_str=f"{name}+", mergeable_ranks=ranks, special_tokens={})
    return set(bytes(encoding.encode_ordinary(text)).decode("utf-8"))


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: those that are printable themselves, then 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return spelled | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_characters()


def _bytes(token: str) -> bytes:
    return bytes(_BYTES[character] for character in token)


def _merge_order(model: Any, added: set[str]) -> list[str] | str:
    """The 256 bytes and then the merged tokens in the order of their merges, or why tiktoken would merge otherwise."""
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        return "its model is not plain BPE"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its tokens have affixes"
    vocabulary: dict[str, int] = model["vocab"]
    split = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    pairs = [(str(a), str(b)) for a, b in split]
    merged = [token for token, _ in itertools.groupby(a + b for a, b in pairs)]
    if len(set(merged)) != len(merged) or any(token in _BYTES for token in merged):
        return "its merges make a token at several places of their order"
    if any(token not in vocabulary or any(c not in _BYTES for c in token) for token in merged):
        return "its merges do not stay within the byte alphabet"
    bpe = models.BPE(vocab=vocabulary, merges=pairs)
    whole_words = bool(model.get("ignore_merges"))
    unmade = {token: len(pieces) for token in merged if len(pieces := bpe.tokenize(token)) != 1}
    if whole_words and (
        2 in unmade.values() or any(map(_is_spelled, set(vocabulary) - added - set(merged) - set(_BYTES)))
    ):
        return "it has words that its merges do not make"
    return [*_BYTES, *(token for token in merged if whole_words or token not in unmade)]


def _is_spelled(token: str) -> bool:
    return all(character in _BYTES for character in token)


def _around(tokenizer: Tokenizer, add_special_tokens: bool) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    bare = tokenizer.encode(_PROBE, add_special_tokens=False)
    whole = tokenizer.encode(_PROBE, add_special_tokens=add_special_tokens)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return None


def is_composed(text: str) -> bool:
    """Whether NFC leaves the text as it is, whatever version of Unicode looks at it.

    A character that Python's tables do not know might compose in newer ones.
    """
    return unicodedata.is_normalized("NFC", text) and all(unicodedata.category(c) != "Cn" for c in set(text))
