"""Special tokens, and what is known about each tokenizer class beside its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        additional: further special tokens.
        cleans: default of `clean_up_tokenization_spaces`.
        template: built-in chat template of checkpoints that carry none.
        needs: tokens without which that template means nothing.
        stops: tokens that end an answer, besides those the files name.
    """

    defaults: Mapping[str, str]
    adds_bos: bool = False
    rewrites: bool = False
    additional: tuple[str, ...] = ()
    cleans: bool = False
    template: str | None = None
    needs: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
_QWEN2 = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_COHERE = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>"}
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
_BLOOM = {**_LLAMA, "pad_token": "<pad>"}
_INTERNLM2 = {**_LLAMA, "pad_token": "</s>"}
_GLM4 = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
_CHATML = ("<|im_start|>", "<|im_end|>")
_GLM_ROLES = ("<|user|>", "<|observation|>")
# How Yuan 2's authors always load it, whatever the files say.
YUAN_SETTINGS = {"add_bos_token": False, "add_eos_token": False, "eos_token": "<eod>", "sep_token": "<sep>"}
YUAN_ADDITIONAL = (
    *("<sep>", "<pad>", "<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>"),
    *("<commit_before>", "<commit_msg>", "<commit_after>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>"),
    *("<jupyter_output>", "<empty_output>"),
)

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
    # Classes that are code in the checkpoint; ours are written from their behaviour.
    "BaichuanTokenizer": ClassRule(_LLAMA, adds_bos=True, template="baichuan"),
    "BaiChuanTokenizer": ClassRule(_LLAMA, adds_bos=True, template="baichuan"),
    "InternLM2Tokenizer": ClassRule(
        _INTERNLM2, adds_bos=True, template="internlm2", needs=_CHATML, stops=("<|im_end|>",)
    ),
    "QWenTokenizer": ClassRule({}, template="qwen", needs=_CHATML, stops=("<|endoftext|>", *_CHATML)),
    "ChatGLM4Tokenizer": ClassRule(_GLM4, stops=_GLM_ROLES),
    "YuanTokenizer": ClassRule({"unk_token": "<unk>"}, template="yuan2", needs=("<sep>", "<eod>")),
}
GENERIC = ClassRule({})
_CHATGLM23 = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
CHATGLM_RULES: Mapping[int | None, ClassRule] = {
    1: ClassRule(
        {
            "bos_token": "<sop>",
            "eos_token": "<eop>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "[MASK]",
        },
        cleans=True,
        template="chatglm",
        needs=("[gMASK]", "<sop>", "<eop>"),
        stops=("<eop>",),
    ),
    2: ClassRule(_CHATGLM23, template="chatglm2", needs=("[gMASK]", "sop")),
    3: ClassRule(_CHATGLM23, template="chatglm3", needs=("[gMASK]", "sop", *_GLM_ROLES), stops=_GLM_ROLES),
    None: ClassRule(_CHATGLM23, stops=_GLM_ROLES),
}
"""`ChatGLMTokenizer` is three different tokenizers: ChatGLM-6B's, ChatGLM2's and ChatGLM3's; None is one of the last
two, not known which."""

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
    "baichuan": "BaichuanTokenizer",
    "internlm2": "InternLM2Tokenizer",
    "qwen": "QWenTokenizer",
    "chatglm": "ChatGLMTokenizer",
    "yuan": "YuanTokenizer",
}


def tokenizer_class(tokenizer_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str | None:
    """Name of the transformers class without "Fast", or None when nothing names one."""
    name = tokenizer_config.get("tokenizer_class") or model_config.get("tokenizer_class")
    of_type = _CLASS_OF_MODEL_TYPE.get(str(model_config.get("model_type")))
    if name is None or (of_type == "YuanTokenizer" and name == "LlamaTokenizer"):
        return of_type
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
