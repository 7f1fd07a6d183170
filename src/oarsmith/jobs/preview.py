"""``oarsmith preview``: training samples with every token coloured by its loss weight."""

from __future__ import annotations

from rich.console import Console

from oarsmith.checkpoint.hf import read_config
from oarsmith.config.resolved import Resolved
from oarsmith.config.tools import PreviewConfig
from oarsmith.data.preview import preview
from oarsmith.loading import resolve
from oarsmith.methods.sft import sample_options
from oarsmith.models import families
from oarsmith.text import load_tokenizer
from oarsmith.text.choose import with_named_template


def run(resolved: Resolved[PreviewConfig]) -> int:
    """The command."""
    config = resolved.config
    where = resolve(config.model_name_or_path)
    tokenizer = load_tokenizer(resolve(config.tokenizer_name_or_path or config.model_name_or_path).base)
    tokenizer = with_named_template(tokenizer, config.chat_template)
    _, spec = families.build_spec(read_config(where.base))
    options = sample_options(config, spec.max_positions)
    preview(config.dataset_name_or_path, tokenizer, options, config.count, Console(highlight=False))
    return 0
