"""Several adapters over one decoder: the rows of a call go through different ones, or through none.

Shapes: T tokens, I in features, O out features, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from oarsmith.adapters.change import Change
from oarsmith.adapters.linear import AdaptedLinear, Changed, One, adapted_modules, is_low_rank
from oarsmith.adapters.peft_layout import WEIGHTS, adapter_rewrite, load_adapter_weights
from oarsmith.checkpoint.fill import meta_decoder
from oarsmith.checkpoint.safetensors_stream import check_safetensors
from oarsmith.errors import CheckpointError, ConfigError
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.models.spec import DecoderSpec, linear_specs, rewrite_linears
from oarsmith.models.spec_parts import MLA, LinearSpec

Pair = tuple[Tensor, Tensor]
"""A [R, I] and B [O, R] of a whole linear map, its scale in B; or with a leading axis of experts."""

Entry = Pair | Sequence[Changed]
"""What an adapter does to a map: such a pair, or whatever its method does, for each expert."""

Rows = tuple[str, int, int | None]
"""An adapter's name, and the first row of those that go through it and the row after the last; None: to the end."""


class AdapterBank:
    """The adapters of a decoder.

    Attributes:
        decoder: computes with them; it is the given one as long as there are none, and else shares its weights.
        apart: an adapter's maps see other rows than a call's tokens (routed experts, keys made of a cache of latents),
            so a call must be one adapter's alone.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.apart = False
        self._base = decoder
        self._maps: dict[str, Mapping[str, Entry]] = {}
        self._versions: dict[str, int] = {}
        self._num_added = 0
        self._current: list[Rows] = []

    @property
    def names(self) -> list[str]:
        return list(self._maps)

    def add(self, name: str, parts: Sequence[tuple[Path, float]]) -> None:
        """Take an adapter in PEFT's layout under a name; or several, each with a weight, whose updates are added up.

        Raises:
            ConfigError: the name is taken, there is no part, or one with a weight does more than to add a product.
            CheckpointError: the adapter cannot be read, or does not fit the decoder.
        """
        if name in self._maps:
            raise ConfigError(f"there is an adapter {name!r} already", where="adapter", fix="remove it first")
        self._maps[name] = _together([(_read(directory, self._base), weight) for directory, weight in parts])
        self._num_added += 1
        self._versions[name] = self._num_added
        self._build()

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ConfigError: there is none of this name.
        """
        self.version(name)
        del self._maps[name], self._versions[name]
        self._build()

    def version(self, name: str) -> int:
        """A number that no adapter before it had, whatever its name.

        Raises:
            ConfigError: there is none of this name.
        """
        if name not in self._versions:
            known = f"known: {', '.join(self._maps)}" if self._maps else "there is none at all"
            raise ConfigError(f"there is no adapter {name!r}", where="adapter", fix=known)
        return self._versions[name]

    @contextmanager
    def rows(self, rows: Sequence[Rows]) -> Iterator[None]:
        """Within it these rows of a call go through these adapters, and the others through none."""
        self._current = list(rows)
        try:
            yield
        finally:
            self._current = []

    def adapted(self, path: str, base: Linear, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """What a map gives (in place), where the adapters of its rows change it."""
        for name, start, stop in self._current:
            entry = self._maps[name].get(path)
            if isinstance(entry, tuple):
                a_RI, b_OR = entry
                y_TO[start:stop].addmm_(x_TI[start:stop] @ a_RI.t(), b_OR.t())
            elif entry is not None:
                y_TO[start:stop] = _through(entry[0], base, None, x_TI[start:stop], y_TO[start:stop])
        return y_TO

    def adapted_experts(self, path: str, base: Linear, x_TI: Tensor, y_TO: Tensor, counts: Sequence[int]) -> Tensor:
        """The same for stacked maps, where all rows go through one adapter."""
        for name, *_ in self._current:
            entry = self._maps[name].get(path)
            parts = zip(x_TI.split(list(counts)), y_TO.split(list(counts)), strict=True)
            if isinstance(entry, tuple):
                for (x, y), a_RI, b_OR in zip(parts, *map(torch.unbind, entry), strict=True):
                    y.addmm_(x @ a_RI.t(), b_OR.t())
            elif entry is not None:
                for expert, ((x, y), own) in enumerate(zip(parts, entry, strict=True)):
                    if len(x):
                        y.copy_(_through(own, base, expert, x, y))
        return y_TO

    def _build(self) -> None:
        """The decoder with a place for adapters on each map that one of them sits on."""
        paths = {path for maps in self._maps.values() for path in maps}
        specs = dict(linear_specs(self._base.spec))
        latent = {f"layers.{i}.attention.kv_up" for i, x in enumerate(_attentions(self._base.spec)) if x}
        self.apart = any(specs[path].experts is not None or path in latent for path in paths)
        if not paths:
            self.decoder = self._base
            return

        def rule(path: str, linear: LinearSpec) -> LinearSpec:
            return replace(linear, rewrite=Banked(bank=self, path=path)) if path in paths else linear

        spec = rewrite_linears(self._base.spec, rule)
        self.decoder = meta_decoder(spec, self._base.config, self._base.embedding.weight.dtype).eval()
        _share(self.decoder, self._base)


def _attentions(spec: DecoderSpec) -> list[bool]:
    """For each layer, whether its keys are made of latents."""
    return [isinstance(layer.attention, MLA) for layer in spec.layers]


@dataclass(frozen=True, kw_only=True)
class Banked:
    """Rewrites a linear map: the map that is there (``BankedLinear.base``), and what the adapters of a bank add."""

    bank: AdapterBank = field(compare=False)
    path: str

    def build(self, spec: LinearSpec) -> BankedLinear:
        return BankedLinear(spec, self)


class BankedLinear(Linear):
    """A linear map under the adapters of a bank. Its weight is that of ``base``, which is another decoder's module."""

    base: Linear

    def __init__(self, spec: LinearSpec, banked: Banked) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self._bank = banked.bank
        self._path = banked.path

    def forward(self, x_TI: Tensor, counts: Sequence[int] = ()) -> Tensor:
        """``counts``: for stacked maps, how many rows of x go through each."""
        if self.spec.experts is None:
            return self._bank.adapted(self._path, self.base, x_TI, self.base(x_TI))
        return self._bank.adapted_experts(self._path, self.base, x_TI, self.base(x_TI, counts), counts)


def _share(target: nn.Module, source: nn.Module) -> None:
    """Let a module on meta have the parts of another one: modules where nothing in them is rewritten, else their
    parameters."""
    for name, child in source.named_children():
        place = target.get_submodule(name)
        if isinstance(place, BankedLinear):
            assert isinstance(child, Linear), name
            place.base = child
        elif any(isinstance(inner, BankedLinear) for inner in place.modules()):
            _share(place, child)
        else:
            setattr(target, name, child)
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, parameter)


