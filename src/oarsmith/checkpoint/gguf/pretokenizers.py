"""What a byte-level BPE cuts text into before merging, by the names GGUF files use (``tokenizer.ggml.pre``).

The expressions are those of the models' own tokenizer.json files; llama.cpp's src/llama-vocab.cpp lists the names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, pre_tokenizers

from oarsmith.errors import CheckpointError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3_PATTERN = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PATTERN = _LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s|"
_CASED_END = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_PATTERN = _CASED % ("", "") + r"\p{N}" + _CASED_END
_GPT4O_PATTERN = _CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?") + r"\p{N}{1,3}" + _CASED_END
_DEEPSEEK3_PATTERNS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PATTERNS = (
    "[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
_BLOOM_PATTERN = " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+"
# What pre-tokenizers are told apart by: words, numbers, scripts, punctuation and white space of many kinds.
_PROBES = (
    "The quick brown fox jumps. isn't it? WE'LL see; I'd say they'Re HERE, O'Neill's",
    "camelCase HTTPServer x_1 (a) [b] {c}",
    "3 33 333 3333 33333 333333 3.3 3..3 1,234,567 v2 2x \u00b2\u00bd \u0661\u0662\u0663\u0664",
    "a\n\n\nb \n \n c\t\td  e   f    g \r\n h\n i \n\n",
    "\u00fcml\u00e4uts \u00c9COLE Stra\u00dfe \u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e",
    "\u3072\u3089\u304c\u306a "
    "\u30ab\u30bf\u30ab\u30ca \ud55c\uad6d\uc5b4 \u043d\u0435\u0449\u043e \u043d\u0430 \u1780\u17b6\u1793\u17cb "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \U0001f680 \U0001f636\u200d\U0001f32b\ufe0f \u2705",
    "\u2026 \u3002\uff0c\u3001 \u201cq\u201d \u2014 ======= //path/to\n/x ''''''```````\"\"\"\"......!!!!!!?????? ",
    "$5 <a> +1 ^~| \\n",
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE cuts text, and what else its tokenizer.json sets."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


def _falcon() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            _byte_level(),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )


def _split(*patterns: str, digits: bool = False) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        single = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
        end = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*steps, *single, end])

    return build


_GPT2 = PreTokenizer(_byte_level)
_DIGITS = PreTokenizer(_single_digits)
_LLAMA3 = PreTokenizer(_split(_LLAMA3_PATTERN), ignore_merges=True, add_bos=True)
_LLAMA3_MERGING = PreTokenizer(_split(_LLAMA3_PATTERN))
_QWEN2 = PreTokenizer(_split(_QWEN2_PATTERN), nfc=True)
_DEEPSEEK3 = PreTokenizer(_split(*_DEEPSEEK3_PATTERNS))
_GPT4O = PreTokenizer(_split(_GPT4O_PATTERN))
_BLOOM = PreTokenizer(_split(_BLOOM_PATTERN))
# The first name of each kind is the one written.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "mpt": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "dbrx": _LLAMA3_MERGING,
    "smaug-bpe": _LLAMA3_MERGING,
    "chatglm-bpe": _LLAMA3_MERGING,
    "glm4": _LLAMA3_MERGING,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-v3": _DEEPSEEK3,
    "deepseek-llm": PreTokenizer(_split(*_DEEPSEEK_PATTERNS, digits=True)),
    "falcon": PreTokenizer(_falcon),
    "bloom": _BLOOM,
    "poro-chat": _BLOOM,
    "gpt3-finnish": _BLOOM,
    "tekken": PreTokenizer(_split(_TEKKEN_PATTERN), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "llama4": _GPT4O,
}


def name_of(tokenizer: Tokenizer, *, ignore_merges: bool, where: str) -> str:
    """The GGUF name of what a tokenizer does before merging, found by what it makes of probe texts.

    Args:
        ignore_merges: the tokenizer takes a word that is a token as it is; llama.cpp knows this by the name.

    Raises:
        CheckpointError: no name fits; the message holds the pre-tokenizer.
    """
    actual = tokenizer.pre_tokenizer
    pieces = None if actual is None else _pieces(actual)
    matching: dict[bool, str] = {}
    built: dict[int, list[list[str]]] = {}
    for name, known in PRE_TOKENIZERS.items():
        if id(known) not in built:
            built[id(known)] = _pieces(known.build())
        if name != "default" and built[id(known)] == pieces:  # llama.cpp's own default is something else
            matching.setdefault(known.ignore_merges, name)
    if not matching:
        raise CheckpointError(
            f"llama.cpp has no name for the pre-tokenizer {actual}; known are {', '.join(PRE_TOKENIZERS)}",
            where=where,
            fix="write the file without its tokenizer: --with_tokenizer false",
        )
    return matching.get(ignore_merges, next(iter(matching.values())))


def _pieces(pre: pre_tokenizers.PreTokenizer) -> list[list[str]]:
    return [[piece for piece, _ in pre.pre_tokenize_str(probe)] for probe in _PROBES]
