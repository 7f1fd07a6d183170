"""``oarsmith merge-adapter``: fold an adapter into its base and prove that nothing else changed; or take it off."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from oarsmith.adapters.merge import MergeProof, base_logits, merge_adapter, prompt_logits, prove
from oarsmith.atomic import atomic_directory, atomic_write_text
from oarsmith.checkpoint.config_file import read_config
from oarsmith.checkpoint.hf import write_decoder
from oarsmith.checkpoint.quantized.written import write_requantized
from oarsmith.config.checkpoints import MergeAdapterConfig
from oarsmith.config.resolved import Resolved
from oarsmith.errors import CheckpointError, ModelError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.outputs import check_destination
from oarsmith.jobs.unmerge_adapter import print_unmerged, unmerge
from oarsmith.loading import load_model
from oarsmith.model_path import adapter_directory, find_tokenizer, resolve
from oarsmith.models import families
from oarsmith.text import Tokenizer

# General prompts for the proof where the caller has none of its own.
PROMPTS = (
    "Who are you, and what can you do?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a river at dawn.",
    "List three prime numbers larger than 10 and add them up.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Translate to French: The boat is old, but it still floats.",
)


def run(resolved: Resolved[MergeAdapterConfig]) -> int:
    """The command."""
    config = resolved.config
    console = make_console()
    adapter = adapter_directory(Path(config.adapter))
    if config.unmerge is not None:
        return _unmerge(config, config.unmerge, adapter, console)
    where = resolve(config.model_name_or_path, adapter) if config.model_name_or_path else resolve(adapter)
    if where.adapter is None:
        raise CheckpointError("there is no adapter here", where=config.adapter, fix="name an adapter or a LoRA run")
    output_dir = Path(config.output_dir) if config.output_dir else Path(config.adapter) / "merged"
    check_destination(output_dir, config.overwrite, inputs=[where.base, where.adapter])
    tokenizer = find_tokenizer(where.base, where.adapter)
    proof = merge(
        where.base,
        where.adapter,
        output_dir,
        tokenizer,
        PROMPTS,
        config.kl_budget,
        config.dtype,
        any_base=config.any_base,
        requantize=config.requantize,
    )
    print_proof(proof, console)
    scores = families.build_spec(read_config(output_dir))[1].head.num_scores
    console.print(f"merged model: {output_dir}\nnext: oarsmith {'chat' if scores is None else 'serve'} {output_dir}")
    return 0


def _unmerge(config: MergeAdapterConfig, merged: str, adapter: Path, console: Console) -> int:
    where = resolve(merged)
    if where.adapter is not None:
        raise CheckpointError("this is an adapter, not a merged model", where=merged, fix="name the merged model")
    base = Path(config.model_name_or_path) if config.model_name_or_path else _named_base(adapter)
    output_dir = Path(config.output_dir) if config.output_dir else Path(config.adapter) / "unmerged"
    check_destination(output_dir, config.overwrite, inputs=[where.base, adapter, *([] if base is None else [base])])
    tokenizer = find_tokenizer(where.base, adapter)
    ids = [_prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    proof = unmerge(where.base, adapter, output_dir, tokenizer, ids, config.kl_budget, config.dtype, base=base)
    print_unmerged(proof, console)
    console.print(f"model without the adapter: {output_dir}")
    return 0


def _named_base(adapter: Path) -> Path | None:
    """The base that an adapter names, if it is there."""
    try:
        return resolve(adapter).base
    except CheckpointError:
        return None


def merge(
    base: Path,
    adapter: Path,
    output_dir: Path,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    kl_budget: float,
    dtype: str = "auto",
    *,
    any_base: bool = False,
    requantize: bool = False,
) -> MergeProof:
    """Merge, compare on the prompts, and write only a merge that is the adapter within the budget.

    Args:
        requantize: write it in the layout of its quantized base; what is compared is what is written.

    Raises:
        ModelError: the merged model differs from base plus adapter by more than ``kl_budget`` nats per token.
    """
    model = load_model(base, dtype=dtype, adapter=adapter, any_base=any_base)
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    adapted, plain = prompt_logits(model, ids), base_logits(model, ids)
    merged = merge_adapter(model, keep=False)
    if merged.spec.head.num_scores is not None:  # by it transformers finds where to read a score
        merged.config["pad_token_id"] = tokenizer.plain_pad_id
    with atomic_directory(output_dir) as folder:
        if requantize:
            write_requantized(base, merged, folder)
            merged = load_model(folder, dtype=dtype)
        proof = prove(adapted, prompt_logits(merged, ids), plain)
        _require(proof, kl_budget, adapter, requantize=requantize)
        if not requantize:
            write_decoder(merged, folder)
        tokenizer.save(folder)
        atomic_write_text(folder / "merge_proof.json", json.dumps(asdict(proof), indent=1) + "\n")
    return proof


def _require(proof: MergeProof, kl_budget: float, adapter: Path, *, requantize: bool) -> None:
    if not proof.mean_kl <= kl_budget:
        instead = "merge without requantize" if requantize else "merge with --dtype fp32 (less rounding)"
        raise ModelError(
            f"the merged model differs from base plus adapter by {proof.mean_kl:.2e} nats per token (the adapter "
            f"itself moves it by {proof.effect_kl:.2e}), the budget is {kl_budget:.2e}; nothing was written",
            where=str(adapter),
            fix=f"{instead}, or raise kl_budget if the difference is acceptable",
        )


def print_proof(proof: MergeProof, console: Console) -> None:
    """The proof in words."""
    console.print(
        f"merge proof over {proof.num_positions} positions: largest logit difference {proof.max_logit_diff:.3g}, "
        f"KL(adapter || merged) {proof.mean_kl:.2e} nats per token (worst {proof.max_kl:.2e}), "
        f"same first choice {proof.top1_agreement:.1%}; the adapter itself moves the model by {proof.effect_kl:.2e}"
    )
    if proof.mean_kl > proof.effect_kl / 2:
        console.print(
            "note: rounding does about as much to this model as its adapter, which does little so far; merged "
            "with --dtype fp32 nothing of it is lost"
        )


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    return tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
