"""Decoders without values, and filling them from a source of tensors through the family's name operators."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from oarsmith.checkpoint.quantized.kept import stored_codes
from oarsmith.checkpoint.safetensors_stream import TensorInfo
from oarsmith.checkpoint.tensors import FLOATS, TensorSource
from oarsmith.errors import CheckpointError
from oarsmith.models.decoder import Decoder
from oarsmith.models.linear import Linear
from oarsmith.models.names import Duplicate, Ignored, NameMap, Place
from oarsmith.models.spec import DecoderSpec


def meta_decoder(spec: DecoderSpec, config: Mapping[str, Any], dtype: torch.dtype) -> Decoder:
    """A decoder without memory: shapes and dtypes only.

    Parameters get ``dtype``, but for those whose module asks for one of its own (a router's float32 bias).

    Raises:
        CheckpointError: the config asks for tensors of more elements than can be counted.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Decoder(spec, config)
    except (RuntimeError, TypeError) as error:  # all that PyTorch refuses on the meta device: sizes that overflow
        raise CheckpointError(f"the sizes in config.json are absurd: {error}", where="config.json") from error
    finally:
        torch.set_default_dtype(before)


def empty_decoder(
    spec: DecoderSpec, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device | None = None
) -> Decoder:
    """A decoder with memory but no values."""
    model = meta_decoder(spec, config, dtype)
    materialise(model, device or torch.device("cpu"))
    return model


def materialise(root: nn.Module, device: torch.device) -> None:
    """Give meta parameters memory. `Module.to_empty` would import the compiler, for 0.8 CPU seconds."""
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                _give_memory(module, name, device)
        assert not any(buffer.is_meta for buffer in module.buffers(recurse=False)), "a buffer lost its values on meta"


def _give_memory(module: nn.Module, name: str, device: torch.device) -> nn.Parameter:
    meta = module.get_parameter(name)
    memory = torch.empty(meta.shape, dtype=meta.dtype, device=device)
    given = nn.Parameter(memory, requires_grad=meta.requires_grad)
    setattr(module, name, given)
    return given


def file_infos(
    spec: DecoderSpec, config: Mapping[str, Any], names: NameMap, dtype: torch.dtype
) -> dict[str, TensorInfo]:
    """Canonical name -> dtype and shape of every tensor of a model of ``dtype``, as its family's files have them."""
    parameters = dict(meta_decoder(spec, config, dtype).named_parameters())
    found = {}
    for place in names.places:
        view = place.view(parameters[place.parameter])
        found[place.file] = TensorInfo(view.dtype, place.shape or tuple(view.shape))
    return found


def check_fits(model: Decoder, names: NameMap, source: TensorSource) -> None:
    """Compare every name and shape before memory is taken: a config alone cannot ask for more than the files hold.

    Raises:
        CheckpointError: missing, surplus or misshapen tensors, the first of each named.
    """
    file_names, parameters = match_names(names, source), dict(model.named_parameters())
    for place in names.places:
        view = place.view(parameters[place.parameter])
        check_tensor(source, file_names[place.file], place.shape or tuple(view.shape))
    check_copies(names, file_names, source)


def check_copies(names: NameMap, file_names: Mapping[str, str], source: TensorSource) -> None:
    """A tied head that the file stores beside the table must be the table: another one would be lost.

    Raises:
        CheckpointError: it is not.
    """
    for copy in names.operators:
        if not isinstance(copy, Duplicate) or copy.file not in source.shapes:
            continue
        first = next(file_names[place.file] for place in names.places if place.parameter == copy.parameter)
        check_tensor(source, copy.file, source.shapes[first])
        one, other = source.read(first), source.read(copy.file)
        # One of them may be stored with fewer digits.
        if not torch.equal(one.to(other.dtype), other) and not torch.equal(other.to(one.dtype), one):
            raise CheckpointError(
                f"{copy.file} differs from {first}, but the config ties the two",
                where=str(source.directory),
                fix='set "tie_word_embeddings": false in config.json to use both',
            )


@torch.no_grad()
def fill(
    model: Decoder,
    names: NameMap,
    source: TensorSource,
    device: torch.device | None = None,
    *,
    later: Container[str] = (),
) -> None:
    """Bring every tensor of the source to its place; each parameter the family names must be filled exactly.

    A parameter on the meta device gets its memory (on ``device``) only when its turn comes, and a linear map may change
    its weight as soon as it is there (`Linear.weight_filled`), or take the codes of a quantized file instead
    (`Linear.take_codes`): a weight that is kept in fewer bits is never held beside others that wait for the same.
    ``later``: parameters that stay as they are.
    """
    file_names, where = match_names(names, source), device or torch.device("cpu")
    places: dict[str, list[Place]] = {}
    for place in names.places:
        places.setdefault(place.parameter, []).append(place)
    for path, group in places.items():
        if path in later:
            continue
        owner, _, name = path.rpartition(".")
        module = model.get_submodule(owner)
        if name == "weight" and isinstance(module, Linear) and module.wants_codes:
            codes = stored_codes(group, file_names, source, where)
            if codes is not None:
                module.take_codes(codes)
                continue
        parameter = module.get_parameter(name)
        if parameter.is_meta:
            parameter = _give_memory(module, name, where)
        fill_parameter(parameter, group, file_names, source)
        if name == "weight" and isinstance(module, Linear):
            del parameter  # lets the module drop it
            module.weight_filled()
    model.file_names = {name: actual for name, actual in file_names.items() if name != actual}


def fill_parameter(
    parameter: nn.Parameter,
    places: list[Place],
    file_names: Mapping[str, str],
    source: TensorSource,
) -> None:
    """One parameter from all the file tensors that lie in it."""
    views = [(place.view(parameter), file_names[place.file]) for place in places]
    for place, (target, name) in zip(places, views, strict=True):
        check_tensor(source, name, place.shape or tuple(target.shape))
    count = sum(target.numel() for target, _ in views)
    assert count == parameter.numel(), f"{places[0].parameter}: {count} of {parameter.numel()} elements have a place"
    for target, name in views:
        source.read_into(name, target)


def check_tensor(source: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    """A float tensor of this shape, or an error that says which of config and files is wrong."""
    if source.dtypes[name] not in FLOATS:
        raise CheckpointError(
            f"tensor {name} is stored as {source.dtypes[name]}: quantized weights",
            where=str(source.directory),
            fix="use the model's unquantized checkpoint",
        )
    if source.shapes[name] != shape:
        raise CheckpointError(
            f"tensor {name} has shape {source.shapes[name]}, the config asks for {shape}",
            where=str(source.directory),
            fix="config.json and weights do not belong together; copy both from the same model",
        )


def match_names(names: NameMap, source: TensorSource) -> dict[str, str]:
    """Canonical name -> name in the file, for every place; the rest of the file must be ignorable.

    Raises:
        CheckpointError: missing or surplus tensors, the first of each named.
    """
    prefix, present = names.optional_prefix, set(source.shapes)
    found, missing = {}, []
    for place in names.places:
        short = place.file.removeprefix(prefix)
        actual = next((name for name in (place.file, short) if name in present), None)
        if actual is None:
            missing.append(place.file)
        else:
            found[place.file] = actual
    surplus = present - set(found.values())
    for operator in names.operators:
        if isinstance(operator, Ignored):
            surplus = {n for n in surplus if not any(re.fullmatch(operator.pattern, c) for c in (n, prefix + n))}
        elif isinstance(operator, Duplicate):
            surplus.discard(operator.file)
    if missing or surplus:
        raise _mismatch(missing, sorted(surplus), source)
    return found


def _mismatch(missing: list[str], surplus: list[str], source: TensorSource) -> CheckpointError:
    parts = []
    if missing:
        near = difflib.get_close_matches(missing[0], surplus[:10_000], n=1)
        hint = f" (the file has {near[0]})" if near else ""
        parts.append(f"{len(missing)} tensors are missing, first {missing[0]}{hint}")
    if surplus:
        parts.append(f"{len(surplus)} tensors have no place in this model, first {surplus[0]}")
    return CheckpointError(
        "; ".join(parts), where=str(source.directory), fix="check that config.json describes these weights"
    )
