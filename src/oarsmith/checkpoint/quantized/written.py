"""A quantized checkpoint written again with other weights, on the scales and zeros that it has."""

from __future__ import annotations

import shutil
from pathlib import Path

from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.hf import iter_named
from oarsmith.checkpoint.quantized.base import CodedSource
from oarsmith.checkpoint.quantized.unpacked import unpacked
from oarsmith.checkpoint.safetensors_stream import SAFETENSORS_DTYPES, ShardedSafetensorsWriter, TensorInfo
from oarsmith.checkpoint.source import open_source
from oarsmith.errors import CheckpointError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.families.naming import SCORE

_DTYPES = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}
_NOTES = ("config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def write_requantized(base: Path, model: Decoder, folder: Path) -> None:
    """Write config.json and safetensors in the layout of the directory ``base``, with the weights of ``model``.

    Scales and zeros stay, and each number goes to the nearest step: a weight that has not changed is the same bit for
    bit, and a change of less than half a step is lost. Tensors that are no weights of the model are copied.

    Raises:
        CheckpointError: there are no quantized weights in ``base``, or their format is not written.
    """
    raw = open_source(base)
    with unpacked(read_config(base), raw)[1] as source:
        codes = source.code_names() if isinstance(source, CodedSource) else {}
        if not isinstance(source, CodedSource) or not codes:
            raise CheckpointError("there are no quantized weights whose codes could be written", where=str(base))
        if not model.spec.head.tied and families.build_spec(read_config(base))[1].head.tied:
            raise CheckpointError(
                "merging gave the head a matrix of its own, for which the quantized layout has no place",
                where=str(base),
                fix="merge without requantize",
            )
        weights = dict(iter_named(model, families.find(model.config).names(model.spec)))
        if SCORE in weights.keys() - source.shapes.keys():
            what = "a reward model's head of scores has no place in the layout of a base that writes"
            raise CheckpointError(what, where=str(base), fix="merge without requantize")
        if not weights.keys() <= source.shapes.keys():
            raise CheckpointError("the language model of a larger one is not quantized again", where=str(base))
        unknown = sorted(name for name, code in raw.dtypes.items() if code not in _DTYPES)
        if unknown:
            raise CheckpointError(f"{unknown[0]} is stored as {raw.dtypes[unknown[0]]}", where=str(base))
        infos = {name: TensorInfo(_DTYPES[raw.dtypes[name]], shape) for name, shape in raw.shapes.items()}
        with ShardedSafetensorsWriter(folder, infos) as writer:
            for name, info in infos.items():
                if name in codes:
                    tensor = source.recoded(codes[name], weights[codes[name]].float())
                else:
                    tensor = weights[name] if name in weights else raw.read(name)
                writer.write(name, tensor.to(info.dtype).reshape(info.shape).contiguous())
    for note in _NOTES:
        if (base / note).is_file():
            shutil.copyfile(base / note, folder / note)
