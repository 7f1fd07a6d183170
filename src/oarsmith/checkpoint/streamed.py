"""Logits of a model on disk with one layer in memory at a time, to compare two checkpoints of any size.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.checkpoint.fill import fill_parameter, match_names, meta_decoder
from oarsmith.checkpoint.source import open_model
from oarsmith.checkpoint.tensors import TensorSource
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.layout import Layout
from oarsmith.models.names import NameMap, Place
from oarsmith.models.spec import DecoderSpec, PrefixLM

_NUM_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Difference:
    """How two models answer the same tokens: largest logit difference, mean KL divergence (nats), same best token."""

    max_logit: float
    kl: float
    top1: float

    @property
    def none(self) -> bool:
        return self.max_logit == 0.0


class Streamer:
    """Gives modules of a meta decoder their weights and takes them away again.

    Memory goes from one layer to the next: freed and allocated anew it comes apart between the activations, and the
    process grows by a layer each time (measured: 1.3 GB for a model whose layers have 50 MB).
    """

    def __init__(self, model: Decoder, names: NameMap, source: TensorSource) -> None:
        self.model, self.source = model, source
        self.file_names = match_names(names, source)
        self.places: dict[str, list[Place]] = {}
        for place in names.places:
            self.places.setdefault(place.parameter, []).append(place)
        self._spare: dict[torch.Size, list[Tensor]] = {}

    @contextmanager
    def loaded(self, *paths: str) -> Iterator[None]:
        """The modules have their weights inside the block."""
        modules = [(path, self.model.get_submodule(path)) for path in paths]
        for path, module in modules:
            _swap(module, self._take)
            for name, parameter in module.named_parameters():
                fill_parameter(parameter, self.places[f"{path}.{name}"], self.file_names, self.source)
        yield
        for path, module in modules:
            _swap(module, self._give_back if path.startswith("layers.") else lambda parameter: parameter.to("meta"))

    def _take(self, parameter: Tensor) -> Tensor:
        spare = self._spare.get(parameter.shape)
        return spare.pop() if spare else torch.empty(parameter.shape)

    def _give_back(self, parameter: Tensor) -> Tensor:
        self._spare.setdefault(parameter.shape, []).append(parameter)
        return parameter.to("meta")


def _swap(root: nn.Module, new: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter's tensor."""
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(new(parameter.detach()), requires_grad=False))


@torch.no_grad()
def streamed_logits(directory: Path, ids_T: Tensor) -> Tensor:
    """Logits [T, V] in float32 of a token sequence under the model in a directory.

    Raises:
        OarsmithError: the model cannot be read.
    """
    config, opened = open_model(directory)
    with opened as source:
        family, spec = families.build_spec(config)
        model = meta_decoder(spec, config, torch.float32).eval()
        streamer = Streamer(model, family.names(model.spec), source)
        layout = Layout.documents([0, len(ids_T)], torch.arange(len(ids_T)))
        with _one_by_one(streamer, ["embedding", *(f"layers.{index}" for index in range(len(spec.layers)))]):
            hidden_TD = model.hidden(ids_T, layout)
        last = [name for name in ("final_norm", "head") if name in dict(model.named_children())]
        with streamer.loaded(*last, *(["embedding"] if spec.head.tied else [])):
            return model.logits(hidden_TD).float()


@contextmanager
def _one_by_one(streamer: Streamer, paths: Sequence[str]) -> Iterator[None]:
    """Modules get their weights when they are called and lose them when they return."""
    current = ExitStack()
    handles = []
    for path in paths:

        def enter(module: nn.Module, args: object, path: str = path) -> None:
            current.enter_context(streamer.loaded(path))

        def leave(module: nn.Module, args: object, output: object) -> None:
            current.close()

        handles.append(streamer.model.get_submodule(path).register_forward_pre_hook(enter))
        handles.append(streamer.model.get_submodule(path).register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_tokens(spec: DecoderSpec) -> Tensor:
    """Token ids spread over the vocabulary: no text is needed, two models either agree on them or not."""
    ids_T = (torch.arange(_NUM_PROBE_TOKENS) * 7919 + 11) % spec.vocab_size
    if isinstance(spec.visibility, PrefixLM):  # such a model generates after its own two tokens only
        ids_T[-5], ids_T[-4] = spec.visibility.mask_ids[0], spec.visibility.start_id
    return ids_T


def difference(a_TV: Tensor, b_TV: Tensor) -> Difference:
    """How the logits ``b`` differ from ``a``. NaN equals NaN: a broken model is converted as it is."""
    same = (a_TV == b_TV) | (a_TV.isnan() & b_TV.isnan())
    gap = torch.where(same, torch.zeros_like(a_TV), (a_TV - b_TV).abs().nan_to_num(nan=float("inf")))
    kl = functional.kl_div(b_TV.log_softmax(-1), a_TV.log_softmax(-1), log_target=True, reduction="batchmean")
    agree = (a_TV.argmax(-1) == b_TV.argmax(-1)).float().mean()
    return Difference(float(gap.max()), max(float(kl), 0.0), float(agree))
