"""``config.json`` of a model directory, in the Hugging Face spelling whatever the weights are stored as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oarsmith.checkpoint.files import read_json_object, require_inside
from oarsmith.checkpoint.paddle.config import from_paddle_config
from oarsmith.checkpoint.paddle.source import is_paddle
from oarsmith.errors import CheckpointError
from oarsmith.models import families

_MAX_BITS = 128  # some files say int(1e30) for "no limit"
# What is counted out one by one before any tensor is looked at.
_AT_MOST = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "num_nextn_predict_layers"), 10_000),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), 10_000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "multi_query_group_num"), 100_000),
}
_TEXTS = (
    "model_type",
    "rope_scaling_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "activation",
    "dtype",
    "torch_dtype",
)
_NAME_LISTS = ("architectures", "layer_types", "mlp_layer_types")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory; PaddleNLP's is translated, an image and text model's is its text part's.

    Raises:
        CheckpointError: no such directory or file, or not a JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        if directory.is_file():
            fix = (
                f"oarsmith convert {directory} OUT"
                if directory.suffix == ".gguf"
                else f"name its directory: {directory.parent}"
            )
            raise CheckpointError("this is a file, not a model directory", where=str(directory), fix=fix)
        what = "no config.json in the directory" if directory.is_dir() else "no such directory"
        raise CheckpointError(what, where=str(directory), fix="check the path to the model")
    config = read_json_object(require_inside(directory, path))
    check_config(config, str(path))
    return from_paddle_config(config) if is_paddle(directory) else families.text_config(config)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse values that no model has and that would cost memory or time before a tensor is compared with them.

    Raises:
        CheckpointError: the first such value, with its key.
    """
    for key, value in config.items():
        at = f"{where}: {key}"
        if isinstance(value, int) and (value > _AT_MOST.get(key, value) or value.bit_length() > _MAX_BITS):
            raise CheckpointError(f"a number of absurd size ({value.bit_length()} bits)", where=at)
        if key in _TEXTS and value is not None and not isinstance(value, str):
            raise CheckpointError(f"{str(value)[:100]} is not a text", where=at)
        names = value if isinstance(value, list) else [None]
        if key in _NAME_LISTS and value is not None and not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{str(value)[:100]} is not a list of names", where=at)
        if isinstance(value, dict):
            check_config(value, at)
