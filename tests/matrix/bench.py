"""What every cell of a row works on: a random model of the row on disk, and documents that suit it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import oarsmith
from oarsmith.checkpoint.hf import load_decoder
from oarsmith.data.batch import Batch, make_batch
from oarsmith.data.samples import Sample
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.models.spec import PrefixLM

from .rows import FIXTURES, Row

# Ids from 3 to 280: no special token of any row, and the few that stand for padding at its start.
FIRST_ID, LAST_ID = 4, 280


class Bench:
    """A row's model and what is made of it, each made once."""

    def __init__(self, name: str, row: Row, folder: Path) -> None:
        self.name = name
        self.row = row
        self.folder = folder

    @cached_property
    def path(self) -> Path:
        """The row's config.json with random weights: biases and norms too, since zeros and ones hide missing terms."""
        return self.write("model", self.row.config)

    def write(self, name: str, config: Mapping[str, Any]) -> Path:
        """A model directory of this config."""
        model = Decoder(families.build_spec(config)[1], config)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                centre = 1.0 if "norm" in key else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
            if self.row.repeated_head:
                model.head.weight.copy_(model.embedding.weight)
        oarsmith.save_model(model, self.folder / name)
        return self.folder / name

    @cached_property
    def _loaded(self) -> Decoder:
        return load_decoder(self.path, dtype=torch.float32).eval()

    def model(self) -> Decoder:
        """A copy of its own."""
        return deepcopy(self._loaded)

    @cached_property
    def oracle(self) -> Any:
        """The same files in transformers, which has to find every tensor it needs and none besides."""
        import transformers

        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            self.path, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        odd = {key: sorted(names) for key, names in report.items() if names and key.endswith("_keys")}
        assert not odd, odd
        return model.eval()

    @property
    def fixture(self) -> Path | None:
        return None if self.row.fixture is None else FIXTURES / "families" / self.row.fixture

    @property
    def prefix_rule(self) -> PrefixLM | None:
        rule = self._loaded.spec.visibility
        return rule if isinstance(rule, PrefixLM) else None

    def document(self, length: int, seed: int) -> list[int]:
        """Random ids; a model with prefixes gets one of a third of the length, ended by its mask and start tokens."""
        ids = np.random.default_rng(seed).integers(FIRST_ID, LAST_ID, size=length).tolist()
        if self.prefix_rule is not None:
            third = max(length // 3, 1)
            ids[third : third + 2] = [self.prefix_rule.mask_ids[0], self.prefix_rule.start_id]
        return ids

    def sample(self, length: int, seed: int) -> Sample:
        """A document of which some tokens carry no loss, and some half of one."""
        weights = np.random.default_rng(seed + 1000).choice([0.0, 1.0, 0.5], size=length, p=[0.3, 0.6, 0.1])
        weights[-1] = 1.0
        return Sample(np.array(self.document(length, seed), np.int32), weights.astype(np.float32), f"random:{seed}")

    @cached_property
    def samples(self) -> list[Sample]:
        """Longer and shorter than the windows and original contexts of the rows."""
        return [self.sample(length, seed) for seed, length in enumerate((23, 6, 41))]

    @property
    def batch(self) -> Batch:
        return make_batch(self.samples)


@torch.no_grad()
def packed_logits(model: Decoder, documents: list[list[int]]) -> list[Tensor]:
    """Logits of each document, all in one stream."""
    ids = torch.tensor([token for document in documents for token in document])
    lengths = [len(document) for document in documents]
    bounds = [0, *np.cumsum(lengths).tolist()]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return list(model.logits(model.hidden(ids, Layout.documents(bounds, positions))).split(lengths))


def files(folder: Path) -> dict[str, tuple[torch.dtype, Tensor]]:
    """Name -> (dtype, tensor) of every tensor of a model directory, read without our code."""
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(folder.glob("pytorch_model*.bin")):
        found |= torch.load(path, weights_only=True)
    return {name: (tensor.dtype, tensor) for name, tensor in found.items()}
