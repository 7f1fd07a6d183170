"""``oarsmith export``: compile a model into a package that runs without its code."""

from __future__ import annotations

import time
from pathlib import Path

from oarsmith.config.export import ExportConfig
from oarsmith.config.resolved import Resolved
from oarsmith.engine.build import load_decoder
from oarsmith.engine.static_export import FACTS_FILE, export_static
from oarsmith.errors import ConfigError
from oarsmith.jobs.console import make_console
from oarsmith.jobs.runtime import make_tokenizer, runtime
from oarsmith.models.families import scoring
from oarsmith.training.numbers import show_duration


def run(resolved: Resolved[ExportConfig]) -> int:
    """The command."""
    config, console = resolved.config, make_console()
    folder = Path(config.output_dir)
    if folder.exists():
        if not config.overwrite_output_dir:
            raise ConfigError(
                f"{folder} exists already", where="output_dir", fix="name another folder, or add --overwrite_output_dir"
            )
        if not (folder / FACTS_FILE).is_file():
            raise ConfigError(f"{folder} is no package: it is not replaced", where="output_dir", fix="name another one")
    begin = time.perf_counter()
    with runtime(config):
        tokenizer = make_tokenizer(config)
        model = load_decoder(config.model_name_or_path, config.dtype, config.device, None)
        scoring.require_text(model.config, "packages are for models that write")
        export_static(model, tokenizer, folder, said=lambda text: console.print(f"{text} ..."))
    size = sum(file.stat().st_size for file in folder.iterdir())
    console.print(f"wrote {folder}: {size / 2**20:,.0f} MiB in {show_duration(time.perf_counter() - begin)}")
    console.print(f"next:  oarsmith generate --mode static {folder} 'your question'")
    return 0
