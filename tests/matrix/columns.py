"""All columns of the support table, in their order."""

from __future__ import annotations

from . import capabilities, conversions
from .capabilities import Capability
from .part_adapters import part_adapters
from .quantized import quantized
from .rewards import reward

COLUMNS: dict[str, Capability] = {
    "files": Capability("files", "released files load, and are written back bit for bit", capabilities.load_and_save),
    "logits": Capability("same logits as", "the oracle that the logits were held against", capabilities.same_logits),
    "generate": Capability("generate", "the engine continues prompts as the oracle does", capabilities.generate),
    "sft": Capability("full SFT", "all weights train, and are saved as trained", capabilities.full_sft),
    "lora": Capability("LoRA", "adapters train, survive PEFT's layout, and merge", capabilities.lora),
    "adapters": Capability(
        "other adapters",
        "every other method on projections: starts as the base, its file gives it back, merging changes nothing; not: "
        "its blocks do not divide the random model's widths",
        capabilities.adapters,
    ),
    "parts": Capability(
        "prefixes and rows",
        "prefix and prompt tuning, ReFT, BitFit and trainable tokens: packed as alone, and the engine answers as whole "
        "passes do; not: the model has no biases, or no keys of its heads to put a prefix before",
        part_adapters,
    ),
    "packing": Capability("packing", "packed documents give what they give alone", capabilities.packing),
    "shared": Capability(
        "one prompt",
        "a prompt with several answers is computed once for all of them, and each has what it has behind a prompt of "
        "its own; apart: rotations follow the whole length, so that every answer has the prompt to itself",
        capabilities.shared_prompt,
    ),
    "reward": Capability(
        "reward model",
        "a head of one score trains on it, alone and beside LoRA, and is read back; transformers: which has the same "
        "scores of the same files",
        reward,
    ),
    "recompute": Capability("recompute", "recomputing blocks changes no gradient", capabilities.recompute),
    "init": Capability("from config", "`config.json` alone makes a fresh model", capabilities.from_config),
    "pretrain": Capability(
        "pretrain",
        "from `config.json` and a corpus the loss falls, and every parameter is reached (ChatGLM-6B, which generates "
        "after `[gMASK]<sop>`, gets them in front of each row)",
        capabilities.pretrain,
    ),
    "bin": Capability("`.bin`", "`pytorch_model.bin`, in and out", conversions.to_bin),
    "paddle": Capability("PaddleNLP", "`.pdparams`, in and out", conversions.to_paddle),
    "gguf": Capability(
        "GGUF", "in and out, as far as llama.cpp computes the model (`convert` says where not)", conversions.to_gguf
    ),
    "quantize": Capability(
        "quantized",
        "weights in 8 and 4 bits (GPTAQ), and int8 with static scales of inputs: calibrated, written as "
        "compressed-tensors (or as the cell says), read back, and near the original",
        quantized,
    ),
    "tokenizer": Capability(
        "tokenizer",
        "ids are the authors'; same kind: shown on another family's files of that kind",
        capabilities.tokenizer,
    ),
}
