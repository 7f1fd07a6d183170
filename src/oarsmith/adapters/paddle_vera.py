"""VeRA between PaddleNLP's layout and PEFT's: vera_config.json and vera_model_state.pdparams.

PaddleNLP adds alpha/r A diag(d) B diag(b), with A [in, r] and B [r, out] of each projection's own. With ``pissa_init``,
which its script sets, A and B begin as the r largest singular vectors of the weight with the roots of their values, and
the weight is replaced by the rest; files then lack A (and B, unless it has trained), which is made of the base's weight
again. All of that is a product of rank r more on the base's own weight, so it is read as LoRA. Singular vectors are
unique but for signs: those of A are chosen so that B lies as it does in the file.

PEFT's VeRA is written with its shared matrices cut for each projection, alpha = r and without ``pissa_init``.
Source: PaddleNLP's paddlenlp/peft/vera/vera_config.py, vera_layers.py and vera_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oarsmith.adapters.paddle_lora import joined
from oarsmith.adapters.paddle_modules import Module, modules_of, require_all_placed, write_paddle, write_peft
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.peft_layout import PREFIX, SHARED, WEIGHTS
from oarsmith.adapters.vera import Vera, read_vera
from oarsmith.checkpoint.paddle.ranks import Ranks
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.checkpoint.source import has_weights, open_model
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.errors import CheckpointError

VERA_CONFIG = "vera_config.json"
_STEM = "vera_model_state"


def check_vera_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse ``vera_config.json`` unless it says what can be computed.

    Raises:
        CheckpointError: what is odd.
    """
    used = [key for key in ("trainable_bias", "trainable_modules", "enable_vera_list", "do_qat") if config.get(key)]
    if used:
        raise CheckpointError(f"VeRA with {', '.join(used)} cannot be converted", where=where)
    rank, alpha = config.get("r", 8), config.get("vera_alpha", 8)
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"r is {rank!r} and vera_alpha {alpha!r}", where=where)


def vera_to_peft(
    src: Path,
    dst: Path,
    theirs: Mapping[str, Any],
    config: Mapping[str, Any],
    base: str | None,
    weights: Path | None,
) -> int:
    """Write the PEFT adapter ``dst``, which is LoRA.

    Args:
        weights: the base's folder, which matrices that the file lacks are made of.
    """
    rank = theirs.get("r", 8)
    scale, pissa = theirs.get("vera_alpha", 8) / rank, bool(theirs.get("pissa_init"))
    ranks = Ranks.open(src, _STEM, ())
    found: dict[str, Tensor] = {}
    modules, left = [], set(ranks.shapes)
    opened = _open_base(src, weights) if pissa else None
    for module in modules_of(config):
        held = [part for part in module.parts() if f"{part}.vera_b" in left or f"{part}.vera_d" in left]
        if not held:
            continue
        if len(held) != len(module.parts()):
            raise CheckpointError(f"PEFT cannot have an adapter on a part of {module.name} only", where=str(src))
        pieces = [None] * len(held) if opened is None else _weights(opened, module, src)
        pairs = [
            _pair(_Part(ranks, part, module.size, rank), piece, scale)
            for part, piece in zip(module.parts(), pieces, strict=True)
        ]
        a_rI, b_Or = joined([a for a, _ in pairs], [b for _, b in pairs], module, src)
        found |= {f"{PREFIX}{module.name}.lora_A.weight": a_rI, f"{PREFIX}{module.name}.lora_B.weight": b_Or}
        modules.append(module)
        left -= {f"{part}.vera_{name}" for part in held for name in "ABbd"}
    ranks.close()
    if opened is not None:
        opened.close()
    require_all_placed(left, found, src)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": base or theirs.get("base_model_name_or_path"),
        "bias": "none",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": theirs.get("vera_dropout") or 0.0,
        "use_rslora": False,
    }
    write_peft(dst, found, modules, config, settings)
    return len(found)


class _Part:
    """The tensors of a projection's part."""

    def __init__(self, ranks: Ranks, name: str, size: tuple[int, int], rank: int) -> None:
        self._ranks, self._name = ranks, name
        rows, columns = size
        self._shapes = {"A": (rows, rank), "B": (rank, columns), "d": (rank,), "b": (columns,)}

    def get(self, kind: str) -> Tensor | None:
        """One of them in fp32, if the file has it."""
        name, shape = f"{self._name}.vera_{kind}", self._shapes[kind]
        return self._ranks.read(name, shape, (shape[-1],)).float() if name in self._ranks.shapes else None

    def need(self, kind: str, why: str = "") -> Tensor:
        """One that has to be there."""
        found = self.get(kind)
        if found is None:
            raise CheckpointError(f"tensor {self._name}.vera_{kind} is missing{why}", where=str(self._ranks.directory))
        return found


