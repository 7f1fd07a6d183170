"""The language model inside an image and text checkpoint, seen as a checkpoint of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from oarsmith.checkpoint.tensors import TensorSource

# Released files and transformers 4 and 5 in memory: "language_model.model.layers...", "model.language_model.layers...".
_INSIDE = (
    (re.compile(r"language_model\.(?=model\.|lm_head\.)"), ""),
    (re.compile(r"model\.language_model\."), "model."),
)
_OUTSIDE = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")


def text_part(source: TensorSource) -> TensorSource:
    """The tensors of the language model under the names they have without the rest; ``source`` where it is alone."""
    names = {}
    for name in source.shapes:
        found = [new + name[match.end() :] for old, new in _INSIDE if (match := old.match(name)) is not None]
        if not _OUTSIDE.fullmatch(name):
            names[found[0] if found else name] = name
    return source if list(names) == list(source.shapes) else Renamed(source, names)


class Renamed(TensorSource):
    """Some tensors of another source under other names.

    Args:
        names: name -> name in ``inner``.
    """

    def __init__(self, inner: TensorSource, names: Mapping[str, str]) -> None:
        self.directory, self._inner, self._names = inner.directory, inner, dict(names)
        self.shapes = {name: inner.shapes[old] for name, old in names.items()}
        self.dtypes = {name: inner.dtypes[old] for name, old in names.items()}

    def read(self, name: str) -> Tensor:
        return self._inner.read(self._names[name])

    def read_into(self, name: str, target: Tensor) -> None:
        self._inner.read_into(self._names[name], target)

    def close(self) -> None:
        self._inner.close()
