"""What a training run starts from: a checkpoint or fresh weights, and the parameters that train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from oarsmith.adapters.forms import AS_STORED, DENSE
from oarsmith.adapters.forms.chosen import chosen_form
from oarsmith.adapters.linear import AdaptedLinear, attach
from oarsmith.adapters.parts import rewrite_of
from oarsmith.adapters.targets import faked, kept_as
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.hf import DTYPES, load_decoder
from oarsmith.config.adapters import AdapterKeys
from oarsmith.config.groups import ModelKeys
from oarsmith.config.resolved import Resolved
from oarsmith.config.train import TrainConfig
from oarsmith.data.pose import Pose
from oarsmith.errors import ConfigError, DataError
from oarsmith.loading import dtype_name, new_model
from oarsmith.model_path import resolve
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.models.recompute import Recompute
from oarsmith.models.shifted import ShiftedSparse
from oarsmith.models.stretch import stretch
from oarsmith.quantize.choose import fake_of
from oarsmith.training.batches import BatchSource
from oarsmith.training.pose import PosedBatches
from oarsmith.training.precision import has_fast_bf16, training_dtype

C = TypeVar("C", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Start:
    """The model before training.

    Attributes:
        base: directory of config, tokenizer and (unless ``fresh``) weights.
        config: the ``config.json`` the trained model will carry.
    """

    base: Path
    config: Mapping[str, Any]
    fresh: bool = False

    @property
    def vocab_size(self) -> int:
        return families.build_spec(self.config)[1].vocab_size

    @property
    def num_scores(self) -> int | None:
        """Of a model that scores texts instead of writing them."""
        return families.build_spec(self.config)[1].head.num_scores

    @property
    def max_positions(self) -> int:
        return families.build_spec(self.config)[1].max_positions


def model_directory(config: ModelKeys) -> Path:
    """The directory of the model to train.

    Raises:
        ConfigError: it is an adapter.
    """
    where = resolve(config.model_name_or_path)
    if where.adapter is not None:
        raise ConfigError(
            f"{config.model_name_or_path} is an adapter",
            where="model_name_or_path",
            fix=f"merge it first: oarsmith merge-adapter {config.model_name_or_path} MERGED",
        )
    return where.base


def stretched(config: TrainConfig, contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """A ``config.json`` with the context the run asks for."""
    if config.rope_scaling_type == "none":
        return contents
    return stretch(contents, config.rope_scaling_type, config.rope_scaling_factor)


def from_checkpoint(config: TrainConfig, base: Path, *, scoring: bool = False) -> Start:
    """Its weights, and its config with the context the run asks for.

    Args:
        scoring: it may be a reward model, of one score.

    Raises:
        ConfigError: it is no model that can be trained so.
    """
    begin = Start(base=base, config=stretched(config, read_config(base)))
    if begin.num_scores is not None and not (scoring and begin.num_scores == 1):
        what = f"{base} gives {begin.num_scores} scores and writes no text"
        raise ConfigError(what, where="model_name_or_path", fix="begin with a model that writes")
    return begin


def settle_dtype(resolved: Resolved[C], device: torch.device) -> Resolved[C]:
    """The number format and device that this machine decides."""
    dtype = training_dtype(resolved.config.dtype, fast_bf16=has_fast_bf16(device))
    return resolved.settle("auto on this machine", device=device.type, dtype=dtype_name(dtype))


def require_vocabulary(highest_id: tuple[int, str], start: Start) -> None:
    """Refuse token ids the model has no row for: the tokenizer is another model's."""
    highest, where = highest_id
    if highest >= start.vocab_size:
        raise DataError(
            f"token id {highest} is outside the model's vocabulary of {start.vocab_size}",
            where=where,
            fix="use the tokenizer that belongs to this model",
        )


def load_whole(config: TrainConfig, start: Start, device: torch.device) -> Decoder:
    """The model with all parameters training."""
    if start.fresh:
        model = new_model(start.config, seed=config.seed, dtype=DTYPES[config.dtype], device=device).train()
    else:
        model = load_decoder(start.base, dtype=DTYPES[config.dtype], device=device, config=start.config)
    return set_up(config, model)


def load_with_adapter(config: TrainConfig, keys: AdapterKeys, start: Start, device: torch.device) -> Decoder:
    """A frozen model with fresh adapters that train, its linear maps kept as ``weight_quantize_algo`` says.

    Raises:
        ConfigError: the checkpoint's codes are to be kept, but it has none.
    """
    form = chosen_form(keys)
    rewrite = rewrite_of(keys, start.base)
    if form is not DENSE:
        rewrite = kept_as(form, rewrite)
    if (fake := fake_of(keys)) is not None:
        rewrite = faked(fake, rewrite)
    model = load_decoder(start.base, dtype=DTYPES[config.dtype], device=device, rewrite=rewrite, config=start.config)
    if form is AS_STORED and not any(isinstance(m, AdaptedLinear) and m.form is not DENSE for m in model.modules()):
        raise ConfigError(
            f"{start.base} has no quantized weights that can be kept as they are",
            where="weight_quantize_algo",
            fix="set it to none, or to nf4 to quantize the weights",
        )
    attach(model, config.seed)
    return set_up(config, model)


def set_up(config: TrainConfig, model: Decoder) -> Decoder:
    """What a model does in training beside its plain forward and backward pass."""
    if config.recompute:
        model.recompute = Recompute(
            granularity=config.recompute_granularity, skip_layers=frozenset(config.no_recompute_layers)
        )
        model.recompute.require(len(model.spec.layers))
    if config.use_ssa:
        ShiftedSparse.require(model.spec)
        model.shifted = ShiftedSparse(ratio=config.ssa_group_size_ratio)
    model.neftune_alpha = config.neftune_noise_alpha if config.neftune else None
    if config.torch_compile:
        # Not at the top: it imports PyTorch's compiler, which takes seconds.
        from oarsmith.training.compile import compile_model

        compile_model(model)
    return model


def with_skipped_positions(config: TrainConfig, start: Start, source: BatchSource) -> BatchSource:
    """The training batches, under PoSE where the config asks for it."""
    if not config.use_pose_convert:
        return source
    return PosedBatches(source, Pose(num_positions=start.max_positions, seed=config.seed))
