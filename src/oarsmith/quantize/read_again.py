"""How a written model wants its activations, keys and values rounded, for the walk that proves it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from oarsmith.checkpoint.quantized.stored import read_scheme
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.rounding import Activations
from oarsmith.quantize.activations import round_activations
from oarsmith.quantize.pieces import pieces_of
from oarsmith.quantize.proof import Rounding
from oarsmith.quantize.running import rounded_keys
from oarsmith.quantize.walk import Keys, Tap


def rounding_of(directory: Path) -> Rounding:
    """What a checkpoint says, layer by layer.

    Raises:
        CheckpointError: a kind of rounding that is not known, or a scale that is missing.
    """
    stored = read_scheme(directory)

    def rounding(model: Decoder, index: int) -> tuple[dict[str, Tap], Keys | None]:
        names, block = families.find(model.config).names(model.spec), list(model.blocks())[index]
        taps: dict[str, Tap] = {}
        keys: Keys | None = None
        for path, pieces in pieces_of(names, index, block).items():
            # The pieces of a map read the same input.
            stem = pieces[0].stem
            if (how := stored.activations.get(stem)) is not None:
                taps[path] = _rounding(how, stored.input_scales.get(stem))
            module = stem.rpartition(".")[0]
            if stored.cache is not None and module in stored.key_scales:
                keys = rounded_keys(stored.cache, (stored.key_scales[module], stored.value_scales[module]))
        return taps, keys

    return rounding


def _rounding(how: Activations, scale: Tensor | None) -> Tap:
    return lambda x_TI, counts: round_activations(x_TI, how, scale)
