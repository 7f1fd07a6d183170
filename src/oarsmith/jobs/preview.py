"""``oarsmith preview``: training samples with every token coloured by its loss weight."""

from __future__ import annotations

from oarsmith.checkpoint.config_file import read_config
from oarsmith.config.resolved import Resolved
from oarsmith.config.tools import PreviewConfig
from oarsmith.data.preview import preview
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import fit_max_length, make_tokenizer
from oarsmith.methods.sft import sample_options
from oarsmith.model_path import resolve
from oarsmith.models import families


def run(resolved: Resolved[PreviewConfig]) -> int:
    """The command."""
    where = resolve(resolved.config.model_name_or_path)
    config = fit_max_length(
        resolved, resolved.config.max_length, families.build_spec(read_config(where.base))[1].max_positions
    ).config
    preview(config.dataset_name_or_path, make_tokenizer(config), sample_options(config), config.count, make_console())
    return 0
