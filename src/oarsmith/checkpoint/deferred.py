"""A decoder whose large weights stay in their files until each is asked for.

Whoever turns them into something of its own (the compiled step packs them) never holds more than one beside that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from oarsmith.checkpoint.fill import check_fits, fill, fill_parameter, match_names, meta_decoder
from oarsmith.checkpoint.quantized.base import CodedSource
from oarsmith.checkpoint.quantized.kept import Parts, stored_parts
from oarsmith.checkpoint.source import open_model
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.names import NameMap, Place
from oarsmith.models.spec import linear_specs

_ENDS = ("embedding.weight", "head.weight")


class WeightFiles:
    """Where the weights of a decoder lie that have no memory yet."""

    def __init__(self, model: Decoder, names: NameMap, source: TensorSource) -> None:
        self._source, self._file_names = source, match_names(names, source)
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.is_meta}
        self._places: dict[nn.Parameter, list[Place]] = {parameter: [] for parameter in own.values()}
        for place in names.places:
            if place.parameter in own:
                self._places[own[place.parameter]].append(place)

    def codes(self, parameter: nn.Parameter) -> list[Parts] | None:
        """What the files hold of a quantized weight [O, I], or of each of stacked ones; None: floats, or codes that do
        not lie row by row.

        Raises:
            CheckpointError: its parts contradict each other.
        """
        return stored_parts(self._places[parameter], self._file_names, self._source)

    def floats(self, parameter: nn.Parameter) -> Tensor:
        """A weight in the dtype that the decoder would have it in.

        Raises:
            CheckpointError: its parts contradict each other.
        """
        memory = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        fill_parameter(memory, self._places[parameter], self._file_names, self._source)
        return memory.data


def has_codes(directory: Path) -> bool:
    """Whether a checkpoint holds weights as codes with scales.

    Raises:
        OarsmithError: it cannot be read.
    """
    with open_model(directory)[1] as source:
        return isinstance(source, CodedSource) and source.has_codes


@contextmanager
def deferred_decoder(directory: Path) -> Iterator[tuple[Decoder, WeightFiles]]:
    """A checkpoint's decoder, and its weights of linear maps, embedding and head, which are on the meta device.

    Raises:
        OarsmithError: as `load_decoder`.
    """
    config, opened = open_model(directory)
    with opened as source, torch.no_grad():
        family, spec = families.build_spec(config)
        names = family.names(spec)
        model = meta_decoder(spec, config, source.stored_dtype())
        check_fits(model, names, source)
        fill(model, names, source, later={*_ENDS, *(f"{path}.weight" for path, _ in linear_specs(spec))})
        yield model.eval(), WeightFiles(model, names, source)
