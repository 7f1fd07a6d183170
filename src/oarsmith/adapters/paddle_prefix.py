"""Prefixes between PaddleNLP's layout and PEFT's: prefix_config.json and prefix_model_state.pdparams.

PaddleNLP's table has the keys of all layers before the values of all layers, PEFT's layer by layer its keys and values.
A network that makes the table (``prefix_projection``) is folded, as PEFT does. For ChatGLM PaddleNLP counts positions
from the text's first token on, and for Bloom it reads the table in an order of its own: those are refused.
Source: PaddleNLP's paddlenlp/peft/prefix/prefix_model.py and utils.py.

Shapes: P virtual tokens, L layers, G kv heads, K head dim, M width of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from oarsmith.adapters.paddle_modules import write_files
from oarsmith.adapters.peft_config import CONFIG, PeftConfig
from oarsmith.adapters.peft_layout import WEIGHTS
from oarsmith.adapters.prefix import prefix_size
from oarsmith.adapters.virtual import STORED, virtual_tokens
from oarsmith.checkpoint.convert import DTYPE_NAMES
from oarsmith.checkpoint.paddle.config import to_paddle_config
from oarsmith.checkpoint.paddle.names import paddle_family
from oarsmith.checkpoint.paddle.ranks import Ranks
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.errors import CheckpointError
from oarsmith.models import families

PREFIX_CONFIG = "prefix_config.json"
_STEM = "prefix_model_state"
_TABLE = "0.weight"
_NETWORK = ("0.weight", "1.weight", "1.bias", "3.weight", "3.bias")
_OTHERWISE = ("chatglm", "bloom")


def check_prefix_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse ``prefix_config.json`` unless it says what can be computed.

    Raises:
        CheckpointError: what is odd.
    """
    count = config.get("num_prefix_tokens")
    if type(count) is not int or not 0 < count < 1 << 20:
        raise CheckpointError(f"num_prefix_tokens is {count!r}", where=where)


def prefix_to_peft(src: Path, dst: Path, theirs: Mapping[str, Any], config: Mapping[str, Any], base: str | None) -> int:
    """Write the PEFT adapter ``dst`` from PaddleNLP's ``src``."""
    _require_same_order(config, src)
    layers, heads, dim = _sizes(config)
    width = 2 * layers * heads * dim
    ranks = Ranks.open(src, _STEM, ())
    projected, count = bool(theirs.get("prefix_projection")), theirs["num_prefix_tokens"]
    wanted = _NETWORK if projected else (_TABLE,)
    odd = sorted(set(wanted) ^ set(ranks.shapes))
    if odd or ranks.count != 1:
        what = f"tensor {odd[0]} is missing or has no place" if odd else "files of several ranks"
        raise CheckpointError(what, where=str(src), fix="save the prefix with merge_tensor_parallel")
    with ranks.only as source:
        read = {name: source.read(name).float() for name in wanted}
    if projected:
        hidden_PM = (read["0.weight"] @ read["1.weight"] + read["1.bias"]).tanh()
        table = functional.linear(hidden_PM, read["3.weight"].t(), read["3.bias"])
    else:
        table = read[_TABLE]
    if tuple(table.shape) != (count, width):
        what = f"the table has shape {tuple(table.shape)}, the base model asks for {(count, width)}"
        raise CheckpointError(what, where=str(src), fix="use the adapter's own base model")
    settings = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": count,
        "num_transformer_submodules": 1,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dim,
        "encoder_hidden_size": heads * dim,
        "prefix_projection": projected,
    }
    write_files(dst, {STORED: _turned(table, 2, layers)}, {CONFIG: settings}, WEIGHTS, "pt")
    return 1


def prefix_from_peft(src: Path, dst: Path, described: PeftConfig, config: Mapping[str, Any], base: str | None) -> int:
    """Write PaddleNLP's adapter ``dst``; the counterpart of `prefix_to_peft`."""
    _require_same_order(config, src)
    layers, heads, dim = _sizes(config)
    with SafetensorsSource(src / WEIGHTS) as source:
        count, shape = virtual_tokens(described, source.shapes), source.shapes[STORED]
        if shape != (count, 2 * layers * heads * dim):
            what = f"tensor {STORED} has shape {shape}, which the base model has no use for"
            raise CheckpointError(what, where=str(src), fix="use the adapter's own base model")
        table = _turned(source.read(STORED), layers, 2)
    all_heads = families.build_spec(config)[1].layers[0].attention.num_heads
    dtype = DTYPE_NAMES[table.dtype]
    settings = {
        "base_model_name_or_path": base or described.values.get("base_model_name_or_path"),
        "prefix_dropout": 0.0,
        "num_prefix_tokens": count,
        "num_attention_heads": all_heads,
        "multi_query_group_num": None if heads == all_heads else heads,
        "num_hidden_layers": layers,
        # It takes a head's size from these two.
        "hidden_size": all_heads * dim,
        "prefix_projection": False,
        "prefix_projection_hidden_size": None,
        "tensor_parallel_degree": -1,
        "dtype": dtype,
    }
    texts = {PREFIX_CONFIG: settings, "config.json": to_paddle_config(config, dtype)}
    write_files(dst, {_TABLE: table}, texts, f"{_STEM}.pdparams", "np")
    return 1


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """L, G and K of the base."""
    spec = families.build_spec(config)[1]
    return len(spec.layers), *prefix_size(spec)


def _turned(table: Tensor, outer: int, inner: int) -> Tensor:
    """A table [P, outer inner G K] as [P, inner outer G K]."""
    return table.unflatten(1, (outer, inner, -1)).transpose(1, 2).flatten(1).contiguous()


def _require_same_order(config: Mapping[str, Any], src: Path) -> None:
    paddle_family(config)
    kind = str(config["model_type"])
    if kind in _OTHERWISE:
        what = f"prefixes of {kind} mean something else in PaddleNLP: positions, or the order of the table"
        raise CheckpointError(what, where=str(src), fix="train the prefix again")
