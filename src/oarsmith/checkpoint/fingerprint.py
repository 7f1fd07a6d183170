"""What tells one model's weights from another's, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from oarsmith.checkpoint.source import open_model
from oarsmith.checkpoint.tensors import FLOATS
from oarsmith.models import families

_PIECES, _PIECE = 8, 64


def fingerprint(directory: Path) -> str:
    """A hash of every tensor's name and shape and of 512 of its numbers, in bf16: the same for every format and dtype
    that a model is stored in, another one after any training that changes whole tensors.

    Raises:
        OarsmithError: no model in the directory, or a damaged one.
    """
    config, opened = open_model(directory)
    family, spec = families.build_spec(config)
    names = family.names(spec)
    found = hashlib.sha256()
    with opened as source:
        places = {place.file for place in names.places}
        for name in sorted(source.shapes):
            full = name if name in places else names.optional_prefix + name
            if full in places and source.dtypes[name] in FLOATS:
                found.update(f"{full} {source.shapes[name]}\n".encode())
                sample = source.sample(name, _PIECES, _PIECE).to(torch.bfloat16)
                found.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
