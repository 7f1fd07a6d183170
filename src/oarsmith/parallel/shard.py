"""Parameters, gradients and optimizer states split over processes: FSDP2 over the axes ``replicate`` and ``shard``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from oarsmith.models.decoder import Decoder
from oarsmith.parallel.mesh import AXES, Mesh, Stage


def shard(model: Decoder, mesh: Mesh, stage: Stage) -> None:
    """Split what the model holds over the axis ``shard``: a block at a time, then what is left.

    Where only some parameters train, those stay whole: they are small, and what adapters do to them needs all of them.

    Args:
        stage: ``stage3``: weights lie split between uses. ``stage2``: whole from the first use to the end of backward,
            gradients split after every pass. ``stage1``: gradients split after the last pass of a step.
    """
    assert mesh.device_mesh is not None, "one process has nothing to split"
    axes = AXES if mesh.degrees.replicate > 1 else AXES[1:]
    trained = {p for p in model.parameters() if p.requires_grad}
    some_frozen = len(trained) < sum(1 for _ in model.parameters())
    odd = {p for p in model.parameters() if not p.is_floating_point() or p.dim() == 0}
    dtypes = {p.dtype for p in model.parameters()}
    policy = MixedPrecisionPolicy(
        reduce_dtype=torch.float32 if dtypes - {torch.float32} else None, cast_forward_inputs=False
    )
    device_mesh, ignored = mesh.device_mesh[axes], odd | trained if some_frozen else odd

    def unit(module: nn.Module, *, free: bool) -> None:
        fully_shard(module, mesh=device_mesh, reshard_after_forward=free, mp_policy=policy, ignored_params=ignored)

    for block in model.blocks():
        unit(block, free=stage == "stage3")
    unit(model, free=False)
    register_fsdp_forward_method(model, "hidden")
    for module in sharded_modules(model):
        # A plain sum, on gloo too: the loss is already divided by the count of the whole step.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: Decoder) -> Iterator[FSDPModule]:
    """The units that FSDP gathers and frees together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def begin_pass(model: Decoder, stage: Stage, *, last: bool) -> None:
    """Tell FSDP whether another pass of the step follows: in stage 1 its gradients stay whole until then."""
    assert isinstance(model, FSDPModule), type(model)
    if stage == "stage1":
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    model.set_is_last_backward(last)


def free_whole(model: Decoder) -> None:
    """Free what a forward pass without a backward pass has left whole."""
    for module in sharded_modules(model):
        module.reshard()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor lies here: a parameter stays one, in the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor
    own = tensor.to_local().detach()
    return nn.Parameter(own, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def is_split(tensor: torch.Tensor) -> bool:
    """Whether FSDP has split it."""
    return isinstance(tensor, DTensor)


def whole_of(parameter: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A tensor that lies as the parameter does, together: every process of the axis must ask.

    Args:
        own: what of it lies here.
    """
    if not isinstance(parameter, DTensor):
        return own
    both = DTensor.from_local(
        own,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return both.full_tensor()


def own_of(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The part of ``whole`` that lies here, as the parameter's does."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
