"""An adapter on a model's files: each tensor with what the adapter does to it, one at a time.

The arithmetic is that of the adapters themselves (``Change.merged``), so every method that is some change of single
projections can be merged without a decoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from oarsmith.adapters.change import Change, Sitting, Size
from oarsmith.adapters.methods import find_method
from oarsmith.adapters.peft_config import read_adapter_config
from oarsmith.adapters.peft_layout import PREFIX, SHARED, WEIGHTS, require_base
from oarsmith.checkpoint.files import require_inside
from oarsmith.checkpoint.hf import projection_places
from oarsmith.checkpoint.safetensors_source import SafetensorsSource
from oarsmith.errors import CheckpointError
from oarsmith.models.names import NameMap, transposed


class AdapterOverlay:
    """The adapter of a directory, on a model of these names.

    Raises:
        CheckpointError: an adapter of another base, one that changes more than single projections, or one that no plain
            weight is.
    """

    def __init__(self, directory: Path, base: Path, names: NameMap) -> None:
        config = read_adapter_config(directory)
        self._method = find_method(config)
        self._directory, self._config = directory, config
        self._source = SafetensorsSource(require_inside(directory, directory / WEIGHTS))
        require_base(directory, base)
        places, biases = projection_places(names), {place.file for place in names.places}
        endings = sorted(self._method.change.keys.values(), key=len, reverse=True)
        self._stored: dict[str, dict[str, str]] = {}
        for key in self._source.shapes:
            ending = next((one for one in endings if key.endswith(f".{one}")), None)
            module = key.removeprefix(PREFIX).removesuffix(f".{ending}")
            if ending is None or module not in places or (key.startswith(SHARED) and not key.startswith(PREFIX)):
                raise self._refused(f"tensor {key} is no change of a projection")
            if self._method.change.scales_output and f"{module}.bias" in biases:
                raise self._refused(f"{self._method.name} changes the bias of {module} too")
            self._stored.setdefault(f"{module}.weight", {})[ending] = key
        self._turned = {f"{module}.weight" for module, place in places.items() if place.view is transposed}
        if not self._method.change.mergeable:
            raise self._refused(f"{self._method.name} is no change of weights")

    def _refused(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{what}, so this adapter is not merged tensor by tensor",
            where=str(self._directory),
            fix=f"put it into its model first: oarsmith merge-adapter {self._directory} OUT",
        )

    @torch.no_grad()
    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with the adapter in it, in float32; as it is where the adapter does not sit on it."""
        if name not in self._stored:
            return tensor
        turned = name in self._turned
        weight_OI = tensor.float().t().contiguous() if turned else tensor.float()
        stored = {ending: self._source.read(key) for ending, key in self._stored[name].items()}
        module = name.removesuffix(".weight")
        change = self._method.read(self._config, module, {ending: tuple(t.shape) for ending, t in stored.items()})
        self._require_plain(change)
        size = Size(weight_OI.shape[0], weight_OI.shape[1])
        on = Sitting(size, {key: torch.empty(shape) for key, shape in change.shapes(size).items()})
        for ending, own in change.stored(on).items():
            if ending not in stored or stored[ending].shape != own.shape:
                raise CheckpointError(
                    f"the adapter's {ending} on {module} does not fit a weight of {tuple(weight_OI.shape)}",
                    where=str(self._directory),
                    fix="use the adapter's own base model",
                )
        change.restore(on, {ending: one.float() for ending, one in stored.items()})
        merged_OI = change.merged(on, weight_OI)
        return merged_OI.t().contiguous() if turned else merged_OI

    def _require_plain(self, change: Change) -> None:
        if change.shared() or change.made_of_weight:
            raise self._refused(f"{self._method.name} holds more than a change of each weight")

    def close(self) -> None:
        self._source.close()