def _through(changed: Changed, base: Linear, expert: int | None, x_TI: Tensor, y_TO: Tensor) -> Tensor:
    """What the base, or one expert of it, gives with these changes; y is what it gives without."""
    if isinstance(base, AdaptedLinear):
        return _through_adapted(changed, base, base.ones()[expert or 0], x_TI, y_TO)
    # An index of Ellipsis is the whole tensor.
    index = ... if expert is None else expert
    weight_OI, bias_O = base.weight[index], None if base.bias is None else base.bias[index]

    def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
        return functional.linear(x, weight_OI[start:stop], None if bias_O is None else bias_O[start:stop])

    def weight_of(start: int, stop: int) -> Tensor:
        return weight_OI[start:stop].float()

    return changed(x_TI, y_TO, bias_O, rows_of, weight_of, training=False)


def _through_adapted(changed: Changed, base: AdaptedLinear, one: One, x_TI: Tensor, y_TO: Tensor) -> Tensor:
    """The same over a map that has an adapter of its own, or a weight in another form."""
    weight_OI, bias_O = base.merged_one(one) if _scales(changed.changes) else (None, None)

    def rows_of(x: Tensor, start: int, stop: int) -> Tensor:
        return base.through(x, one)[..., start:stop]

    def weight_of(start: int, stop: int) -> Tensor:
        assert weight_OI is not None, changed.changes
        return weight_OI[start:stop]

    bias_O = None if bias_O is None else bias_O.to(y_TO.dtype)
    return changed(x_TI, y_TO, bias_O, rows_of, weight_of, training=False)


