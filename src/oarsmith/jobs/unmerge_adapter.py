"""``oarsmith merge-adapter --unmerge``: take an adapter off a model that it was merged into, and prove it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from oarsmith.adapters.merge import base_logits, prompt_logits, prove, without_adapter
from oarsmith.adapters.peft_layout import base_hash
from oarsmith.adapters.take_off import require_removable, take_off_adapter
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.fingerprint import fingerprint
from oarsmith.checkpoint.hf import iter_named, write_decoder
from oarsmith.checkpoint.quantized.unpacked import QUANTIZATION
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.loading import load_model
from oarsmith.models import families
from oarsmith.models.decoder import Decoder
from oarsmith.text import Tokenizer


@dataclass(frozen=True)
class BaseDifference:
    """How far the restored model is from its base.

    ``max_weight_diff``: largest absolute difference of a weight. ``equal_weights``: share of weights that are the same
    bit for bit. ``mean_kl``: KL(base || restored) in nats per token.
    """

    max_weight_diff: float
    equal_weights: float
    mean_kl: float


@dataclass(frozen=True)
class UnmergeProof:
    """What is known of the restored model.

    ``max_rounding``: how far a weight can be from the base's, as merging and unmerging each round once. ``mean_kl``:
    KL(merged || restored with the adapter) in nats per token. ``effect_kl``: KL(merged || restored), for comparison.
    ``same_hash``: whether its fingerprint is the one of the base that the adapter tells; None: it tells none.
    ``base``: the comparison with the base, if it is there.
    """

    max_rounding: float
    mean_kl: float
    effect_kl: float
    same_hash: bool | None
    base: BaseDifference | None


def unmerge(
    merged: Path,
    adapter: Path,
    output_dir: Path,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    kl_budget: float,
    dtype: str = "auto",
    *,
    base: Path | None = None,
) -> UnmergeProof:
    """Subtract in fp32, compare on the prompts, and write only what does with the adapter what the merged model does.

    Args:
        merged: the model that the adapter was merged into.
        prompts: token ids.
        base: the model before, to compare with; it is not needed.

    Raises:
        CheckpointError: the adapter is not merged into this model, or its weights are in fewer bits.
        ConfigError: an adapter that cannot be taken off.
        ModelError: a comparison shows more than ``kl_budget`` nats per token.
    """
    told = base_hash(adapter)
    if told is not None and told == fingerprint(merged):
        what = "the adapter is not merged into this model: it is the base itself"
        raise CheckpointError(what, where=str(merged), fix="name the merged model")
    if any(key in read_config(merged) for key in QUANTIZATION):
        what = "merged weights that were rounded to a few bits do not tell what they were"
        raise CheckpointError(what, where=str(merged), fix="keep the base model")
    model = load_model(merged, dtype=dtype, adapter=adapter, any_base=True)
    require_removable(model)
    before = base_logits(model, prompts)
    rounding = take_off_adapter(model)
    again, restored = prompt_logits(model, prompts), base_logits(model, prompts)
    proof = prove(before, again, restored)
    _require(proof.mean_kl, kl_budget, "with the adapter again, the restored model differs from the merged one", merged)
    plain = without_adapter(model)
    difference = None if base is None else _compare(plain, restored, base, prompts, dtype)
    if difference is not None:
        _require(difference.mean_kl, kl_budget, "the restored model differs from the base", merged)
    with atomic_directory(output_dir) as folder:
        write_decoder(plain, folder)
        same = None if told is None else fingerprint(folder) == told
        found = UnmergeProof(rounding, proof.mean_kl, proof.effect_kl, same, difference)
        tokenizer.save(folder)
        atomic_write_text(folder / "unmerge_proof.json", json.dumps(asdict(found), indent=1) + "\n")
    return found


def _require(mean_kl: float, kl_budget: float, what: str, where: Path) -> None:
    if not mean_kl <= kl_budget:
        raise ModelError(
            f"{what} by {mean_kl:.2e} nats per token, the budget is {kl_budget:.2e}; nothing was written",
            where=str(where),
            fix="check that this adapter was merged into this model, or keep the base model",
        )


def _compare(
    plain: Decoder, restored: list[Tensor], base: Path, prompts: Sequence[list[int]], dtype: str
) -> BaseDifference:
    """The restored model beside its base; a head that merging has untied beside the base's table."""
    model = load_model(base, dtype=dtype)
    own, theirs = _weights(plain), _weights(model)
    untied = sorted(own.keys() - theirs.keys())
    if not plain.spec.head.tied and model.spec.head.tied and len(untied) == 1:
        theirs[untied[0]] = model.embedding.weight.detach()
    if {name: w.shape for name, w in own.items()} != {name: w.shape for name, w in theirs.items()}:
        what = "this model and the merged one do not have the same tensors"
        raise CheckpointError(what, where=str(base), fix="name the adapter's own base model")
    largest, equal, count = 0.0, 0, 0
    for name, weight in own.items():
        difference = (weight.float() - theirs[name].float()).abs()
        largest, count = max(largest, float(difference.max())), count + weight.numel()
        equal += int((difference == 0).sum())
    truth = prompt_logits(model, prompts)
    return BaseDifference(largest, equal / count, prove(truth, restored, truth).mean_kl)


def _weights(model: Decoder) -> dict[str, Tensor]:
    """By the family's own names, whatever the file leaves out of them."""
    names = families.find(model.config).names(model.spec)
    named = zip(names.places, iter_named(model, names), strict=True)
    return {place.file: tensor for place, (_, tensor) in named}


def print_unmerged(proof: UnmergeProof, console: Console) -> None:
    """The proof in words."""
    console.print(
        f"unmerge proof: rounding has moved no weight by more than {proof.max_rounding:.3g}; with the adapter again "
        f"the restored model is the merged one but for {proof.mean_kl:.2e} nats per token (the adapter itself moves it "
        f"by {proof.effect_kl:.2e})"
    )
    if proof.base is not None:
        console.print(
            f"beside the base: largest difference of a weight {proof.base.max_weight_diff:.3g}, "
            f"{proof.base.equal_weights:.1%} of the weights the same bit for bit, "
            f"KL(base || restored) {proof.base.mean_kl:.2e} nats per token"
        )
    if proof.same_hash is not None:
        console.print(
            "its hash is that of the base"
            if proof.same_hash
            else "its hash is not that of the base, as the rounding shows: adapters need --any_base on it"
        )
