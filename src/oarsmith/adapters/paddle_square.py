"""LoKr and MoRA between PaddleNLP's layout and PEFT's (MoRA's is ours): tensors of single projections, as they are.

LoKr: lokr_config.json and lokr_model_state.pdparams, whose W1 and W2 are PEFT's, because PaddleNLP transposes their
product. MoRA: lora_config.json with ``use_mora``, whose one matrix multiplies from the right. Neither can be put
together from parts where PaddleNLP splits a projection.
Source: PaddleNLP's paddlenlp/peft/lokr/lokr_config.py, lokr_layers.py and lora/lora_layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from oarsmith.adapters.change import Change
from oarsmith.adapters.lokr import Lokr, read_lokr
from oarsmith.adapters.mora import Mora, read_mora
from oarsmith.adapters.paddle_lora import LORA_CONFIG, LORA_SAFETENSORS, LORA_STEM, lora_file
from oarsmith.adapters.paddle_modules import Module, modules_of, require_all_placed, write_paddle, write_peft
from oarsmith.adapters.peft_config import PeftConfig
from oarsmith.adapters.peft_layout import PREFIX, WEIGHTS
from oarsmith.checkpoint.paddle.ranks import Ranks
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.errors import CheckpointError

LOKR_CONFIG = "lokr_config.json"
_LOKR_STEM = "lokr_model_state"


@dataclass(frozen=True)
class Square:
    """A method whose change alone tells its tensors.

    Args:
        names: what follows a projection's name in our file -> in PaddleNLP's.
        turned: PaddleNLP has the transposes.
        stem: of the pickled file; ``safetensors``: names of others it may be.
    """

    names: Mapping[str, str]
    turned: bool
    stem: str
    safetensors: tuple[str, ...] = ()


LOKR = Square({name: name for name in Lokr.keys.values()}, turned=False, stem=_LOKR_STEM)
MORA = Square({"mora_M": "lora_A"}, turned=True, stem=LORA_STEM, safetensors=LORA_SAFETENSORS)


def check_lokr_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse ``lokr_config.json`` unless it says what can be computed.

    Raises:
        CheckpointError: what is odd.
    """
    used = [key for key in ("trainable_bias", "trainable_modules", "enable_lokr_list") if config.get(key)]
    if used:
        raise CheckpointError(f"LoKr with {', '.join(used)} cannot be converted", where=where)
    dim, factor = config.get("lokr_dim", config.get("lora_dim", 8)), config.get("factor", -1)
    if type(dim) is not int or dim < 1 or type(factor) is not int or factor < -1:
        raise CheckpointError(f"lokr_dim is {dim!r} and factor {factor!r}", where=where)
    alpha = config.get("lokr_alpha")
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < 1e6):
        raise CheckpointError(f"lokr_alpha is {alpha!r}", where=where)


def lokr_of(config: Mapping[str, Any]) -> Lokr:
    """The change that ``lokr_config.json`` describes; lokr_dim was lora_dim at first, and an alpha of 0 is r."""
    rank = config.get("lokr_dim", config.get("lora_dim", 8))
    return Lokr(
        rank=rank,
        alpha=config.get("lokr_alpha") or rank,
        both=bool(config.get("decompose_both")),
        factor=config.get("factor", -1),
    )


def square_to_peft(
    src: Path, dst: Path, change: Change, square: Square, config: Mapping[str, Any], base: str | None
) -> int:
    """Write our adapter ``dst`` from PaddleNLP's ``src``."""
    ranks = Ranks.open(src, square.stem, square.safetensors)
    found: dict[str, Tensor] = {}
    modules, left = [], set(ranks.shapes)
    for module in modules_of(config):
        own = {f"{part}.{name}" for part in module.parts() for name in square.names.values()}
        if not own & left:
            continue
        left -= own
        part = _only_part(module, src)
        for name, shape in change.shapes(module.whole).items():
            ending = change.keys[name]
            theirs = f"{part}.{square.names[ending]}"
            if theirs not in ranks.shapes:
                raise CheckpointError(f"tensor {theirs} is missing", where=str(src))
            tensor = ranks.read(theirs, shape[::-1] if square.turned else shape, (shape[-1],))
            found[f"{PREFIX}{module.name}.{ending}"] = tensor.t().contiguous() if square.turned else tensor
        modules.append(module)
    ranks.close()
    require_all_placed(left, found, src)
    write_peft(dst, found, modules, config, {"base_model_name_or_path": base, **change.peft_config()})
    return len(found)


def _only_part(module: Module, src: Path) -> str:
    if len(module.parts()) > 1:
        raise CheckpointError(
            f"{module.name} is several projections in PaddleNLP, and the changes of those are not one of its own",
            where=str(src),
            fix="merge the adapter into its base model first",
        )
    return module.parts()[0]


def square_from_peft(
    src: Path, dst: Path, described: PeftConfig, config: Mapping[str, Any], base: str | None, *, pickled: bool
) -> int:
    """Write PaddleNLP's adapter ``dst``; the counterpart of `square_to_peft`."""
    theirs = described.values
    if theirs.get("rank_pattern") or theirs.get("alpha_pattern"):
        raise CheckpointError(
            "ranks or factors that differ between modules: PaddleNLP has one of each", where=described.where
        )
    is_lokr = described.peft_type == "LOKR"
    square, change = (LOKR, read_lokr(described, "", {})) if is_lokr else (MORA, read_mora(described, "", {}))
    found: dict[str, Tensor] = {}
    with SafetensorsSource(src / WEIGHTS) as source:
        left = set(source.shapes)
        for module in modules_of(config):
            names = {f"{PREFIX}{module.name}.{ending}": ending for ending in square.names}
            for name in sorted(left & set(names)):
                tensor = source.read(name)
                part = _only_part(module, src)
                found[f"{part}.{square.names[names[name]]}"] = tensor.t().contiguous() if square.turned else tensor
                left.discard(name)
    require_all_placed(left, found, src)
    own = {"base_model_name_or_path": base or theirs.get("base_model_name_or_path")}
    if isinstance(change, Lokr):
        own |= _lokr_settings(change)
        # PaddleNLP reads no other file of LoKr.
        write_paddle(dst, found, config, f"{_LOKR_STEM}.pdparams", (LOKR_CONFIG, own))
    else:
        assert isinstance(change, Mora), change
        own |= {"r": change.rank, "lora_alpha": 2 * change.rank, "lora_dropout": change.dropout, "use_mora": True}
        write_paddle(dst, found, config, lora_file(pickled), (LORA_CONFIG, {**own, "merge_weights": False}))
    return len(found)


def _lokr_settings(change: Lokr) -> dict[str, Any]:
    return {
        "trainable_modules": None,
        "trainable_bias": None,
        "lokr_dim": change.rank,
        "lokr_alpha": change.alpha,
        "factor": change.factor,
        "decompose_both": change.both,
        "merge_weight": False,
        "scaling": change.scale,
    }