def _scales(changes: Mapping[str, Change]) -> bool:
    return any(change.scales_output for change in changes.values())


def _read(directory: Path, decoder: Decoder) -> Mapping[str, Entry]:
    """What an adapter does to each map, where the decoder is and in its dtype."""
    rewrite = adapter_rewrite(directory)
    # PEFT stores biases that were trained beside an adapter under their own names.
    stored = check_safetensors(directory / WEIGHTS)
    others = [name for name in stored if name.endswith(".bias") and ".lora_" not in name]
    if others:
        raise CheckpointError(
            f"tensor {others[0]}: biases of the base cannot be changed for single requests",
            where=str(directory / WEIGHTS),
            fix="load the model with this adapter on top (adapter=)",
        )
    plain = rewrite_linears(decoder.spec, lambda _, linear: replace(linear, rewrite=None))
    spec = rewrite(families.find(decoder.config), plain)
    model = meta_decoder(spec, decoder.config, torch.float32)
    for _, module in adapted_modules(model):
        for table in module.adapter.values():
            assert isinstance(table, nn.ParameterDict)
            for name in table:
                table[name] = nn.Parameter(torch.empty(table[name].shape), requires_grad=False)
    load_adapter_weights(model, directory)
    for path, module in adapted_modules(model):
        under = decoder.get_submodule(path)
        own = under.changes.values() if isinstance(under, AdaptedLinear) else ()
        if _scales(module.changes) and not all(change.mergeable for change in own):
            raise ConfigError(
                f"{path} has an adapter that cannot be merged, and one over it would look at the merged weight",
                where="adapter",
                fix="serve the base without its adapter, and give both by name",
            )
    weight = decoder.embedding.weight
    return {path: _entry(module, weight) for path, module in adapted_modules(model)}


def _together(parts: Sequence[tuple[Mapping[str, Entry], float]]) -> Mapping[str, Entry]:
    """Several adapters as one: A stacked, and B beside each other."""
    if not parts:
        raise ConfigError("no adapter is given", where="adapter", fix="name a folder")
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for maps, weight in parts:
        for path, entry in maps.items():
            if not isinstance(entry, tuple):
                what = (
                    "an adapter that does more than to add a product of matrices cannot be weighted or added to others"
                )
                raise ConfigError(what, where="adapter", fix="give it alone, or use LoRA and its relatives")
            pairs.setdefault(path, []).append((entry[0], entry[1] * weight))
    return {
        path: (torch.cat([a for a, _ in own], -2), torch.cat([b for _, b in own], -1)) for path, own in pairs.items()
    }


def _entry(module: AdaptedLinear, like: Tensor) -> Entry:
    with torch.no_grad():
        if all(is_low_rank(change, training=False) for change in module.changes.values()):
            pairs = [module.stacked(sittings, like.dtype) for sittings in module.sittings()]
            if module.spec.experts is None:
                return pairs[0][0].to(like.device), pairs[0][1].to(like.device)
            a, b = map(torch.stack, zip(*pairs, strict=True))
            return a.to(like.device), b.to(like.device)
        module.adapter.to(like.device)
        return [Changed(module.spec, module.changes, sittings) for sittings in module.sittings()]
