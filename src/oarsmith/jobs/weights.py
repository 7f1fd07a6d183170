"""The trained weights of a run as files: a whole model, or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oarsmith.adapters.peft_layout import load_adapter_weights, write_adapter
from oarsmith.checkpoint.fill import fill
from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.checkpoint.hf import write_decoder
from oarsmith.checkpoint.source import open_source
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How trained weights are written into a directory and read back; ``name`` is that of the result's folder."""

    name: str
    write: Callable[[Decoder, Path], None]
    load: Callable[[Decoder, Path], None]


def whole_model(tokenizer: Tokenizer) -> Weights:
    """A Hugging Face directory."""

    def write(model: Decoder, folder: Path) -> None:
        write_decoder(model, folder)
        tokenizer.save(folder)

    def load(model: Decoder, folder: Path) -> None:
        with open_source(folder) as source:
            fill(model, families.find(model.config).names(model.spec), source)

    return Weights(name="model", write=write, load=load)


def adapter(base: Path, tokenizer: Tokenizer) -> Weights:
    """PEFT's layout; ``base`` is the model it belongs to."""

    base_hash = fingerprint(base)

    def write(model: Decoder, folder: Path) -> None:
        write_adapter(model, folder, base=str(base.resolve()), base_hash=base_hash)
        tokenizer.save(folder)

    return Weights(name="adapter", write=write, load=load_adapter_weights)