def _pair(part: _Part, weight_IO: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """A [I, r] and B [r, O] of the update of the base's own weight."""
    d_r, b_O = part.need("d"), part.need("b")
    if weight_IO is None:
        a_Ir = part.need("A", ", and without pissa_init it was drawn at random")
        return a_Ir, scale * d_r[:, None] * part.need("B") * b_O
    a_Ir, start_rO = _singular(weight_IO, len(d_r))
    trained_rO = part.get("B")
    if trained_rO is None:
        trained_rO = start_rO
    signs_r = (trained_rO * start_rO).sum(1).sign()
    signs_r = torch.where(signs_r == 0, 1.0, signs_r)
    return a_Ir * signs_r, scale * d_r[:, None] * trained_rO * b_O - signs_r[:, None] * start_rO


def _singular(weight_IO: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left_II, values, right_OO = torch.linalg.svd(weight_IO.float(), full_matrices=False)
    roots_r = values[:rank].sqrt()
    return left_II[:, :rank] * roots_r, roots_r[:, None] * right_OO[:rank]


def _open_base(src: Path, weights: Path | None) -> TensorSource:
    if weights is None or not has_weights(weights):
        raise CheckpointError(
            "its matrices are the singular vectors of the base's weights, which are not there",
            where=str(src),
            fix="name the base: --model_name_or_path BASE",
        )
    return open_model(weights)[1]


def _weights(source: TensorSource, module: Module, src: Path) -> list[Tensor | None]:
    """The base's weight [I, O] of each part."""
    name = f"{module.name}.weight"
    if name not in source.shapes:
        raise CheckpointError(f"the base model has no {name}", where=str(src), fix="use the adapter's own base model")
    return list(module.where.split(source.read(name)))


def vera_from_peft(src: Path, dst: Path, described: PeftConfig, config: Mapping[str, Any], base: str | None) -> int:
    """Write PaddleNLP's adapter ``dst`` from PEFT's VeRA."""
    change = read_vera(described, "", {})
    theirs = described.values
    if theirs.get("bias", "none") != "none":
        raise CheckpointError("biases cannot be converted", where=described.where)
    found: dict[str, Tensor] = {}
    with SafetensorsSource(src / WEIGHTS) as source:
        left = set(source.shapes)
        sits = [m for m in modules_of(config) if f"{PREFIX}{m.name}.vera_lambda_d" in left]
        a_rI, b_Or = _shared(change, source, sits)
        left -= {f"{SHARED}vera_A", f"{SHARED}vera_B"}
        for module in sits:
            d_r, b_O = (source.read(f"{PREFIX}{module.name}.vera_lambda_{name}") for name in "db")
            left -= {f"{PREFIX}{module.name}.vera_lambda_{name}" for name in "db"}
            rows, parts = module.size[0], module.parts()
            own_Or = b_Or[: module.whole.out_features]
            for part, piece, b in zip(parts, own_Or.chunk(len(parts)), b_O.chunk(len(parts)), strict=True):
                found[f"{part}.vera_A"] = a_rI[:, :rows].t().contiguous()
                found[f"{part}.vera_B"] = piece.t().contiguous()
                found[f"{part}.vera_b"], found[f"{part}.vera_d"] = b.contiguous(), d_r
    require_all_placed(left, found, src)
    settings = {
        "base_model_name_or_path": base or theirs.get("base_model_name_or_path"),
        "r": change.rank,
        "vera_alpha": change.rank,
        "vera_dropout": change.dropout,
        "trainable_modules": None,
        "trainable_bias": None,
        "enable_vera_list": None,
        "head_dim": None,
        "do_qat": False,
        "pissa_init": False,
    }
    # PaddleNLP reads no other file of VeRA.
    write_paddle(dst, found, config, f"{_STEM}.pdparams", (VERA_CONFIG, settings))
    return len(found)


def _shared(change: Vera, source: TensorSource, sits: list[Module]) -> tuple[Tensor, Tensor]:
    if change.save_projection:
        names = (f"{SHARED}vera_A", f"{SHARED}vera_B")
        missing = [name for name in names if name not in source.shapes]
        if missing:
            raise CheckpointError(f"tensor {missing[0]} is missing", where=WEIGHTS)
        return source.read(names[0]), source.read(names[1])
    if not sits:
        return torch.empty(0, 0), torch.empty(0, 0)
    projection = change.among([module.whole for module in sits]).projection
    assert projection is not None
    return projection.pair(torch.device("cpu"), torch.float32)
