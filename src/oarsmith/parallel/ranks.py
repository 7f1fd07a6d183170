"""What a training step does with other processes: shares, sums of gradients, their norm, whole tensors for files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from oarsmith.checkpoint.fill import empty_decoder
from oarsmith.data.batch import Batch
from oarsmith.models.decoder import Decoder
from oarsmith.parallel import shard
from oarsmith.parallel.mesh import Mesh, Stage
from oarsmith.training.ranks import Pass, squares_of

# Gradients smaller than this are sent together: a message costs more than its bytes.
_SMALL_BYTES, _BUCKET_BYTES = 1 << 20, 32 << 20


@dataclass(frozen=True)
class MeshRanks:
    """The processes of a mesh, each with its part of ``model``. See :class:`oarsmith.training.ranks.Ranks`."""

    mesh: Mesh
    model: Decoder
    stage: Stage
    parameters: Mapping[str, nn.Parameter]

    @staticmethod
    def of(mesh: Mesh, model: Decoder, stage: Stage) -> MeshRanks:
        """Of a model that has been split, before its first pass: between passes FSDP shows whole weights in place of
        parts."""
        return MeshRanks(mesh, model, stage, dict(model.named_parameters()))

    @property
    def is_main(self) -> bool:
        return self.mesh.is_main

    @property
    def alone(self) -> bool:
        return False

    def dealt(self, batches: Iterable[Batch]) -> Iterator[Pass]:
        """Every ``size``-th batch. Who has none in the last round computes another for nothing: others wait for its
        part of the weights."""
        source = iter(batches)
        for first in itertools.count(0, self.mesh.size):
            group = list(itertools.islice(source, self.mesh.size))
            if not group:
                return
            counts = self.mesh.rank < len(group)
            yield Pass(first + self.mesh.rank, group[self.mesh.rank if counts else -1], counts)

    def begin_pass(self, *, last: bool) -> None:
        """Tell FSDP where the step is."""
        if self.stage != "none":
            shard.begin_pass(self.model, self.stage, last=last)

    def end_passes(self) -> None:
        """Weights that backward would have freed are freed: they would be taken for the newest ones."""
        if self.stage != "none":
            shard.free_whole(self.model)

    def local(self, tensor: Tensor) -> Tensor:
        """What of a parameter or gradient lies here."""
        return shard.local_part(tensor)

    def reduced(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all processes that computed a part of them; FSDP has summed what it split."""
        found = dict(grads)
        plain = [name for name in found if not shard.is_split(self.parameters[name])]
        for group in _buckets(plain, grads):
            flat = torch.cat([grads[name].flatten() for name in group]) if len(group) > 1 else grads[group[0]].flatten()
            parts = self.mesh.sum(flat.contiguous()).split([grads[name].numel() for name in group])
            found |= {name: part.view(grads[name].shape) for name, part in zip(group, parts, strict=True)}
        return found

    def squares(self, grads: Mapping[str, Tensor]) -> Tensor:
        """The sum of all squares, each gradient counted once."""
        split = [grad for name, grad in grads.items() if shard.is_split(self.parameters[name])]
        plain = [grad for name, grad in grads.items() if not shard.is_split(self.parameters[name])]
        found = torch.zeros((), dtype=torch.float64, device=self.model.device)
        if split:
            found += self.mesh.sum_over_shards(squares_of(split).double().sum())
        if plain:
            found += squares_of(plain).double().sum()
        return found.cpu()[None]

    def total(self, sums: Sequence[float]) -> list[float]:
        """Sums over the processes that computed different batches."""
        tensor = torch.tensor(sums, dtype=torch.float64, device=self.model.device)
        return [float(value) for value in self.mesh.sum(tensor).tolist()]

    def any(self, here: bool) -> bool:
        """Whether it holds in some process; all ask at the same time."""
        tensor = torch.tensor([float(here)], device=self.model.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return bool(tensor.item() > 0)

    def barrier(self) -> None:
        """Wait for everybody."""
        self.mesh.barrier()

    @torch.no_grad()
    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that lie like their parameters (``{parameter}`` or ``{parameter}/{what}``), together, those that
        were split in the computer's memory. All ask; the main process alone gets them."""
        found = {}
        for name, own in tensors.items():
            whole = shard.whole_of(self._parameter_of(name), own)
            if self.is_main:
                found[name] = whole if whole is own else whole.cpu()
        return found

    @torch.no_grad()
    def own(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of such whole tensors lies here."""
        device = self.model.device
        return {name: shard.own_of(self._parameter_of(name), whole.to(device)) for name, whole in tensors.items()}

    def _parameter_of(self, name: str) -> nn.Parameter:
        return self.parameters[name.partition("/")[0]]

    @torch.no_grad()
    def whole_model(self, model: Decoder) -> Decoder | None:
        """A model of the weights that train, together, in the computer's memory. All ask; the main process gets it.

        What is frozen may have no values: files of adapters do not hold it.
        """
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        if not any(shard.is_split(p) for p in trained.values()):
            return model if self.is_main else None
        whole = self.whole({name: shard.local_part(p).detach() for name, p in trained.items()})
        if not self.is_main:
            return None
        twin = _twin(model)
        parameters = dict(twin.named_parameters())
        for name, tensor in whole.items():
            parameters[name].copy_(tensor)
        return twin

    @torch.no_grad()
    def load_model(self, model: Decoder, load: Callable[[Decoder, Path], None], path: Path) -> None:
        """Give every part the weights that train from files that ``load`` reads into a whole model."""
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        if not any(shard.is_split(p) for p in trained.values()):
            load(model, path)
            return
        twin = _twin(model)
        load(twin, path)
        parameters = dict(twin.named_parameters())
        for name, own in self.own({name: parameters[name].detach() for name in trained}).items():
            shard.local_part(trained[name]).data.copy_(own)


def _twin(model: Decoder) -> Decoder:
    """A model of the same shape on the CPU, without values."""
    dtype = model.embedding.weight.dtype
    twin = empty_decoder(model.spec, model.config, dtype, torch.device("cpu"))
    twin.generation_config, twin.file_names = model.generation_config, dict(model.file_names)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    return twin


def _buckets(names: Sequence[str], grads: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Small neighbours of one dtype together; large ones alone."""
    group: list[str] = []
    size = 0
    for name in names:
        grad = grads[name]
        num_bytes = grad.numel() * grad.element_size()
        if num_bytes >= _SMALL_BYTES:
            yield [name]
            continue
        if group and (size + num_bytes > _BUCKET_BYTES or grads[group[0]].dtype != grad.dtype):
            yield group
            group, size = [], 0
        group.append(name)
        size += num_bytes
    if group:
        yield group
