"""Oarsmith: train, fine-tune, merge, convert and run language models with one tool.

The names below are the stable public interface. They are imported when first used: ``import oarsmith`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from oarsmith._version import __version__
from oarsmith.errors import OarsmithError

if TYPE_CHECKING:
    from oarsmith.adapters.merge import merge_adapter
    from oarsmith.adapters.unmerge import unmerge_adapter
    from oarsmith.engine import Engine, Sampling
    from oarsmith.loading import load_model, new_model, save_model
    from oarsmith.text import load_tokenizer

__all__ = [
    "Engine",
    "OarsmithError",
    "Sampling",
    "__version__",
    "load_model",
    "load_tokenizer",
    "merge_adapter",
    "new_model",
    "save_model",
    "unmerge_adapter",
]

_HOME = {
    "Engine": "oarsmith.engine",
    "Sampling": "oarsmith.engine",
    "load_model": "oarsmith.loading",
    "load_tokenizer": "oarsmith.text",
    "merge_adapter": "oarsmith.adapters.merge",
    "new_model": "oarsmith.loading",
    "save_model": "oarsmith.loading",
    "unmerge_adapter": "oarsmith.adapters.unmerge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'oarsmith' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = vars(importlib.import_module(_HOME[name]))[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
