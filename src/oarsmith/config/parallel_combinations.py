"""Combinations that a run of several processes cannot do (see ``combinations.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oarsmith import processes

from .adapters import AdapterKeys
from .groups import EvalRowKeys
from .impossible import Impossible
from .policy import PolicyConfig
from .train import TrainConfig


def _several(c: TrainConfig) -> bool:
    return processes.count() > 1 or c.spreads


def _spread(when: Callable[[Any], bool], reason: str, fix: str, keys: type[Any] = TrainConfig) -> Impossible[Any]:
    """A combination that one process can do."""
    return Impossible(keys, lambda c: isinstance(c, TrainConfig) and _several(c) and when(c), reason, fix)


def _over_one(key: str) -> Callable[[TrainConfig], bool]:
    return lambda c: int(dict(c)[key]) > 1


def _splits_weights(c: TrainConfig) -> bool:
    return c.sharding != "none"


SPREAD: tuple[Impossible[Any], ...] = (
    _spread(
        lambda c: c.nnodes != "1" and c.rdzv_endpoint is None,
        "nnodes {nnodes}: the machines do not know where to meet",
        "give rdzv_endpoint HOST:29500 with the name of one of them, the same on each",
    ),
    *(
        _spread(
            _over_one(key),
            f"{key} {{{key}}}: splitting {what} over processes is not built yet",
            "set it to 1, and split the model with sharding",
        )
        for key, what in (
            ("pipeline_parallel_degree", "the layers"),
            ("tensor_parallel_degree", "heads and columns"),
            ("context_parallel_degree", "the tokens of a stream"),
        )
    ),
    _spread(
        lambda c: True,
        "learning from rewards on several processes is not built yet",
        "start one process; it uses all cores of this machine",
        PolicyConfig,
    ),
    _spread(
        lambda c: c.optimizer_in_backward,
        "optimizer_in_backward updates weights before other processes' gradients are there",
        "set it to false; sharding stage2 frees gradients too",
    ),
    _spread(
        lambda c: c.optim != "adamw" and _splits_weights(c) and not (isinstance(c, AdapterKeys) and c.has_adapter),
        "optim {optim} looks at whole matrices, which sharding splits",
        "set optim to adamw, or sharding to none",
    ),
    _spread(
        lambda c: c.dtype == "fp16",
        "fp16 with its loss scale is for one process",
        "set dtype to bf16",
    ),
    _spread(
        lambda c: c.torch_compile and _splits_weights(c),
        "torch_compile with weights that are split is not built yet",
        "set torch_compile to false",
    ),
    _spread(
        lambda c: c.offload_optim and _splits_weights(c),
        "offload_optim with weights that are split is not built yet",
        "set offload_optim to false: sharding already splits the states",
    ),
    _spread(
        lambda c: c.eval_with_do_generation,
        "eval_with_do_generation generates in one process",
        "set it to false, and run oarsmith eval on the result",
        EvalRowKeys,
    ),
)
