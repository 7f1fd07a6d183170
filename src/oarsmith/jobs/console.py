"""Where a job prints. Apart from ``runtime.py``, which imports PyTorch: not every job needs that."""

from __future__ import annotations

import os

from rich.console import Console


def make_console() -> Console:
    """Text as it is (brackets in paths and answers are no markup), lines left whole in a pipe."""
    # Of several processes, the first speaks for all.
    quiet = os.environ.get("RANK", "0") != "0"
    return Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
