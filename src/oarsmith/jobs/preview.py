"""``oarsmith preview``: training samples with every token coloured by its loss weight."""

from __future__ import annotations

from pathlib import Path

from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.preferences import PreferenceDataKeys
from oarsmith.config.resolved import Resolved
from oarsmith.config.tools import PreviewConfig
from oarsmith.data.answer_preview import preview_answers
from oarsmith.data.answer_samples import AnswerOptions
from oarsmith.data.judged import Kind
from oarsmith.data.preferences import is_preference, read_judged
from oarsmith.data.preview import preview
from oarsmith.data.records import read_records
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import fit_max_length, make_tokenizer
from oarsmith.methods.sft import sample_options
from oarsmith.model_path import resolve
from oarsmith.models import families

_KINDS: dict[str, Kind] = {"dpo": "pair", "kto": "point", "reward": "pair"}


def run(resolved: Resolved[PreviewConfig]) -> int:
    """The command."""
    where = resolve(resolved.config.model_name_or_path)
    limit = families.build_spec(read_config(where.base))[1].max_positions
    kind = _judged_kind(resolved.config)
    asked = resolved.config.max_length
    if kind is not None and resolved.provenance["max_length"] == "default":
        asked = PreferenceDataKeys.model_fields["max_length"].default
    config = fit_max_length(resolved, asked, limit).config
    tokenizer, console = make_tokenizer(config), make_console()
    if kind is None:
        # In sft the one is another name of the other.
        sft_config = config.model_copy(update={"src_length": config.src_length or config.max_prompt_len})
        preview(config.dataset_name_or_path, tokenizer, sample_options(sft_config), config.count, console)
    else:
        options = AnswerOptions(
            kind=kind,
            mismatched=kind == "point",
            max_length=min(asked, limit),
            max_prompt_len=config.max_prompt_len,
            step_separator=config.step_separator,
            on_malformed=config.on_malformed,
        )
        preview_answers(config.dataset_name_or_path, tokenizer, options, config.count, console)
    return 0


def _judged_kind(config: PreviewConfig) -> Kind | None:
    """What a row of preference data is taken as; None where the rows are for sft. The first row decides where the
    stage does not."""
    if config.stage in ("dpo", "kto"):
        return _KINDS[config.stage]
    if config.stage == "sft":
        return None
    split = "train" if Path(config.dataset_name_or_path).is_dir() else None
    first = next(read_records(config.dataset_name_or_path, split, on_malformed=config.on_malformed), None)
    if first is None or not is_preference(first.value):
        return _KINDS.get(config.stage)
    found = read_judged(first).kind
    return "pair" if config.stage == "reward" and found == "point" else found
