"""The changes of a linear map and their tensors, apart from its weight.

Shapes: I in features, O out features, R the ranks of all segments of a fused map together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from oarsmith.adapters.change import Change, LowRank, Sitting, Size
from oarsmith.models.decoder import Decoder
from oarsmith.models.spec_parts import LinearSpec, Segment

Sittings = Mapping[str, Sitting]


class Adapted(nn.Module):
    """Changes of some segments of a map, by their names.

    ``adapter[segment][tensor]`` are the adapters' parameters; stacked maps have them stacked, along a leading axis.
    """

    spec: LinearSpec
    changes: dict[str, Change]
    adapter: nn.ModuleDict

    def put_on(self, spec: LinearSpec, changes: Mapping[str, Change]) -> None:
        """Take these changes, with tensors without values.

        Raises:
            ConfigError: a change cannot sit on a projection of its size.
        """
        self.spec, self.changes, self.adapter = spec, dict(changes), nn.ModuleDict()
        lead = () if spec.experts is None else (spec.experts,)
        for segment in spec.segments:
            if (change := self.changes.get(segment.name)) is not None:
                shapes = change.shapes(_size(spec, segment))
                tensors = {name: torch.empty(*lead, *shape) for name, shape in shapes.items()}
                self.adapter[segment.name] = nn.ParameterDict(tensors)

    def sittings(self) -> list[Sittings]:
        """The adapters by the segments they sit on, or those of each expert."""
        sizes = {segment.name: _size(self.spec, segment) for segment in self.spec.segments}
        tables = {name: dict(table.items()) for name, table in self.adapter.items()}  # type: ignore[operator]
        if self.spec.experts is None:
            return [{name: Sitting(sizes[name], tensors) for name, tensors in tables.items()}]
        unbound = {name: {key: t.unbind() for key, t in tensors.items()} for name, tensors in tables.items()}
        return [
            {
                name: Sitting(sizes[name], {key: each[expert] for key, each in tensors.items()})
                for name, tensors in unbound.items()
            }
            for expert in range(self.spec.experts)
        ]

    def stacked(self, sittings: Sittings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A of all segments stacked [R, I], and B as a block-diagonal matrix [O, R]."""
        rows: list[Tensor] = []
        blocks: list[Tensor | None] = []
        for segment in self.spec.segments:
            change = self.changes.get(segment.name)
            if change is None:
                blocks.append(None)
                continue
            assert isinstance(change, LowRank), change
            a, b = change.factors(sittings[segment.name])
            rows.append(a)
            blocks.append(b)
        sizes = (segment.size for segment in self.spec.segments)
        filled = [rows[0].new_zeros(size, 0) if b is None else b for size, b in zip(sizes, blocks, strict=True)]
        a_RI, b_OR = (rows[0], filled[0]) if len(filled) == 1 else (torch.cat(rows), torch.block_diag(*filled))
        return a_RI.to(dtype).contiguous(), b_OR.to(dtype).contiguous()

    @torch.no_grad()
    def begin(
        self, generator: torch.Generator, device: torch.device, weight: Callable[[int, int, int], Tensor]
    ) -> None:
        """Fresh fp32 adapters.

        Args:
            weight: from an expert's number (0: the map itself) and a run of rows to these rows of W, in fp32.
        """
        for table in self.adapter.values():
            assert isinstance(table, nn.ParameterDict)
            for name in table:
                table[name] = nn.Parameter(torch.empty(table[name].shape, dtype=torch.float32, device=device))
        for expert, sittings in enumerate(self.sittings()):
            for segment, start, stop in self.spec.bounds():
                if (change := self.changes.get(segment.name)) is not None:

                    def own(expert: int = expert, start: int = start, stop: int = stop) -> Tensor:
                        return weight(expert, start, stop)

                    change.reset(sittings[segment.name], generator, own)
        for segment_name, change in self.changes.items():
            for name in change.frozen:
                self.adapter[segment_name].get_parameter(name).requires_grad_(False)


def _size(spec: LinearSpec, segment: Segment) -> Size:
    return Size(segment.size, spec.in_features)


def adapted_maps(model: Decoder) -> Iterator[tuple[str, Adapted]]:
    """Every map with a change on it, wherever its weight is, with the paths of their tensors' modules."""
    for path, module in model.named_modules():
        if isinstance(module, Adapted) and module.changes:
            yield path, module
