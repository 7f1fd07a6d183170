"""Special tokens and flags of a tokenizer directory, read as transformers 4.57 reads them.

Sources, later ones filling what earlier ones leave out: tokenizer_config.json; without `added_tokens_decoder` there,
also special_tokens_map.json, added_tokens.json and the added tokens of tokenizer.json; last the defaults of the
tokenizer class. A key that is present with null means "none", not "default".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from oarsmith.errors import CheckpointError

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Token:
    """A special or added token and how it is cut out of text.

    Attributes:
        content: its text.
        lstrip, rstrip: it swallows white space on that side.
        single_word: it is found only as a whole word.
        normalized: it is searched in normalized text; None takes the default (not special).
        special: it disappears with skip_special_tokens.
        bare: it was written as a plain string, without flags.
    """

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    special: bool = True
    bare: bool = True


@dataclass(frozen=True)
class ClassRule:
    """What a transformers tokenizer class adds to its files.

    Attributes:
        defaults: special tokens for keys that are absent.
        adds_bos: default of `add_bos_token`.
        rewrites: True if the class replaces the file's post-processor by [BOS] text [EOS] from `add_bos_token` and
            `add_eos_token`; otherwise these two keys change nothing in a tokenizer.json.
    """

    defaults: Mapping[str, str]
    adds_bos: bool = False
    rewrites: bool = False
    additional: tuple[str, ...] = ()


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN2 = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_COHERE = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
_BLOOM = {**_LLAMA, "pad_token": "<pad>"}

CLASS_RULES: Mapping[str, ClassRule] = {
    "LlamaTokenizer": ClassRule(_LLAMA, adds_bos=True, rewrites=True),
    "CodeLlamaTokenizer": ClassRule(
        _LLAMA, adds_bos=True, rewrites=True, additional=("▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>")
    ),
    "GemmaTokenizer": ClassRule(_GEMMA, adds_bos=True, rewrites=True),
    "CohereTokenizer": ClassRule(_COHERE, adds_bos=True, rewrites=True),
    "GPTNeoXTokenizer": ClassRule(_GPT2, rewrites=True),
    "GPT2Tokenizer": ClassRule(_GPT2),
    "Qwen2Tokenizer": ClassRule(_QWEN2),
    "BloomTokenizer": ClassRule(_BLOOM),
}
GENERIC = ClassRule({})

# For directories whose tokenizer_config.json names no class: the class transformers takes for the model type.
_CLASS_OF_MODEL_TYPE = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "phi3", "phimoe", "deepseek_v2", "deepseek_v3", "ernie4_5", "arcee"),
        "LlamaTokenizer",
    ),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma"), "GemmaTokenizer"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "gpt_bigcode", "opt", "starcoder2", "dbrx", "olmo3"), "GPT2Tokenizer"),
    **dict.fromkeys(
        ("gpt_neox", "olmo", "olmo2", "olmoe", "mamba", "mamba2", "stablelm", "mpt", "rwkv"), "GPTNeoXTokenizer"
    ),
    **dict.fromkeys(("cohere", "cohere2"), "CohereTokenizer"),
    "bloom": "BloomTokenizer",
}


def tokenizer_class(tokenizer_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str | None:
    """Name of the transformers class without "Fast", or None when nothing names one."""
    name = tokenizer_config.get("tokenizer_class") or model_config.get("tokenizer_class")
    if name is None:
        return _CLASS_OF_MODEL_TYPE.get(str(model_config.get("model_type")))
    return str(name).removesuffix("Fast")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        named: by role (`bos_token`, ...), and model-specific ones (`image_token`, ...); in the order of `NAMES`.
        additional: further special tokens.
        added: tokens with a fixed id.
    """

    named: Mapping[str, Token]
    additional: tuple[Token, ...]
    added: Mapping[int, Token]

    def all(self) -> list[Token]:
        """Each special token once, named ones first."""
        unique: dict[str, Token] = {}
        for token in (*self.named.values(), *self.additional):
            unique.setdefault(token.content, token)
        return list(unique.values())

    def template_variables(self) -> dict[str, Any]:
        """What chat templates see: `bos_token` and so on as text, absent ones undefined."""
        variables: dict[str, Any] = {name: token.content for name, token in self.named.items()}
        if self.additional:
            variables["additional_special_tokens"] = [token.content for token in self.additional]
        return variables


def parse_token(value: Any, *, where: str, special: bool | None = None) -> Token:
    """A token from JSON: a string, or an object with `content` and flags."""
    if isinstance(value, str):
        return Token(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{value!r} is not a token", where=where, fix='write "<s>" or {"content": "<s>", ...}')
    return Token(
        content=value["content"],
        lstrip=bool(value.get("lstrip", False)),
        rstrip=bool(value.get("rstrip", False)),
        single_word=bool(value.get("single_word", False)),
        normalized=value.get("normalized"),
        special=bool(value.get("special", False)) if special is None else special,
        bare=False,
    )


def read_special_tokens(
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
    added_file: Mapping[str, int],
    json_tokens: Sequence[Mapping[str, Any]],
    rule: ClassRule,
) -> SpecialTokens:
    """Put the sources together; see the file's docstring.

    Args:
        config: tokenizer_config.json.
        special_map: special_tokens_map.json ({} when absent).
        added_file: added_tokens.json, text to id ({} when absent).
        json_tokens: `added_tokens` of tokenizer.json ([] when absent).
        rule: of the tokenizer class.
    """
    where = "tokenizer_config.json"
    has_decoder = "added_tokens_decoder" in config
    values: dict[str, Any] = dict(config) if has_decoder else {**config, **special_map}
    extra = values.get("extra_special_tokens") or {}
    candidates = {name: values.get(name, rule.defaults.get(name)) for name in NAMES}
    candidates |= extra if isinstance(extra, Mapping) else {}
    named = {
        name: parse_token(value, where=f"{where}, {name}", special=True)
        for name, value in candidates.items()
        if value not in (None, "")
    }
    listed = [*(values.get("additional_special_tokens") or []), *(extra if isinstance(extra, list) else [])]
    if not has_decoder:
        listed = [*(config.get("additional_special_tokens") or []), *listed]
    additional: dict[str, Token] = {}
    for value in (*listed, *rule.additional):
        token = parse_token(value, where=f"{where}, additional_special_tokens", special=True)
        additional.setdefault(token.content, token)
    if has_decoder:
        added = {
            int(index): parse_token(value, where=f"{where}, added_tokens_decoder {index}")
            for index, value in (config["added_tokens_decoder"] or {}).items()
        }
    else:
        names = {token.content for token in (*named.values(), *additional.values())}
        added = {
            index: Token(text, normalized=text not in names, special=text in names, bare=False)
            for text, index in added_file.items()
        }
        for entry in json_tokens:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("id"), int):
                raise CheckpointError(f"{entry!r} is not an added token", where="tokenizer.json, added_tokens")
            added[entry["id"]] = parse_token(entry, where="tokenizer.json, added_tokens")
    by_content = {token.content: token for token in added.values()}
    named = {name: by_content.get(token.content, token) for name, token in named.items()}
    return SpecialTokens(named=named, additional=tuple(additional.values()), added=added)
