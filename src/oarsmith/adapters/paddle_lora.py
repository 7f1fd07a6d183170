"""LoRA between PaddleNLP's layout and PEFT's: lora_config.json and lora_model_state.pdparams.

PaddleNLP keeps ``{module}.lora_A`` [in, r] and ``{module}.lora_B`` [r, out] under its own module names; PEFT keeps
the transposes. Where PaddleNLP splits a projection that Hugging Face keeps as one (GPT-2's c_attn), A is shared and B
is cut.
Source: PaddleNLP's paddlenlp/peft/lora/lora_config.py and lora_layers.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.ends import end_places
from oarsmith.adapters.lora import check_lora
from oarsmith.adapters.paddle_modules import Module, modules_of, require_all_placed, write_paddle, write_peft
from oarsmith.adapters.peft_config import CONFIG, PeftConfig
from oarsmith.adapters.peft_layout import PREFIX, WEIGHTS
from oarsmith.checkpoint.paddle.names import group_sizes, paddle_family
from oarsmith.checkpoint.paddle.ranks import Ranks
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.errors import CheckpointError
from oarsmith.models import families

LORA_CONFIG = "lora_config.json"
LORA_STEM = "lora_model_state"
LORA_SAFETENSORS = ("peft_model.safetensors.index.json", "peft_model.safetensors")
# Options that change the arithmetic or the base model: refusing beats computing something else.
_MUST_BE_EMPTY = (
    "pissa",
    "enable_lora_list",
    "trainable_bias",
    "trainable_modules",
    "do_qat",
    "lorapro",
    "mixer",
    "lora_use_mixer",
    "nola",
)


def check_lora_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse ``lora_config.json`` unless it describes plain LoRA, or MoRA.

    Raises:
        CheckpointError: what is odd.
    """
    used = [key for key in _MUST_BE_EMPTY if config.get(key)]
    if used:
        raise CheckpointError(f"LoRA with {', '.join(used)} cannot be converted", where=where)
    if type(config.get("r")) is not int or config["r"] < 1:
        raise CheckpointError(f"r is {config.get('r')!r}", where=where)


def lora_to_peft(src: Path, dst: Path, theirs: Mapping[str, Any], config: Mapping[str, Any], base: str | None) -> int:
    """Write the PEFT adapter ``dst``; returns the number of tensors."""
    ranks = Ranks.open(src, LORA_STEM, LORA_SAFETENSORS)
    found, modules = {}, []
    left = set(ranks.shapes)
    for module in modules_of(config):
        held = [part for part in module.parts() if f"{part}.lora_A" in ranks.shapes]
        if not held:
            continue
        if len(held) != len(module.parts()):
            raise CheckpointError(f"PEFT cannot have LoRA on a part of {module.name} only", where=str(src))
        found[f"{PREFIX}{module.name}.lora_A.weight"], found[f"{PREFIX}{module.name}.lora_B.weight"] = _join(
            ranks, module, config
        )
        modules.append(module)
        left -= {f"{part}.lora_{kind}" for part in held for kind in "AB"}
    ranks.close()
    require_all_placed(left, found, src)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or theirs.get("base_model_name_or_path"),
        "bias": "none",
        "r": theirs["r"],
        "lora_alpha": theirs.get("lora_alpha", 8),
        "lora_dropout": theirs.get("lora_dropout", 0.0),
        "use_rslora": bool(theirs.get("rslora")),
    }
    write_peft(dst, found, modules, config, settings)
    return len(found)


def _join(ranks: Ranks, module: Module, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    rows, columns = module.size
    a_parts, b_parts = [], []
    for part, weight in zip(module.parts(), module.where.names, strict=True):
        b_shape = ranks.shapes.get(f"{part}.lora_B", ())
        if len(b_shape) != 2:
            raise CheckpointError(f"no matrix {part}.lora_B", where=str(ranks.directory))
        sizes = group_sizes(paddle_family(config), weight, (columns,), config)
        a_parts.append(ranks.read(f"{part}.lora_A", (rows, b_shape[0]), (b_shape[0],)))
        b_parts.append(ranks.read(f"{part}.lora_B", (b_shape[0], columns), sizes))
    return joined(a_parts, b_parts, module, ranks.directory)


def joined(a_parts: list[Tensor], b_parts: list[Tensor], module: Module, src: Path) -> tuple[Tensor, Tensor]:
    """PEFT's A [r, I] and B [O, r] of a projection's parts [I, r] and [r, O].

    Raises:
        CheckpointError: the parts have different A.
    """
    if not all(torch.equal(a_parts[0], other) for other in a_parts):
        raise CheckpointError(
            f"the parts of {module.name} have different A, PEFT's one projection has a single one",
            where=str(src),
            fix="merge the adapter into its base model in PaddleNLP",
        )
    return a_parts[0].t().contiguous(), torch.cat(b_parts, dim=-1).t().contiguous()


def lora_from_peft(
    src: Path, dst: Path, described: PeftConfig, config: Mapping[str, Any], base: str | None, *, pickled: bool
) -> int:
    """Write PaddleNLP's adapter ``dst``; the counterpart of `lora_to_peft`."""
    check_lora(described)
    theirs = described.values
    if theirs.get("rank_pattern") or theirs.get("alpha_pattern") or theirs.get("bias", "none") != "none":
        raise CheckpointError(
            "ranks or factors that differ between modules, or biases: PaddleNLP's LoRA has one of each",
            where=str(src / CONFIG),
        )
    found: dict[str, Tensor] = {}
    with SafetensorsSource(src / WEIGHTS) as source:
        left = set(source.shapes)
        for module in modules_of(config):
            names = [f"{PREFIX}{module.name}.lora_{kind_}.weight" for kind_ in "AB"]
            if names[0] in left and names[1] in left:
                parts = module.parts()
                a, b = (source.read(name).t() for name in names)
                for part, piece in zip(parts, b.chunk(len(parts), dim=-1), strict=True):
                    found[f"{part}.lora_A"], found[f"{part}.lora_B"] = a.contiguous(), piece.contiguous()
                left -= set(names)
    _require_projections(left, config, src)
    require_all_placed(left, found, src)
    settings = {
        "base_model_name_or_path": base or theirs.get("base_model_name_or_path"),
        "r": theirs.get("r", 8),
        "lora_alpha": theirs.get("lora_alpha", 8),
        "lora_dropout": theirs.get("lora_dropout") or 0.0,
        "rslora": bool(theirs.get("use_rslora")),
        "merge_weights": False,
    }
    write_paddle(dst, found, config, lora_file(pickled), (LORA_CONFIG, settings))
    return len(found)


def _require_projections(left: Collection[str], config: Mapping[str, Any], src: Path) -> None:
    family, spec = families.build_spec(config)
    for module in end_places(family.names(spec)):
        if any(name.startswith(f"{PREFIX}{module}.") for name in left):
            raise CheckpointError(
                f"the adapter changes {module}, and PaddleNLP's LoRA sits on projections only",
                where=str(src / WEIGHTS),
                fix="merge it into its base (oarsmith merge-adapter), and convert that",
            )


def lora_file(pickled: bool) -> str:
    """PaddleNLP reads either."""
    return f"{LORA_STEM}.pdparams" if pickled else LORA_SAFETENSORS[1]
